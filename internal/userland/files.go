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
