package image

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxArchiveEntries bounds how many files an archive of images may hold: a few per layer.
const maxArchiveEntries = 1 << 16

// openContainer finds out what a source is, and opens it.
func openContainer(ctx context.Context, src Source, st *stage, limits Limits, meta *budget) (container, error) {
	if src.Path != "" {
		fi, err := os.Stat(src.Path)
		if err != nil {
			return nil, err
		}
		if fi.IsDir() {
			return openDir(src.Path)
		}
	}
	f, owned, err := openArchive(ctx, src, st, limits)
	if err != nil {
		return nil, err
	}
	a, err := readArchive(ctx, f, meta)
	if err != nil {
		if owned {
			f.Close()
		}
		return nil, err
	}
	return a, nil
}

// openArchive returns an unpacked tar file to seek in. Streams and compressed files are copied into the stage.
func openArchive(ctx context.Context, src Source, st *stage, limits Limits) (f *os.File, owned bool, err error) {
	in, closeIn, err := openStream(ctx, src)
	if err != nil {
		return nil, false, err
	}
	buf := bufio.NewReaderSize(in, 256<<10)
	kind, err := compressionOf(buf)
	if err != nil {
		closeIn()
		return nil, false, err
	}
	if file, ok := in.(*os.File); ok && kind == "" {
		if _, err := file.Seek(0, io.SeekStart); err == nil {
			return file, true, nil
		}
	}
	defer closeIn()
	plain, closePlain, err := unpack(buf, kind)
	if err != nil {
		return nil, false, err
	}
	defer closePlain()
	tmp, err := st.temp()
	if err != nil {
		return nil, false, err
	}
	r := &countingReader{r: ctxReader{ctx, plain}, left: limits.Bytes}
	if _, err := io.Copy(tmp, r); err != nil {
		tmp.Close()
		return nil, false, fmt.Errorf("unpack: %w", err)
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		tmp.Close()
		return nil, false, err
	}
	return tmp, true, nil
}

// openStream opens the path, or takes the stream, of a source. Only a plain file is handed out as it is: a stream's position is the
// caller's, and it may stall.
func openStream(ctx context.Context, src Source) (io.Reader, func(), error) {
	if src.Path == "" {
		if src.Reader == nil {
			return nil, nil, errors.New("no path and no stream given")
		}
		a := newReadAhead(ctx, src.Reader)
		return a, a.leave, nil
	}
	f, err := os.Open(src.Path)
	if err != nil {
		return nil, nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		a := newReadAhead(ctx, f)
		return a, func() { a.leave(); f.Close() }, nil
	}
	return f, func() { f.Close() }, nil
}

// ctxReader ends a long copy when its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// dirContainer is a directory. It is read through an [os.Root], so that no link in it leads anywhere else.
type dirContainer struct{ root *os.Root }

func openDir(dir string) (container, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	c := dirContainer{root}
	if c.has(fileIndex) || c.has(fileManifest) {
		return c, nil
	}
	root.Close()
	return nil, fmt.Errorf("%w: the directory has neither %s nor %s; a root file system is taken by import", ErrFormat, fileIndex, fileManifest)
}

func (c dirContainer) Close() error { return c.root.Close() }

func (c dirContainer) has(name string) bool {
	_, err := c.root.Stat(name)
	return err == nil
}

func (c dirContainer) open(name string) (io.ReadCloser, error) {
	// Without O_NONBLOCK a named pipe in the place of a blob would be waited for.
	f, err := c.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s is no regular file", quoteName(name))
	}
	return f, nil
}

// archive is a tar file whose members are read where they stand.
type archive struct {
	f       *os.File
	members map[string]member
	rootfs  bool // looks like a root file system
}

type member struct {
	off, size int64
	link      string // of a link: the name in the archive that it stands for
}

// readArchive lists the members of a tar file.
func readArchive(ctx context.Context, f *os.File, meta *budget) (*archive, error) {
	a := &archive{f: f, members: map[string]member{}}
	tr := tar.NewReader(f)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			if n == 0 {
				return nil, fmt.Errorf("%w: it is no tar archive (%w)", ErrFormat, err)
			}
			return nil, fmt.Errorf("read tar: %w", err)
		}
		name, link := cleanMember(hdr.Name), ""
		switch top, _, _ := strings.Cut(name, "/"); top {
		case "bin", "etc", "usr", "sbin", "lib":
			a.rootfs = true
		}
		if n >= maxArchiveEntries {
			if a.rootfs {
				break
			}
			return nil, fmt.Errorf("more than %d members: %w", maxArchiveEntries, ErrTooLarge)
		}
		switch hdr.Typeflag {
		case tar.TypeSymlink:
			// Old `docker save` wrote a layer that two images share once, and links to it.
			link = cleanMember(path.Join(path.Dir(name), hdr.Linkname))
		case tar.TypeLink:
			link = cleanMember(hdr.Linkname)
		}
		if err := meta.take(len(name) + len(link)); err != nil {
			return nil, err
		}
		switch hdr.Typeflag {
		case tar.TypeReg, tar.TypeCont:
			// The reader has taken the header and nothing more, so the file stands at the contents.
			off, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			a.members[name] = member{off: off, size: hdr.Size}
		case tar.TypeSymlink, tar.TypeLink:
			a.members[name] = member{link: link}
		}
	}
	if a.has(fileIndex) || a.has(fileManifest) {
		return a, nil
	}
	hint := ""
	if a.rootfs {
		hint = "; it looks like a root file system, which import takes"
	}
	return nil, fmt.Errorf("%w: the archive has neither %s nor %s%s", ErrFormat, fileIndex, fileManifest, hint)
}

// cleanMember gives a member's name the one form that it is looked up by, as a string of its own: what the archive says may be a
// MiB of dots. It is only ever a key, never a path on the host.
func cleanMember(name string) string {
	return strings.Clone(strings.TrimPrefix(path.Clean("/"+name), "/"))
}

func (a *archive) Close() error { return a.f.Close() }

func (a *archive) find(name string) (member, bool) {
	name = cleanMember(name)
	for range 8 {
		m, ok := a.members[name]
		if !ok || m.link == "" {
			return m, ok
		}
		name = m.link
	}
	return member{}, false
}

func (a *archive) has(name string) bool {
	_, ok := a.find(name)
	return ok
}

func (a *archive) open(name string) (io.ReadCloser, error) {
	m, ok := a.find(name)
	if !ok {
		return nil, fmt.Errorf("%s is not in the archive: %w", quoteName(name), fs.ErrNotExist)
	}
	return io.NopCloser(io.NewSectionReader(a.f, m.off, m.size)), nil
}

// readFile reads a member that should be small.
func readFile(c container, name string, limit int64) ([]byte, error) {
	f, err := c.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readAllBounded(f, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", quoteName(name), err)
	}
	return b, nil
}
