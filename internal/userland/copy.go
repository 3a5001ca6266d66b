package userland

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

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
