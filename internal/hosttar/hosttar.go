// Package hosttar packs files of the host into tar archives and unpacks archives that a box has made. Those are hostile: nothing
// is ever written outside the one file or directory that was named, no link is followed, and nothing but plain files, directories
// and links is made.
package hosttar

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Unpack writes the archive below dir, with the first element of every name replaced by name; "." is dir itself. An archive of a box's
// root has no such element: with whole, name comes before the names. Links in the archive are made and never followed, nor are those
// that are there already. Files replace files; a directory and anything else never replace each other. Setuid bits, devices and owners
// are left out.
func Unpack(ctx context.Context, r io.Reader, dir, name string, whole bool) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	u := unpacker{root: root, name: name, whole: whole}
	defer u.leave()
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err != nil {
			return fmt.Errorf("archive from the box: %w", err)
		}
		if err := u.unpack(tr, h); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}

// unpacker is an archive being unpacked.
type unpacker struct {
	root  *os.Root
	name  string
	whole bool
	made  []madeDir
	// The directory of the last entry, since entries come directory by directory. No directory is ever removed here.
	in  *os.Root
	dir string
}

// madeDir is a directory that gets its mode and time when everything is in it.
type madeDir struct {
	path string
	perm fs.FileMode
	time time.Time
}

// finish does so, the deepest first: they come after those that they are in.
func (u *unpacker) finish() error {
	for _, d := range slices.Backward(u.made) {
		base, err := u.enter(d.path)
		if err != nil {
			return err
		}
		if st, err := u.in.Lstat(base); err != nil || !st.IsDir() {
			continue // the user's own doing, meanwhile
		}
		if err := errors.Join(u.in.Chtimes(base, d.time, d.time), u.in.Chmod(base, d.perm)); err != nil {
			return fmt.Errorf("unpack %s: %w", d.path, err)
		}
	}
	return nil
}

func (u *unpacker) leave() {
	if u.in != nil && u.in != u.root {
		u.in.Close()
	}
	u.in = nil
}

// enter opens the directory of a path, following no link on the way, and returns the path's last element.
func (u *unpacker) enter(p string) (string, error) {
	dir, base := filepath.Dir(p), filepath.Base(p)
	if u.in != nil && u.dir == dir {
		return base, nil
	}
	in, err := descend(u.root, dir)
	if err != nil {
		return "", err
	}
	u.leave()
	u.in, u.dir = in, dir
	return base, nil
}

// descend opens a directory below root. A root by itself only keeps links from leading out of it.
func descend(root *os.Root, dir string) (*os.Root, error) {
	if dir == "." {
		return root, nil
	}
	in := root
	for elem := range strings.SplitSeq(dir, string(filepath.Separator)) {
		next, err := enterDir(in, elem)
		if in != root {
			in.Close()
		}
		if err != nil {
			return nil, err
		}
		in = next
	}
	return in, nil
}

func enterDir(in *os.Root, elem string) (*os.Root, error) {
	want, err := in.Lstat(elem)
	if err != nil {
		return nil, err
	}
	if !want.IsDir() {
		return nil, fmt.Errorf("%s is not a directory, and no link is followed", elem)
	}
	next, err := in.OpenRoot(elem)
	if err != nil {
		return nil, err
	}
	if have, err := next.Stat("."); err != nil || !os.SameFile(want, have) {
		next.Close()
		return nil, errors.Join(fmt.Errorf("%s was replaced meanwhile", elem), err)
	}
	return next, nil
}

// place replaces the first element of an archive's name. The root keeps what is left from leading out; names that try are refused.
func (u *unpacker) place(entry string) (string, error) {
	clean := path.Clean(entry)
	if path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") {
		return "", fmt.Errorf("the archive from the box has an entry that leads out of it: %q", entry)
	}
	rest := clean
	if !u.whole {
		_, rest, _ = strings.Cut(clean, "/")
	}
	return filepath.Join(u.name, filepath.FromSlash(rest)), nil
}

