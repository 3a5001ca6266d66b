package boxfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
)

// Archive writes what a box's own layer holds as a layer of an image: with the owners, modes, links and attributes that the guest sees,
// and with OCI's marks for what it hides of the image below. Names for which skip is true are left out with all below them; they are
// relative to the layer's root. A layer that its box writes to meanwhile gives what was there when each file's turn came.
func Archive(ctx context.Context, root *os.File, w io.Writer, skip func(name string) bool) error {
	fd, err := unix.Openat(int(root.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the layer: %w", err)
	}
	a := &archiver{ctx: ctx, t: &tree{root: fd}, w: tar.NewWriter(w), skip: skip, links: map[uint64]string{}}
	if err := a.dir(fd, ""); err != nil {
		return err
	}
	return a.w.Close()
}

type archiver struct {
	ctx   context.Context
	t     *tree
	w     *tar.Writer
	skip  func(string) bool
	links map[uint64]string // first names of files that have several, by inode
}

// dir writes what is in an open directory, and closes it.
func (a *archiver) dir(fd int, name string) error {
	d := os.NewFile(uintptr(fd), name)
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read %q of the layer: %w", name, err)
	}
	slices.Sort(names)
	for _, n := range names {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		full := path.Join(name, n)
		if a.t.reserved(n) || a.skip(full) {
			continue
		}
		if strings.HasPrefix(n, ".wh.") {
			return fmt.Errorf("file %q of the layer: names that begin with .wh. mean that something is deleted in layers of images: rename or remove it", full)
		}
		if err := a.entry(fd, n, full); err != nil && !errors.Is(err, unix.ENOENT) { // gone meanwhile
			return fmt.Errorf("file %q of the layer: %w", full, err)
		}
	}
	return nil
}

func (a *archiver) entry(dir int, name, full string) error {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	fd, err := unix.Openat(dir, name, flags, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), full)
	st, err := a.t.stat(fd)
	if err != nil {
		f.Close()
		return err
	}
	h := &tar.Header{Name: full, Mode: int64(st.Mode & 0o7777), Uid: int(st.UID), Gid: int(st.GID), ModTime: time.Unix(st.Mtime.Sec, int64(st.Mtime.Nsec)),
		Format: tar.FormatPAX}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return a.directory(f, full, h)
	}
	defer f.Close()
	if isWhiteout(linux.FileMode(st.Mode), st.RdevMajor, st.RdevMinor) {
		return a.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path.Join(path.Dir(full), ".wh."+name), Mode: 0o644})
	}
	if first, ok := a.links[st.Ino]; ok && st.Nlink > 1 {
		return a.w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: full, Linkname: first})
	}
	if err := a.attributes(fd, h); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := io.ReadAll(io.LimitReader(f, unix.PathMax))
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(target)
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(st.RdevMajor), int64(st.RdevMinor)
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
	default:
		h.Typeflag, h.Size = tar.TypeReg, int64(st.Size)
	}
	if st.Nlink > 1 {
		a.links[st.Ino] = full
	}
	if err := a.w.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	n, err := io.Copy(a.w, io.LimitReader(f, h.Size))
	if err == nil && n < h.Size {
		// It was made shorter meanwhile; what it said it would be is kept.
		_, err = io.CopyN(a.w, zeros{}, h.Size-n)
	}
	return err
}

// directory writes a directory and what is in it.
func (a *archiver) directory(f *os.File, full string, h *tar.Header) error {
	h.Typeflag, h.Name = tar.TypeDir, full+"/"
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err == nil {
		err = a.attributes(int(f.Fd()), h)
	}
	if _, has := h.PAXRecords[xattrRecord+opaqueAttr]; has {
		st.Mode |= opaqueBit // a layer from before the bit was used
		delete(h.PAXRecords, xattrRecord+opaqueAttr)
	}
	if err == nil {
		err = a.w.WriteHeader(h)
	}
	if err == nil && st.Mode&opaqueBit != 0 {
		err = a.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path.Join(full, ".wh..wh..opq"), Mode: 0o644})
	}
	if err != nil {
		f.Close()
		return err
	}
	// A descriptor of its own: os.File has this one in its own mode.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	f.Close()
	if err != nil {
		return err
	}
	return a.dir(fd, full)
}

// attributes adds the guest's own extended attributes.
func (a *archiver) attributes(fd int, h *tar.Header) error {
	buf := make([]byte, 65536)
	n, err := unix.Flistxattr(fd, buf)
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		own, ok := strings.CutPrefix(name, guestAttrs)
		if !ok {
			continue
		}
		if strings.Contains(own, "=") {
			return fmt.Errorf("its attribute %q has a name that layers of images cannot hold: remove it", own)
		}
		value := make([]byte, maxAttr)
		n, err := unix.Fgetxattr(fd, name, value)
		if errors.Is(err, unix.ENODATA) {
			continue // gone meanwhile
		}
		if err != nil {
			return err
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+own] = string(value[:n])
	}
	return nil
}

// xattrRecord begins the names of PAX records that hold extended attributes.
const xattrRecord = "SCHILY.xattr."

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
