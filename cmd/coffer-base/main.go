// The program of the image base: every command there is a link to it.
package main

import (
	"os"

	"github.com/coffer-box/coffer/internal/userland"
)

func main() { os.Exit(userland.Main(os.Args)) }
