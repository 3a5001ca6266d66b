package image

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
)

const (
	defaultRegistry = "docker.io"
	officialPath    = "library/"
	defaultTag      = "latest"
)

var (
	hexPattern  = pattern(`^[0-9a-f]{2,64}$`)
	idPattern   = pattern(`^[0-9a-f]{64}$`)
	hostPattern = pattern(`^(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?$`)
	pathPattern = pattern(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagPattern  = pattern(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	digPattern  = pattern(`^sha256:[0-9a-f]{64}$`)
	platPattern = pattern(`^[\w./-]{1,80}$`)
)

// Name is a parsed image name.
type Name struct {
	Registry string // "docker.io"
	Path     string // "library/debian"
	Tag      string // "12"; empty where there is a digest and no tag
	Digest   string // "sha256:…" of a manifest, or empty
}

// ParseName reads a name as Docker does: without a registry it is Docker Hub's, without a path there it is an official image,
// without a tag it is the latest.
func ParseName(s string) (Name, error) {
	bad := func(why string) (Name, error) {
		return Name{}, fmt.Errorf("%q is no image name: %s", s, why)
	}
	if s == "" {
		return bad("it is empty")
	}
	if len(s) > 512 {
		return Name{}, fmt.Errorf("an image name of %d bytes is too long", len(s))
	}
	var n Name
	rest := s
	if at := strings.IndexByte(rest, '@'); at >= 0 {
		rest, n.Digest = rest[:at], rest[at+1:]
		if !digPattern().MatchString(n.Digest) {
			return bad(`after "@" stands sha256: and 64 hex digits`)
		}
	}
	if colon := strings.LastIndexByte(rest, ':'); colon > strings.LastIndexByte(rest, '/') {
		rest, n.Tag = rest[:colon], rest[colon+1:]
		if !tagPattern().MatchString(n.Tag) {
			return bad("its tag may hold letters, digits, dots, dashes and underscores")
		}
	} else if n.Digest == "" {
		n.Tag = defaultTag
	}
	n.Registry, n.Path = defaultRegistry, rest
	// The first part is a registry where it could not be a name on Docker Hub.
	if host, path, ok := strings.Cut(rest, "/"); ok && (strings.ContainsAny(host, ".:") || host == "localhost" || strings.ToLower(host) != host) {
		n.Registry, n.Path = host, path
		if !hostPattern().MatchString(host) {
			return bad(fmt.Sprintf("%q is no host", host))
		}
	}
	if n.Registry == "index.docker.io" {
		n.Registry = defaultRegistry
	}
	if n.Path != strings.ToLower(n.Path) {
		return bad("it must be in lower case")
	}
	if !pathPattern().MatchString(n.Path) {
		return bad("it may hold letters, digits and single separators")
	}
	if n.Registry == defaultRegistry {
		base := strings.TrimPrefix(n.Path, officialPath)
		if base == "sha256" || idPattern().MatchString(base) {
			return bad("that is how ids are written")
		}
		if !strings.Contains(n.Path, "/") {
			n.Path = officialPath + n.Path
		}
	}
	return n, nil
}

// String returns the full form, "docker.io/library/debian:12".
func (n Name) String() string { return n.suffix(n.Registry + "/" + n.Path) }

// Short returns the form that people write, "debian:12".
func (n Name) Short() string {
	if n.Registry != defaultRegistry {
		return n.String()
	}
	return n.suffix(strings.TrimPrefix(n.Path, officialPath))
}

// tagged is the name without its digest, in full.
func (n Name) tagged() string {
	n.Digest = ""
	return n.String()
}

// canonical is the name by which the repository has what has this digest.
func (n Name) canonical(digest string) string { return n.Registry + "/" + n.Path + "@" + digest }

func (n Name) suffix(s string) string {
	if n.Tag != "" {
		s += ":" + n.Tag
	}
	if n.Digest != "" {
		s += "@" + n.Digest
	}
	return s
}

// pattern compiles an expression when it is first used: this package is linked into programs that mostly never use it.
func pattern(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}
