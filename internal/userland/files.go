package userland

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func mkdir(c *call) error {
	o, err := c.parse("p|parents m|mode: v")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	return c.each(o.rest, func(name string) error {
		make := os.Mkdir
		if o.has("p") {
			make = os.MkdirAll
		}
		if err := make(name, 0o777); err != nil {
			return err
		}
		if o.has("v") {
			fmt.Fprintf(c.out, "created directory '%s'\n", name)
		}
		if m := o.val("m", ""); m != "" {
			return changeMode(name, m)
		}
		return nil
	})
}

func rmdir(c *call) error {
	o, err := c.parse("p|parents")
	if err != nil {
		return err
	}
	return c.each(o.rest, func(name string) error {
		if err := unix.Rmdir(name); err != nil {
			return &fs.PathError{Path: name, Err: err}
		}
		for dir := filepath.Dir(name); o.has("p") && dir != "." && dir != "/"; dir = filepath.Dir(dir) {
			if err := unix.Rmdir(dir); err != nil {
				return &fs.PathError{Path: dir, Err: err}
			}
		}
		return nil
	})
}

func rm(c *call) error {
	o, err := c.parse("r|R|recursive f|force i v|verbose d|dir")
	if err != nil {
		return err
	}
	if len(o.rest) == 0 && !o.has("f") {
		return errUsage("missing operand")
	}
	r := remover{c: c, recursive: o.has("r"), dirs: o.has("d"), force: o.last("f", "i") == "f", ask: o.last("f", "i") == "i", verbose: o.has("v")}
	return c.each(o.rest, func(name string) error {
		if clean := filepath.Clean(name); o.has("r") && (clean == "/" || filepath.Base(name) == "." || filepath.Base(name) == "..") {
			return fmt.Errorf("%s: refusing to remove it", name)
		}
		return r.remove(name)
	})
}

type remover struct {
	c                                    *call
	recursive, dirs, force, ask, verbose bool
}

