package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coffer-box/coffer"
	"github.com/coffer-box/coffer/internal/hosttar"
)

func (a *app) cpCmd() *cobra.Command {
	c := &cobra.Command{Use: "cp [flags] BOX:PATH PATH|-  or  PATH|- BOX:PATH", Short: "Copy files between a box and the host", Args: exactly(2, "source and destination"),
		Long: "Copy files and directories between a box and the host, as docker cp does. - is a tar archive on standard input or output.\nThe box need not run: its main process is not started for it."}
	var follow bool
	c.Flags().BoolVarP(&follow, "follow-link", "L", false, "copy what a symbolic link at the source leads to")
	c.RunE = func(c *cobra.Command, args []string) error {
		from, fp, fromBox := boxPath(args[0])
		to, tp, toBox := boxPath(args[1])
		switch {
		case fromBox && toBox:
			return errors.New("one of the two paths must be the host's")
		case fromBox:
			return a.one(c.Context(), from, func(b *coffer.Box) error { return a.copyOut(c.Context(), b, fp, tp, follow) })
		case toBox:
			return a.one(c.Context(), to, func(b *coffer.Box) error { return a.copyIn(c.Context(), b, fp, tp, follow) })
		}
		return errors.New("one of the two paths must be a box's: BOX:PATH")
	}
	return c
}

// source is what a copy takes from: in "dir/." it is what is in dir. A slash at the end follows a link, as everywhere.
func source(p string) (contents, follow bool) {
	contents = p == "." || strings.HasSuffix(p, "/.")
	return contents, contents || strings.HasSuffix(p, "/")
}

func (a *app) copyOut(ctx context.Context, b *coffer.Box, arg, dst string, follow bool) error {
	contents, link := source(arg)
	follow = follow || link
	src := path.Join("/", arg)
	if dst == "-" {
		return b.CopyOut(ctx, src, follow, a.out)
	}
	fi, err := b.Stat(ctx, src, follow)
	if err != nil {
		return err
	}
	if link && !os.FileMode(fi.Mode).IsDir() {
		return fmt.Errorf("%s is not a directory in the box", arg)
	}
	whole := src == "/"
	// A link that the user names is the user's own: what it leads to is meant.
	if real, err := filepath.EvalSymlinks(dst); err == nil {
		dst = real
	}
	dir, name := filepath.Dir(dst), filepath.Base(dst)
	st, err := os.Stat(dst)
	switch {
	case err == nil && st.IsDir():
		dir, name = dst, path.Base(src)
		if contents || whole {
			name = "."
		}
	case strings.HasSuffix(dst, "/"):
		return fmt.Errorf("directory %s does not exist", dst)
	case err == nil && os.FileMode(fi.Mode).IsDir():
		return fmt.Errorf("%s is a directory in the box and %s is a file here", arg, dst)
	}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := b.CopyOut(ctx, src, follow, w)
		w.CloseWithError(err)
		done <- err
	}()
	err = hosttar.Unpack(ctx, r, dir, name, whole)
	r.CloseWithError(err)
	if cerr := <-done; err == nil {
		err = cerr
	}
	return err
}

func (a *app) copyIn(ctx context.Context, b *coffer.Box, src, dst string, follow bool) error {
	if src == "-" {
		return b.CopyIn(ctx, dst, a.in)
	}
	contents, link := source(src)
	follow = follow || link
	stat := os.Lstat
	if follow {
		stat = os.Stat
	}
	st, err := stat(src)
	if err != nil {
		return err
	}
	// ".." and "/" are directories with a name, or none.
	real, err := filepath.Abs(src)
	if err != nil {
		return err
	}
	dir, name := path.Dir(path.Clean(dst)), path.Base(dst)
	if fi, err := b.Stat(ctx, dst, true); err == nil && os.FileMode(fi.Mode).IsDir() {
		if dir, name = dst, filepath.Base(real); contents || name == "/" {
			dir, name = dst, "."
		}
	} else if err == nil && st.IsDir() {
		return fmt.Errorf("%s is a directory here and %s is a file in the box", src, dst)
	} else if strings.HasSuffix(dst, "/") {
		return fmt.Errorf("directory %s does not exist in the box", dst)
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(hosttar.Pack(ctx, w, real, name, follow)) }()
	err = b.CopyIn(ctx, dir, r)
	r.CloseWithError(err)
	return err
}
