package boxfs

import (
	"errors"
	"io"
	"math"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
	"gvisor.dev/gvisor/pkg/marshal/primitive"
)

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// opened implements [lisafs.OpenFDImpl].
type opened struct {
	lisafs.OpenFD
	t   *tree
	fd  int
	ino *inode // nil: no quota
}

var _ lisafs.OpenFDImpl = (*opened)(nil)

// Open implements [lisafs.ControlFDImpl]. Only plain files and directories are ever opened on the host.
func (f *file) Open(flags uint32) (*lisafs.OpenFD, int, error) {
	var fd int
	var err error
	switch {
	case f.IsDir():
		// A description of its own: reading a directory moves its offset.
		fd, err = unix.Openat(f.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	case !f.IsRegular():
		return nil, -1, unix.EPERM
	case f.t.o.Host:
		const keep = unix.O_ACCMODE | unix.O_TRUNC | unix.O_APPEND | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC
		fd, err = reopen(f.fd, int(flags&keep)|unix.O_NONBLOCK)
	default:
		open := func() error {
			fd, err = reopen(f.fd, int(flags&(unix.O_ACCMODE|unix.O_TRUNC))|unix.O_NONBLOCK)
			return err
		}
		if flags&unix.O_TRUNC != 0 {
			err = f.t.o.Quota.extend(f.ino, f.fd, 0, open)
		} else {
			err = open()
		}
	}
	if err != nil {
		return nil, -1, err
	}
	o, donated := f.opened(fd, flags)
	return o, donated, nil
}

// opened makes the protocol's object for an open descriptor, and a descriptor to give away if the client may have one.
func (f *file) opened(fd int, flags uint32) (*lisafs.OpenFD, int) {
	o := &opened{t: f.t, fd: fd, ino: f.t.o.Quota.again(f.ino)}
	o.OpenFD.Init(f.FD(), flags, o)
	donated := -1
	// With a quota not even for reading: an escaped kernel could keep what it has deleted.
	if f.IsRegular() && f.t.o.Quota == nil {
		// With a descriptor of its own the guest's kernel reads, writes and maps without asking; without one it asks.
		if n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil {
			donated = n
		}
	}
	return o.FD(), donated
}

// FD implements [lisafs.OpenFDImpl].
func (o *opened) FD() *lisafs.OpenFD {
	if o == nil {
		return nil
	}
	return &o.OpenFD
}

// Close implements [lisafs.OpenFDImpl].
func (o *opened) Close() {
	o.t.o.Quota.letGo(o.ino, o.fd)
	unix.Close(o.fd)
}

// Stat implements [lisafs.OpenFDImpl].
func (o *opened) Stat() (lisafs.Statx, error) { return o.t.stat(o.fd) }

// Sync implements [lisafs.OpenFDImpl].
func (o *opened) Sync() error { return unix.Fsync(o.fd) }

// Flush implements [lisafs.OpenFDImpl].
func (o *opened) Flush() error { return nil }

// Renamed implements [lisafs.OpenFDImpl].
func (o *opened) Renamed() {}

// Write implements [lisafs.OpenFDImpl].
func (o *opened) Write(b []byte, off uint64) (uint64, error) {
	if q := o.t.o.Quota; q != nil && len(b) > 0 {
		o.ino.mu.Lock()
		defer o.ino.mu.Unlock()
		n, settle, err := q.fit(o.fd, len(b), off)
		if err != nil {
			return 0, err
		}
		defer settle()
		b = b[:n]
	}
	done := 0
	for done < len(b) {
		n, err := unix.Pwrite(o.fd, b[done:], int64(off)+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return uint64(done), err
		}
		done += n
	}
	return uint64(done), nil
}

// Read implements [lisafs.OpenFDImpl].
func (o *opened) Read(b []byte, off uint64) (uint64, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Pread(o.fd, b[done:], int64(off)+int64(done))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if n == 0 {
			break
		}
		done += n
	}
	return uint64(done), nil
}

