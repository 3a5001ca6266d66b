package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tarDir streams a directory as a tar archive, sorted by name. It is read through an [os.Root]: links are stored, never followed,
// and no race of whoever may write there leads out of it.
func tarDir(ctx context.Context, dir string) (io.Reader, func(), error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, err
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d := dirTar{ctx: ctx, root: root, w: tar.NewWriter(pw), links: map[fileKey]string{}}
		err := d.add(".")
		if err == nil {
			err = d.w.Close()
		}
		pw.CloseWithError(err)
	}()
	return pr, func() { pr.Close(); <-done; root.Close() }, nil
}

type fileKey struct{ dev, ino uint64 }

type dirTar struct {
	ctx   context.Context
	root  *os.Root
	w     *tar.Writer
	links map[fileKey]string
}

// add writes one file, and what is below it.
func (d *dirTar) add(name string) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	fi, err := d.root.Lstat(name)
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil // means nothing without the one who listens
	}
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = d.root.Readlink(name); err != nil {
			return err
		}
	}
	hdr, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	hdr.Format, hdr.Name = tar.FormatPAX, name
	hdr.Uname, hdr.Gname = "", "" // names of this host
	// The same tree gives the same layer, whoever has looked at it or copied it.
	hdr.AccessTime, hdr.ChangeTime = time.Time{}, time.Time{}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && !fi.IsDir() && st.Nlink > 1 {
		key := fileKey{uint64(st.Dev), st.Ino}
		if first, ok := d.links[key]; ok {
			hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeLink, first, 0
			return d.w.WriteHeader(hdr)
		}
		d.links[key] = name
	}
	switch {
	case fi.Mode().IsRegular():
		return d.addFile(name, hdr)
	case fi.IsDir():
		return d.addDir(name, hdr)
	}
	return d.w.WriteHeader(hdr)
}

func (d *dirTar) addFile(name string, hdr *tar.Header) error {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fileXattrs(f, hdr); err != nil {
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	if err := d.w.WriteHeader(hdr); err != nil {
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	if _, err := io.CopyN(d.w, f, hdr.Size); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("it shrank while it was read; import again when nothing writes there")
		}
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	return nil
}

func (d *dirTar) addDir(name string, hdr *tar.Header) error {
	f, err := d.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	err = fileXattrs(f, hdr)
	var entries []fs.DirEntry
	if err == nil {
		// Not through the root's FS, to which only UTF-8 is a name.
		entries, err = f.ReadDir(-1)
	}
	f.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	hdr.Name += "/"
	if err := d.w.WriteHeader(hdr); err != nil {
		return fmt.Errorf("%s: %w", quoteName(name), err)
	}
	for _, e := range entries {
		if err := d.add(path.Join(name, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
