package agent

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

const paxXattr = "SCHILY.xattr."

func statFile(req wire.PathRequest) (wire.FileInfo, error) {
	p := filepath.Join("/", req.Path)
	if req.Follow {
		r, err := filepath.EvalSymlinks(p)
		if err != nil {
			return wire.FileInfo{}, fileError(err)
		}
		p = r
	}
	fi, err := os.Lstat(p)
	if err != nil {
		return wire.FileInfo{}, fileError(err)
	}
	out := wire.FileInfo{Path: p, Name: fi.Name(), Size: fi.Size(), Mode: uint32(fi.Mode()), ModTime: fi.ModTime()}
	var st unix.Stat_t
	if unix.Lstat(p, &st) == nil {
		out.UID, out.GID = st.Uid, st.Gid
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		out.Link, _ = os.Readlink(p)
	}
	return out, nil
}

func (a *Agent) tarOut(h wire.Header, s *wire.Stream) {
	defer s.Close()
	w := wire.NewChunkWriter(s)
	var req wire.PathRequest
	err := decode(h, &req)
	if err == nil {
		err = writeTar(w, req)
	}
	_ = w.Finish(err) // the client may be gone
}

// writeTar archives a file or a tree. Names begin with the last element of the path that was asked for. Sockets are left out,
// as nothing could be made of them; so is what vanishes while it is read.
func writeTar(w io.Writer, req wire.PathRequest) error {
	root := filepath.Join("/", req.Path)
	base := path.Base(root)
	if base == "/" {
		base = "."
	}
	if req.Follow {
		r, err := filepath.EvalSymlinks(root)
		if err != nil {
			return fileError(err)
		}
		root = r
	}
	if _, err := os.Lstat(root); err != nil {
		return fileError(err)
	}
	return fileError(writeTree(w, root, base))
}

// writeTree archives what is at root under the name base.
func writeTree(w io.Writer, root, base string) error {
	t := &tarWriter{tw: tar.NewWriter(w), links: make(map[[2]uint64]string)}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err == nil {
			rel, _ := filepath.Rel(root, p)
			err = t.add(p, path.Join(base, rel))
		}
		if err == nil && root == "/" && ofKernel(p) {
			return fs.SkipDir
		}
		if p != root && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	return t.tw.Close()
}

// ofKernel tells the mounts of every box whose content is none of its files, and has no end.
func ofKernel(p string) bool {
	if p != "/proc" && p != "/sys" && p != "/dev" {
		return false
	}
	var st, root unix.Stat_t
	return unix.Lstat(p, &st) == nil && unix.Lstat("/", &root) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Dev != root.Dev
}

type tarWriter struct {
	tw    *tar.Writer
	links map[[2]uint64]string // first name of a file that has several
}

func (t *tarWriter) add(p, name string) error {
	fi, err := os.Lstat(p)
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	var link string
	if fi.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(p); err != nil {
			return err
		}
	}
	var f *os.File
	if fi.Mode().IsRegular() {
		// Not following and not blocking: it may be something else by now.
		if f, err = os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		defer f.Close()
		if fi, err = f.Stat(); err != nil {
			return err
		}
	}
	hdr, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return fmt.Errorf("archive %s: %w", p, err)
	}
	hdr.Name = name
	if fi.IsDir() {
		hdr.Name += "/"
	}
	hdr.Format = tar.FormatPAX
	hdr.Uname, hdr.Gname = "", "" // names of the box mean nothing elsewhere
	hdr.AccessTime, hdr.ChangeTime = time.Time{}, time.Time{}
	var st unix.Stat_t
	if unix.Lstat(p, &st) == nil && st.Nlink > 1 && fi.Mode().IsRegular() {
		key := [2]uint64{st.Dev, st.Ino}
		if first, ok := t.links[key]; ok {
			hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeLink, first, 0
			return t.tw.WriteHeader(hdr)
		}
		t.links[key] = name
	}
	if fi.Mode().IsRegular() || fi.IsDir() {
		for k, v := range xattrs(p) {
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = make(map[string]string)
			}
			hdr.PAXRecords[paxXattr+k] = v
		}
	}
	var content io.Reader = f
	if hdr.Typeflag == tar.TypeReg && hdr.Size == 0 {
		// Files of /proc and /sys do not know their size.
		b, err := io.ReadAll(io.LimitReader(f, maxUnsized+1))
		if err != nil {
			return fmt.Errorf("archive %s: %w", p, err)
		}
		if hdr.Size = int64(len(b)); hdr.Size > maxUnsized {
			return fmt.Errorf("archive %s: it says that it is empty and has more than %d bytes: save it to a file first", p, maxUnsized)
		}
		content = bytes.NewReader(b)
	}
	if err := t.tw.WriteHeader(hdr); err != nil {
		return fmt.Errorf("archive %s: %w", p, err)
	}
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	// A file that grows is cut at the size it had; one that shrinks would leave the archive broken.
	n, err := io.CopyN(t.tw, content, hdr.Size)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("archive %s: it became shorter while it was read (%d of %d bytes)", p, n, hdr.Size)
	}
	return err
}

// maxUnsized bounds what is held in memory of a file that does not tell its size.
const maxUnsized = 4 << 20