func (u *unpacker) unpack(r io.Reader, h *tar.Header) error {
	switch h.Typeflag {
	case tar.TypeDir, tar.TypeReg, tar.TypeSymlink, tar.TypeLink:
	default:
		return nil // devices, pipes and sockets of a box mean nothing here
	}
	p, err := u.place(h.Name)
	if err != nil {
		return err
	}
	base, err := u.enter(p)
	if err != nil {
		return err
	}
	there, err := u.in.Lstat(base)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	perm := fs.FileMode(h.Mode).Perm()
	if h.Typeflag == tar.TypeDir {
		switch {
		case there == nil:
			if err := u.in.Mkdir(base, 0o700|perm); err != nil {
				return err
			}
			if there, err = u.in.Lstat(base); err != nil {
				return err
			}
			// The caller's umask holds for directories as for files.
			u.made = append(u.made, madeDir{p, perm & there.Mode(), h.ModTime})
		case !there.IsDir():
			return errors.New("a directory does not replace the file that is there")
		}
		return nil
	}
	var target string
	if h.Typeflag == tar.TypeLink {
		if target, err = u.place(h.Linkname); err != nil {
			return err
		}
		if target == p {
			return errors.New("a link to itself")
		}
	}
	if there != nil {
		if there.IsDir() {
			return errors.New("a file does not replace the directory that is there")
		}
		if err := u.in.Remove(base); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeSymlink:
		return u.in.Symlink(h.Linkname, base)
	case tar.TypeLink:
		return u.link(target, p)
	}
	f, err := u.in.OpenFile(base, os.O_CREATE|os.O_EXCL|os.O_WRONLY, perm)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err == nil {
		err = u.in.Chtimes(base, h.ModTime, h.ModTime)
	}
	return err
}

// link makes a hard link between two places of the tree, both without a link on their way.
func (u *unpacker) link(target, p string) error {
	in, err := descend(u.root, filepath.Dir(target))
	if err != nil {
		return err
	}
	if in != u.root {
		in.Close()
	}
	return u.root.Link(target, p)
}

// Pack writes the file or directory src to w under the given name.
func Pack(ctx context.Context, w io.Writer, src, name string, follow bool) error {
	tw := tar.NewWriter(w)
	if follow {
		real, err := filepath.EvalSymlinks(src)
		if err != nil {
			return err
		}
		src = real
	}
	err := filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		return pack(tw, p, path.Join(name, filepath.ToSlash(rel)), d)
	})
	return errors.Join(err, tw.Close())
}

func pack(tw *tar.Writer, p, name string, d fs.DirEntry) error {
	fi, err := d.Info()
	if err != nil {
		return err
	}
	link := ""
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(p); err != nil {
			return err
		}
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return nil
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name = name
	// Ids of the host mean nothing in the box: files arrive as its root's.
	h.Uid, h.Gid, h.Uname, h.Gname = 0, 0, "", ""
	h.Mode &= 0o777
	if !fi.Mode().IsRegular() {
		return tw.WriteHeader(h)
	}
	f, err := os.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	if h.Size == 0 {
		// Files of /proc and /sys do not know their size.
		content, err := io.ReadAll(io.LimitReader(f, maxUnsized+1))
		if err != nil {
			return err
		}
		if h.Size = int64(len(content)); h.Size > maxUnsized {
			return fmt.Errorf("copy %s: it says that it is empty and has more than %d bytes: save it to a file first", p, maxUnsized)
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err = tw.Write(content)
		return err
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	// A file that shrinks or grows meanwhile must not tear the archive.
	n, err := io.Copy(tw, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		_, err = io.CopyN(tw, zeros{}, h.Size-n)
	}
	return err
}

// maxUnsized bounds what is held in memory of a file that does not tell its size.
const maxUnsized = 4 << 20

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