// Allocate implements [lisafs.OpenFDImpl].
func (o *opened) Allocate(mode, off, length uint64) error {
	allocate := func() error { return unix.Fallocate(o.fd, uint32(mode), int64(off), int64(length)) }
	q := o.t.o.Quota
	if q == nil {
		return allocate()
	}
	if off > math.MaxInt64 || length > math.MaxInt64-off {
		return unix.EINVAL
	}
	end := int64(off + length)
	switch mode {
	case 0, unix.FALLOC_FL_ZERO_RANGE:
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE:
		end = 0 // it adds nothing
	case unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		// What is beyond a file's end cannot be seen in its size, by which it is charged.
		return q.inside(o.ino, o.fd, end, allocate)
	default:
		return unix.EOPNOTSUPP
	}
	return q.extend(o.ino, o.fd, end, allocate)
}

// Getdent64 implements [lisafs.OpenFDImpl].
func (o *opened) Getdent64(count uint32, rewind bool, record func(lisafs.Dirent64)) error {
	if rewind {
		if _, err := unix.Seek(o.fd, 0, io.SeekStart); err != nil {
			return err
		}
	}
	return listDir(o.fd, int(count), func(e dirent) {
		if o.t.reserved(e.name) {
			return
		}
		var st unix.Stat_t
		if unix.Fstatat(o.fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return // gone meanwhile
		}
		if !o.t.o.Host && e.typ == unix.DT_REG {
			// The overlay in the guest's kernel knows a whiteout by this type.
			e.typ = uint8(hostType(st.Mode) >> 12)
		}
		record(lisafs.Dirent64{
			Ino: primitive.Uint64(e.ino), Off: primitive.Uint64(e.off), Type: primitive.Uint8(e.typ), Name: lisafs.SizedString(e.name),
			DevMinor: primitive.Uint32(unix.Minor(st.Dev)), DevMajor: primitive.Uint32(unix.Major(st.Dev)),
		})
	})
}

// GetXattr implements [lisafs.ControlFDImpl].
func (f *file) GetXattr(name string, size uint32, buf func(uint32) []byte) (uint16, error) {
	key, err := f.attr(name)
	if err != nil {
		return 0, err
	}
	if size == 0 || size > maxAttr {
		// 0 asks for the size; the client wants the whole value all the same.
		size = maxAttr
	}
	b := buf(size)
	if f.marks(name) && f.opaque() {
		return uint16(copy(b, "y")), nil
	}
	n, err := unix.Getxattr(f.attrPath(), key, b)
	if err != nil {
		return 0, err
	}
	return uint16(n), nil
}

// maxAttr is the longest value that the protocol's answer can count.
const maxAttr = 65535

// SetXattr implements [lisafs.ControlFDImpl].
func (f *file) SetXattr(name, value string, flags uint32) error {
	key, err := f.attr(name)
	if err != nil {
		return err
	}
	if f.marks(name) && value == "y" {
		return f.setOpaque(true)
	}
	return f.t.o.Quota.attribute(f.ino, f.attrPath(), key, len(value), func() error {
		return unix.Setxattr(f.attrPath(), key, []byte(value), int(flags))
	})
}

// RemoveXattr implements [lisafs.ControlFDImpl].
func (f *file) RemoveXattr(name string) error {
	key, err := f.attr(name)
	if err != nil {
		return err
	}
	if f.marks(name) && f.opaque() {
		return f.setOpaque(false)
	}
	return f.t.o.Quota.attribute(f.ino, f.attrPath(), key, -1, func() error { return unix.Removexattr(f.attrPath(), key) })
}

// attr is the host's name of a guest's attribute. In a box's layer every namespace is stored as a user attribute; of a volume
// only user attributes are shown.
func (f *file) attr(name string) (string, error) {
	if f.t.o.Host {
		if !strings.HasPrefix(name, "user.") || f.IsSymlink() {
			return "", unix.EOPNOTSUPP
		}
		return name, nil
	}
	if len(guestAttrs)+len(name) > 255 {
		return "", unix.ERANGE
	}
	return guestAttrs + name, nil
}

func (f *file) attrPath() string { return procPath(f.fd) }

// ListXattr implements [lisafs.ControlFDImpl].
func (f *file) ListXattr(uint64) (lisafs.StringArray, error) {
	if f.t.o.Host && f.IsSymlink() {
		return nil, nil
	}
	buf := make([]byte, 65536)
	n, err := unix.Listxattr(f.attrPath(), buf)
	if err != nil {
		return nil, err
	}
	var out []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if f.t.o.Host {
			if strings.HasPrefix(name, "user.") {
				out = append(out, name)
			}
		} else if own, ok := strings.CutPrefix(name, guestAttrs); ok {
			out = append(out, own)
		}
	}
	return out, nil
}