func xattrs(p string) map[string]string {
	size, err := unix.Llistxattr(p, nil)
	if err != nil || size <= 0 {
		return nil
	}
	buf := make([]byte, size)
	if size, err = unix.Llistxattr(p, buf); err != nil {
		return nil
	}
	out := make(map[string]string)
	for name := range strings.SplitSeq(strings.TrimRight(string(buf[:size]), "\x00"), "\x00") {
		val := make([]byte, 64<<10)
		if n, err := unix.Lgetxattr(p, name, val); err == nil {
			out[name] = string(val[:n])
		}
	}
	return out
}

func (a *Agent) tarIn(h wire.Header, s *wire.Stream) {
	var req wire.TarInRequest
	err := decode(h, &req)
	if err == nil {
		var owner *identity
		if req.Owner != "" {
			id, lerr := a.users.lookup(req.Owner)
			owner, err = &id, lerr
		}
		if err == nil {
			err = readTar(wire.NewChunkReader(s), req, owner)
		}
	}
	wire.Reply(s, nil, fileError(err))
}

// readTar unpacks an archive. Everything happens below the destination as the kernel sees it at that moment: neither a name
// with "..", nor a symlink in the archive or already in the box, leads out of it. An absolute symlink met on the way counts as
// leading out.
func readTar(r io.Reader, req wire.TarInRequest, owner *identity) error {
	dest := filepath.Join("/", req.Path)
	if req.Mkdir {
		if err := os.MkdirAll(dest, 0o755); err != nil {
			return err
		}
	}
	root, err := os.OpenRoot(dest)
	if err != nil {
		return err
	}
	defer root.Close()
	t := &tarReader{root: root, opt: req.TarInOptions, owner: owner, dirs: make(map[string]*tar.Header)}
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if err := t.extract(hdr, tr); err != nil {
			return fmt.Errorf("unpack %s: %w", hdr.Name, err)
		}
	}
	// What follows the archive's end belongs to it still, and the sender must be able to send it.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	// Directories get their times last, or their content would change them; the deepest first.
	names := slices.SortedFunc(maps.Keys(t.dirs), func(a, b string) int { return len(b) - len(a) })
	for _, n := range names {
		if err := t.attributes(n, t.dirs[n]); err != nil {
			return fmt.Errorf("unpack %s: %w", n, err)
		}
	}
	return nil
}

type tarReader struct {
	root  *os.Root
	opt   wire.TarInOptions
	owner *identity
	dirs  map[string]*tar.Header
}

func (t *tarReader) extract(hdr *tar.Header, r io.Reader) error {
	name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
	if name == "" {
		name = "."
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if dir := path.Dir(name); dir != "." {
		if err := t.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	old, err := t.root.Lstat(name)
	if err == nil {
		isDir := hdr.Typeflag == tar.TypeDir
		if old.IsDir() && isDir {
			t.dirs[name] = hdr
			return nil
		}
		if t.opt.NoOverwriteDir && old.IsDir() != isDir {
			return errors.New("cannot replace a directory by something else, or the other way round")
		}
		if name == "." {
			return errors.New("destination is a directory and the archive's entry is not")
		}
		if old.IsDir() {
			err = t.root.RemoveAll(name)
		} else {
			err = t.root.Remove(name)
		}
		if err != nil {
			return err
		}
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := t.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		t.dirs[name] = hdr
		return nil
	case tar.TypeReg:
		f, err := t.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := t.root.Symlink(hdr.Linkname, name); err != nil {
			return err
		}
	case tar.TypeLink:
		// The other name has its attributes already.
		return t.root.Link(strings.TrimPrefix(path.Clean("/"+hdr.Linkname), "/"), name)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		if err := t.mknod(name, hdr); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown kind of entry %q", hdr.Typeflag)
	}
	return t.attributes(name, hdr)
}

func (t *tarReader) mknod(name string, hdr *tar.Header) error {
	dir, err := t.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[hdr.Typeflag]
	return unix.Mknodat(int(dir.Fd()), path.Base(name), kind|0o600, int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))))
}

// attributes sets owner before mode, as a change of owner clears the set-id bits.
func (t *tarReader) attributes(name string, hdr *tar.Header) error {
	uid, gid := hdr.Uid, hdr.Gid
	if t.owner != nil {
		uid, gid = int(t.owner.uid), int(t.owner.gid)
	}
	if err := t.root.Lchown(name, uid, gid); err != nil && !(errors.Is(err, fs.ErrPermission) && t.owner == nil) {
		return err
	}
	if hdr.Typeflag == tar.TypeSymlink {
		return nil
	}
	if err := t.root.Chmod(name, hdr.FileInfo().Mode()); err != nil {
		return err
	}
	t.setXattrs(name, hdr)
	if hdr.ModTime.IsZero() || hdr.Typeflag != tar.TypeReg && hdr.Typeflag != tar.TypeDir {
		return nil
	}
	return t.root.Chtimes(name, hdr.ModTime, hdr.ModTime)
}

// setXattrs sets what the file system takes: an archive from elsewhere may hold attributes that mean nothing here.
func (t *tarReader) setXattrs(name string, hdr *tar.Header) {
	var f *os.File
	for k, v := range hdr.PAXRecords {
		attr, ok := strings.CutPrefix(k, paxXattr)
		if !ok || hdr.Typeflag != tar.TypeReg && hdr.Typeflag != tar.TypeDir {
			continue
		}
		if f == nil {
			var err error
			if f, err = t.root.Open(name); err != nil {
				return
			}
			defer f.Close()
		}
		_ = unix.Fsetxattr(int(f.Fd()), attr, []byte(v), 0)
	}
}
