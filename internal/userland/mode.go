package userland

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// changeMode sets a mode, in octal or symbolic form.
func changeMode(name, mode string) error {
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	m, err := newMode(mode, fi.Sys().(*syscall.Stat_t).Mode&0o7777, fi.IsDir())
	if err != nil {
		return err
	}
	if err := unix.Chmod(name, m); err != nil {
		return &fs.PathError{Path: name, Err: err}
	}
	return nil
}

// newMode applies a mode such as 755 or u+x,go-w to an old one.
func newMode(s string, old uint32, dir bool) (uint32, error) {
	if n, err := strconv.ParseUint(s, 8, 12); err == nil {
		return uint32(n), nil
	}
	for clause := range strings.SplitSeq(s, ",") {
		i := strings.IndexAny(clause, "+-=")
		if i < 0 {
			return 0, errUsage("invalid mode " + s)
		}
		who := clause[:i]
		if who == "" || strings.Contains(who, "a") {
			who = "ugo"
		}
		for i < len(clause) {
			op := clause[i]
			j := i + 1
			for j < len(clause) && strings.IndexByte("+-=", clause[j]) < 0 {
				j++
			}
			var set, mask uint32
			for _, w := range who {
				shift := strings.IndexRune("ogu", w)
				if shift < 0 {
					return 0, errUsage("invalid mode " + s)
				}
				mask |= 7 << (3 * shift)
				for _, p := range clause[i+1 : j] {
					switch p {
					case 'r', 'w', 'x':
						set |= uint32(map[rune]int{'r': 4, 'w': 2, 'x': 1}[p]) << (3 * shift)
					case 'X':
						if dir || old&0o111 != 0 {
							set |= 1 << (3 * shift)
						}
					case 's':
						if w != 'o' {
							set |= map[rune]uint32{'u': 0o4000, 'g': 0o2000}[w]
						}
					case 't':
						set |= 0o1000
					default:
						return 0, errUsage("invalid mode " + s)
					}
				}
			}
			switch op {
			case '+':
				old |= set
			case '-':
				old &^= set
			case '=':
				old = old&^mask | set
			}
			i = j
		}
	}
	return old, nil
}

// recurse runs f for a file, and with -R for all below it.
func recurse(name string, deep bool, f func(string) error) error {
	if !deep {
		return f(name)
	}
	return filepath.WalkDir(name, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		return f(p)
	})
}

func chmod(c *call) error {
	// A mode such as -x looks like a flag.
	deep := false
	args := c.args
	for len(args) > 0 && (args[0] == "-R" || args[0] == "-f" || args[0] == "-Rf" || args[0] == "-fR" || args[0] == "--recursive") {
		if strings.Contains(args[0], "f") {
			c.err = io.Discard
		}
		deep = deep || strings.Contains(args[0], "R") || args[0] == "--recursive"
		args = args[1:]
	}
	if len(args) < 2 {
		return errUsage("missing operand")
	}
	return c.each(args[1:], func(name string) error {
		return recurse(name, deep, func(p string) error { return changeMode(p, args[0]) })
	})
}

func chown(c *call) error {
	o, err := c.parse("R|recursive h|no-dereference f|silent|quiet")
	if err != nil {
		return err
	}
	if err := o.need(2); err != nil {
		return err
	}
	if o.has("f") {
		c.err = io.Discard
	}
	uid, gid := -1, -1
	user, group, hasGroup := strings.Cut(o.rest[0], ":")
	if c.name == "chgrp" {
		user, group, hasGroup = "", o.rest[0], true
	}
	if user != "" {
		u, err := lookupUser(user)
		if err != nil {
			return err
		}
		uid = u.uid
		if hasGroup && group == "" {
			gid = u.gid
		}
	}
	if group != "" {
		if gid, err = lookupGroup(group); err != nil {
			return err
		}
	}
	return c.each(o.rest[1:], func(name string) error {
		return recurse(name, o.has("R"), func(p string) error {
			if o.has("h") {
				return os.Lchown(p, uid, gid)
			}
			return os.Chown(p, uid, gid)
		})
	})
}
