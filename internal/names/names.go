// Package names makes up names for boxes that were given none.
package names

import (
	"math/rand/v2"
	"strconv"
)

// Random is an adjective, a vessel for safe keeping and a number: easy to read and to type, and unlikely to be in use.
func Random() string {
	how := [...]string{"amber", "brave", "calm", "dusty", "early", "fair", "gentle", "happy", "ivory", "jolly", "keen", "lucid", "mellow",
		"neat", "olive", "plain", "quiet", "ruddy", "sturdy", "tidy", "umber", "vivid", "warm", "young", "zesty"}
	what := [...]string{"ark", "bin", "cask", "chest", "crate", "drawer", "flask", "hamper", "jar", "keg", "locker", "pouch", "safe",
		"satchel", "strongbox", "tin", "trunk", "urn", "vault", "wallet"}
	return how[rand.IntN(len(how))] + "-" + what[rand.IntN(len(what))] + "-" + strconv.Itoa(rand.IntN(10000))
}