func (r remover) remove(name string) error {
	fi, err := os.Lstat(name)
	if err != nil {
		if r.force && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	isDir := fi.IsDir()
	switch {
	case isDir && !r.recursive && !r.dirs:
		return fmt.Errorf("%s: is a directory", name)
	case isDir && r.recursive && !r.ask && !r.verbose:
		return os.RemoveAll(name)
	case isDir && r.recursive:
		if r.ask && !r.c.ask("descend into directory '%s'", name) {
			return nil
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		var names []string
		for _, e := range entries {
			names = append(names, filepath.Join(name, e.Name()))
		}
		if err := r.c.each(names, r.remove); err != nil {
			return err
		}
		if left, err := os.ReadDir(name); r.ask && err == nil && len(left) > 0 {
			return nil // by the answers
		}
	}
	if r.ask && !r.c.ask("remove '%s'", name) {
		return nil
	}
	err = os.Remove(name)
	if err == nil && r.verbose {
		fmt.Fprintf(r.c.out, "removed '%s'\n", name)
	}
	return err
}

// targets pairs each source of cp, mv or ln with where it goes.
func targets(o options) (srcs []string, dst func(src string) string, err error) {
	if dir := o.val("t", ""); dir != "" {
		return o.rest, func(src string) string { return filepath.Join(dir, filepath.Base(src)) }, nil
	}
	if err := o.need(2); err != nil {
		return nil, nil, err
	}
	last := o.rest[len(o.rest)-1]
	srcs = o.rest[:len(o.rest)-1]
	if fi, err := os.Stat(last); err == nil && fi.IsDir() && !o.has("T") {
		return srcs, func(src string) string { return filepath.Join(last, filepath.Base(src)) }, nil
	}
	if len(srcs) > 1 {
		return nil, nil, fmt.Errorf("%s: not a directory", last)
	}
	return srcs, func(string) string { return last }, nil
}

func cp(c *call) error {
	o, err := c.parse("r|R|recursive a|archive p d P|no-dereference L f|force n|no-clobber v|verbose T t|target-directory: i|interactive u|update")
	if err != nil {
		return err
	}
	srcs, dst, err := targets(o)
	if err != nil {
		return err
	}
	k := copier{keep: o.has("p") || o.has("a"), recursive: o.has("r") || o.has("a"), force: o.has("f"), keepOld: o.last("n", "i") == "n", update: o.has("u"),
		links: o.has("a") || o.has("d") || o.has("P") || o.has("r") && !o.has("L")}
	if o.last("n", "i") == "i" {
		k.ask = c.ask
	}
	return c.each(srcs, func(src string) error {
		to := dst(src)
		if o.has("v") {
			fmt.Fprintf(c.out, "'%s' -> '%s'\n", src, to)
		}
		return k.copy(src, to)
	})
}

type copier struct {
	keep, recursive, force, keepOld, links, update bool
	ask                                            func(format string, args ...any) bool // if set, before something is written over
}

func (k copier) copy(src, dst string) error {
	fi, err := os.Lstat(src)
	if err == nil && fi.Mode()&fs.ModeSymlink != 0 && !k.links {
		fi, err = os.Stat(src)
	}
	if err != nil {
		return err
	}
	if old, err := os.Lstat(dst); err == nil {
		if os.SameFile(fi, old) {
			return fmt.Errorf("%s and %s are the same file", src, dst)
		}
		if !fi.IsDir() && k.update && !fi.ModTime().After(old.ModTime()) {
			return nil
		}
		if !fi.IsDir() && (k.keepOld || k.ask != nil && !k.ask("overwrite '%s'", dst)) {
			return nil
		}
	}
	st := fi.Sys().(*syscall.Stat_t)
	switch {
	case fi.IsDir():
		if !k.recursive {
			return fmt.Errorf("%s: is a directory; use -r", src)
		}
		if err := k.copyDir(src, dst, fi); err != nil {
			return err
		}
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(src)
		if err != nil {
			return err
		}
		err = os.Symlink(target, dst)
		if errors.Is(err, fs.ErrExist) {
			if err := os.Remove(dst); err != nil {
				return err
			}
			err = os.Symlink(target, dst)
		}
		if err != nil {
			return err
		}
		if k.keep {
			return os.Lchown(dst, int(st.Uid), int(st.Gid))
		}
		return nil
	case fi.Mode().IsRegular() || !k.recursive:
		if err := k.copyFile(src, dst, fi); err != nil {
			return err
		}
	default:
		if err := unix.Mknod(dst, st.Mode, int(st.Rdev)); err != nil {
			return &fs.PathError{Path: dst, Err: err}
		}
	}
	if !k.keep {
		return nil
	}
	// Owner before mode: a change of owner takes the set-id bits away.
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil && os.Getuid() == 0 {
		return err
	}
	return errors.Join(unix.Chmod(dst, st.Mode&0o7777), os.Chtimes(dst, time.Now(), fi.ModTime()))
}

func (k copier) copyDir(src, dst string, fi fs.FileInfo) error {
	if abs, err := filepath.Abs(dst); err == nil {
		if from, err := filepath.Abs(src); err == nil && strings.HasPrefix(abs+"/", from+"/") {
			return fmt.Errorf("%s: cannot be copied into itself", src)
		}
	}
	if err := os.Mkdir(dst, fi.Mode().Perm()|0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, k.copy(filepath.Join(src, e.Name()), filepath.Join(dst, e.Name())))
	}
	return errors.Join(errs...)
}

func (k copier) copyFile(src, dst string, fi fs.FileInfo) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fi.Mode().Perm())
	if err != nil && k.force {
		if os.Remove(dst) == nil {
			out, err = os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fi.Mode().Perm())
		}
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func mv(c *call) error {
	o, err := c.parse("f|force n|no-clobber v|verbose i|interactive T t|target-directory:")
	if err != nil {
		return err
	}
	srcs, dst, err := targets(o)
	if err != nil {
		return err
	}
	return c.each(srcs, func(src string) error {
		to := dst(src)
		if _, err := os.Lstat(to); err == nil {
			if how := o.last("f", "n", "i"); how == "n" || how == "i" && !c.ask("overwrite '%s'", to) {
				return nil
			}
		}
		err := os.Rename(src, to)
		if err == nil && o.has("v") {
			fmt.Fprintf(c.out, "renamed '%s' -> '%s'\n", src, to)
		}
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
		if err := (copier{keep: true, recursive: true, links: true, force: true}).copy(src, to); err != nil {
			return err
		}
		return os.RemoveAll(src)
	})
}

