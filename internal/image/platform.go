package image

import (
	"fmt"
	"runtime"
	"strings"
)

// Platform is what an image's programs run on.
type Platform struct {
	OS, Arch string
	Variant  string // empty: any
}

// Host is the platform of this host's boxes.
func Host() Platform { return Platform{OS: "linux", Arch: runtime.GOARCH} }

// ParsePlatform reads os/arch[/variant], or arch alone, as Docker writes them.
func ParsePlatform(s string) (Platform, error) {
	parts := strings.Split(s, "/")
	if !platPattern().MatchString(s) || len(parts) > 3 {
		return Platform{}, fmt.Errorf("platform %q: use os/arch[/variant], such as linux/%s", s, runtime.GOARCH)
	}
	p := Platform{OS: "linux"}
	if len(parts) == 1 {
		p.Arch = parts[0]
	} else {
		p.OS, p.Arch = parts[0], parts[1]
	}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	// What uname calls them.
	switch p.Arch {
	case "x86_64":
		p.Arch = "amd64"
	case "aarch64":
		p.Arch = "arm64"
	}
	return p, nil
}

func (p Platform) String() string {
	s := p.OS + "/" + p.Arch
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// Fits tells whether what is made for another platform runs on this one. What does not say is taken at its word.
func (p Platform) Fits(other Platform) bool {
	agrees := func(mine, its string) bool { return its == "" || its == mine }
	return agrees(p.OS, other.OS) && agrees(p.Arch, other.Arch) && (p.Variant == "" || agrees(p.Variant, other.Variant))
}

// Check refuses an image whose programs do not run on p.
func (p Platform) Check(c *ConfigFile) error {
	if p.Fits(Platform{c.OS, c.Architecture, c.Variant}) {
		return nil
	}
	return fmt.Errorf("it is for %s, not for %s", platformName(c.OS, c.Architecture), p)
}