func ln(c *call) error {
	o, err := c.parse("s|symbolic f|force n|no-dereference T v|verbose t:")
	if err != nil {
		return err
	}
	if len(o.rest) == 1 {
		o.rest = append(o.rest, ".")
	}
	if o.has("n") && len(o.rest) == 2 {
		if fi, err := os.Lstat(o.rest[1]); err == nil && fi.Mode()&fs.ModeSymlink != 0 {
			o.vals["T"] = []string{""}
		}
	}
	srcs, dst, err := targets(o)
	if err != nil {
		return err
	}
	return c.each(srcs, func(src string) error {
		to := dst(src)
		if o.has("f") {
			if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if o.has("v") {
			fmt.Fprintf(c.out, "'%s' -> '%s'\n", to, src)
		}
		if o.has("s") {
			return os.Symlink(src, to)
		}
		return os.Link(src, to)
	})
}

func touch(c *call) error {
	o, err := c.parse("c|no-create a m d|date: r|reference: t:")
	if err != nil {
		return err
	}
	when := time.Now()
	if d := o.val("d", ""); d != "" {
		if when, err = parseTime(d); err != nil {
			return err
		}
	}
	if r := o.val("r", ""); r != "" {
		fi, err := os.Stat(r)
		if err != nil {
			return err
		}
		when = fi.ModTime()
	}
	if v := o.val("t", ""); v != "" {
		if when, err = parseStamp(v); err != nil {
			return err
		}
	}
	accessed, modified := when, when
	switch {
	case o.has("a") && !o.has("m"):
		modified = time.Time{} // stays as it is
	case o.has("m") && !o.has("a"):
		accessed = time.Time{}
	}
	return c.each(o.rest, func(name string) error {
		if !o.has("c") {
			f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o666)
			if err != nil && !errors.Is(err, syscall.EISDIR) && !errors.Is(err, syscall.ENXIO) {
				return err
			}
			f.Close()
		}
		err := os.Chtimes(name, accessed, modified)
		if o.has("c") && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// parseStamp reads [[CC]YY]MMDDhhmm[.ss].
func parseStamp(s string) (time.Time, error) {
	layout := map[int]string{8: "01021504", 10: "0601021504", 12: "200601021504"}
	digits, sec, hasSec := strings.Cut(s, ".")
	form, text := layout[len(digits)], digits
	if len(digits) == 8 {
		form, text = layout[12], strconv.Itoa(time.Now().Year())+digits
	}
	if hasSec {
		form, text = form+"05", text+sec
	}
	t, err := time.ParseInLocation(form, text, time.Local)
	if form == "" || err != nil {
		return time.Time{}, errUsage("invalid time " + s)
	}
	return t, nil
}

func truncate(c *call) error {
	o, err := c.parse("s|size: c|no-create r|reference:")
	if err != nil {
		return err
	}
	text := o.val("s", "")
	relative := strings.TrimLeft(text, "+-")
	size, err := parseSize(relative)
	if r := o.val("r", ""); r != "" && text == "" {
		var fi fs.FileInfo
		if fi, err = os.Stat(r); err != nil {
			return err
		}
		size = fi.Size()
	}
	if err != nil {
		return errUsage("give a size with -s")
	}
	flags := os.O_WRONLY | os.O_CREATE
	if o.has("c") {
		flags = os.O_WRONLY
	}
	return c.each(o.rest, func(name string) error {
		f, err := os.OpenFile(name, flags, 0o666)
		if err != nil {
			if o.has("c") && errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		size := size
		if relative != text {
			fi, err := f.Stat()
			if err != nil {
				return errors.Join(err, f.Close())
			}
			if text[0] == '-' {
				size = -size
			}
			size = max(0, fi.Size()+size)
		}
		return errors.Join(f.Truncate(size), f.Close())
	})
}

// parseSize reads a number with a unit: 10, 4k, 1M, 2G; kB and the like are decimal.
func parseSize(s string) (int64, error) {
	i := len(s) - len(strings.TrimLeft(s, "0123456789"))
	n, err := strconv.ParseInt(s[:i], 10, 64)
	if err != nil {
		return 0, errUsage("invalid size " + s)
	}
	unit := strings.TrimSuffix(s[i:], "iB")
	base := int64(1024)
	if u, ok := strings.CutSuffix(unit, "B"); ok && u != "" {
		unit, base = u, 1000
	}
	switch unit {
	case "", "c", "B":
		return n, nil
	case "w":
		return 2 * n, nil
	case "b":
		return 512 * n, nil
	}
	p := strings.Index("KMGTPE", strings.ToUpper(unit))
	if p < 0 || len(unit) != 1 {
		return 0, errUsage("invalid size " + s)
	}
	for range p + 1 {
		if n > (1<<62)/base {
			return 0, errUsage("size too large: " + s)
		}
		n *= base
	}
	return n, nil
}

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

func mkfifo(c *call) error {
	o, err := c.parse("m|mode:")
	if err != nil {
		return err
	}
	return c.each(o.rest, func(name string) error {
		if err := unix.Mkfifo(name, 0o666); err != nil {
			return &fs.PathError{Path: name, Err: err}
		}
		if m := o.val("m", ""); m != "" {
			return changeMode(name, m)
		}
		return nil
	})
}

func mknod(c *call) error {
	o, err := c.parse("m|mode:")
	if err != nil {
		return err
	}
	if err := o.need(2); err != nil {
		return err
	}
	mode, dev := uint32(unix.S_IFIFO), 0
	if o.rest[1] != "p" {
		if err := o.need(4); err != nil {
			return err
		}
		major, err1 := strconv.ParseUint(o.rest[2], 0, 12)
		minor, err2 := strconv.ParseUint(o.rest[3], 0, 20)
		if err := errors.Join(err1, err2); err != nil {
			return errUsage("invalid device number")
		}
		dev = int(unix.Mkdev(uint32(major), uint32(minor)))
		switch o.rest[1] {
		case "c", "u":
			mode = unix.S_IFCHR
		case "b":
			mode = unix.S_IFBLK
		default:
			return errUsage("invalid type " + o.rest[1])
		}
	}
	if err := unix.Mknod(o.rest[0], mode|0o666, dev); err != nil {
		return &fs.PathError{Path: o.rest[0], Err: err}
	}
	if m := o.val("m", ""); m != "" {
		return changeMode(o.rest[0], m)
	}
	return nil
}

func mktemp(c *call) error {
	o, err := c.parse("d|directory u|dry-run p: tmpdir? t q|quiet")
	if err != nil {
		return err
	}
	tmpl := "tmp.XXXXXXXXXX"
	dir := o.val("p", o.val("tmpdir", ""))
	if dir == "" && o.has("tmpdir") {
		dir = os.TempDir()
	}
	if len(o.rest) > 0 {
		tmpl = o.rest[0]
	} else if dir == "" {
		dir = os.TempDir()
	}
	if o.has("t") && dir == "" {
		dir = os.TempDir()
	}
	end := strings.LastIndexByte(tmpl, 'X') + 1
	start := len(strings.TrimRight(tmpl[:end], "X"))
	if end-start < 3 {
		return errUsage("too few X's in " + tmpl)
	}
	full := filepath.Join(dir, tmpl[:start])
	if start == 0 || dir == "" {
		full = tmpl[:start]
		if dir != "" {
			full = dir + "/"
		}
	}
	pat := filepath.Base(full + "x")[:len(filepath.Base(full+"x"))-1] + "*" + tmpl[end:]
	parent := filepath.Dir(full + "x")
	var name string
	if o.has("d") {
		name, err = os.MkdirTemp(parent, pat)
	} else {
		var f *os.File
		if f, err = os.CreateTemp(parent, pat); err == nil {
			name = f.Name()
			f.Close()
		}
	}
	if err != nil {
		if o.has("q") {
			return errExit(1)
		}
		return err
	}
	real := name
	if dir == "" && !strings.Contains(tmpl, "/") {
		name = filepath.Base(name)
	}
	fmt.Fprintln(c.out, name)
	if o.has("u") {
		return os.Remove(real)
	}
	return nil
}

func readlink(c *call) error {
	o, err := c.parse("f|canonicalize e n|no-newline")
	if err != nil {
		return err
	}
	if o.has("f") || o.has("e") {
		return c.real(o.rest, o.has("e"))
	}
	return c.each(o.rest, func(name string) error {
		target, err := os.Readlink(name)
		if err != nil {
			return errExit(1)
		}
		c.out.WriteString(target)
		if !o.has("n") {
			c.out.WriteByte('\n')
		}
		return nil
	})
}

func realpath(c *call) error {
	o, err := c.parse("e q")
	if err != nil {
		return err
	}
	if o.has("q") {
		c.err = io.Discard
	}
	return c.real(o.rest, o.has("e"))
}

// real prints the path without links; its last part need not exist.
func (c *call) real(names []string, all bool) error {
	return c.each(names, func(name string) error {
		abs, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		p, err := filepath.EvalSymlinks(abs)
		if errors.Is(err, fs.ErrNotExist) && !all {
			if p, err = filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
				p = filepath.Join(p, filepath.Base(abs))
			}
		}
		if err != nil {
			return err
		}
		fmt.Fprintln(c.out, p)
		return nil
	})
}

func basename(c *call) error {
	o, err := c.parse("a s|suffix:")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	suffix, names := o.val("s", ""), o.rest
	if !o.has("a") && !o.has("s") && len(names) == 2 {
		suffix, names = names[1], names[:1]
	}
	for _, n := range names {
		b := filepath.Base(n)
		if b != suffix {
			b = strings.TrimSuffix(b, suffix)
		}
		fmt.Fprintln(c.out, b)
	}
	return nil
}

func dirname(c *call) error {
	o, err := c.parse("")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	for _, n := range o.rest {
		fmt.Fprintln(c.out, filepath.Dir(strings.TrimRight(n, "/")+map[bool]string{true: "/"}[strings.Trim(n, "/") == ""]))
	}
	return nil
}
