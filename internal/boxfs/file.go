package boxfs

import (
	"errors"
	"math"
	"strings"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// file implements [lisafs.ControlFDImpl]: one object, held open.
type file struct {
	lisafs.ControlFD
	t   *tree
	fd  int    // in a box's layer readable, and writable if it is a plain file; of a volume whatever could be had
	ino *inode // nil: no quota
}

var _ lisafs.ControlFDImpl = (*file)(nil)

// FD implements [lisafs.ControlFDImpl].
func (f *file) FD() *lisafs.ControlFD {
	if f == nil {
		return nil
	}
	return &f.ControlFD
}

// Close implements [lisafs.ControlFDImpl].
func (f *file) Close() {
	f.t.o.Quota.letGo(f.ino, f.fd)
	unix.Close(f.fd)
}

// Stat implements [lisafs.ControlFDImpl].
func (f *file) Stat() (lisafs.Statx, error) { return f.t.stat(f.fd) }

// reserved tells the names that the layer keeps for itself; a guest can neither see nor make them.
func (t *tree) reserved(name string) bool { return !t.o.Host && strings.HasPrefix(name, tmpPrefix) }

const tmpPrefix = ".coffer-tmp-"

// openAt opens a child without following a link or waiting for a peer.
func (t *tree) openAt(dir int, name string) (int, error) {
	if t.reserved(name) {
		return -1, unix.ENOENT
	}
	const flags = unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	if !t.o.Host {
		fd, err := unix.Openat(dir, name, flags|unix.O_RDWR, 0)
		if err == unix.EISDIR {
			fd, err = unix.Openat(dir, name, flags|unix.O_RDONLY|unix.O_DIRECTORY, 0)
		}
		return fd, err
	}
	// O_PATH never touches a device, pipe or socket; what may be opened is opened from it on demand.
	return unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// child makes the protocol's object for an open child.
func (f *file) child(fd int, name string, mode uint16) *file {
	c := &file{t: f.t, fd: fd, ino: f.t.o.Quota.hold(fd)}
	parent := f.Node()
	var node *lisafs.Node
	parent.WithChildrenMu(func() {
		if node = parent.LookupChildLocked(name); node == nil {
			node = &lisafs.Node{}
			node.InitLocked(name, parent)
		} else {
			node.IncRef()
		}
	})
	c.ControlFD.Init(f.Conn(), node, linux.FileMode(mode), c)
	return c
}

// Walk implements [lisafs.ControlFDImpl].
func (f *file) Walk(name string) (*lisafs.ControlFD, lisafs.Statx, error) {
	fd, err := f.t.openAt(f.fd, name)
	if err != nil {
		return nil, lisafs.Statx{}, err
	}
	return f.finish(fd, name)
}

// finish turns a freshly opened child into an answer.
func (f *file) finish(fd int, name string) (*lisafs.ControlFD, lisafs.Statx, error) {
	st, err := f.t.stat(fd)
	if err != nil {
		unix.Close(fd)
		return nil, lisafs.Statx{}, err
	}
	return f.child(fd, name, st.Mode).FD(), st, nil
}

// WalkStat implements [lisafs.ControlFDImpl].
func (f *file) WalkStat(path lisafs.StringArray, record func(lisafs.Statx)) error {
	cur := f.fd
	defer func() {
		if cur != f.fd {
			unix.Close(cur)
		}
	}()
	if len(path) > 0 && path[0] == "" {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		record(st)
		path = path[1:]
	}
	for _, name := range path {
		if !f.IsDir() && cur == f.fd {
			return nil
		}
		fd, err := f.t.openAt(cur, name)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		if err != nil {
			return err
		}
		if cur != f.fd {
			unix.Close(cur)
		}
		cur = fd
		st, err := f.t.stat(fd)
		if err != nil {
			return err
		}
		record(st)
		// Only directories are walked through; a link is the guest's to resolve, inside its own root.
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil
		}
	}
	return nil
}

// writable returns a descriptor for changing a file's content, and a function to let go of it.
func (f *file) writable() (int, func(), error) {
	if !f.t.o.Host {
		return f.fd, func() {}, nil
	}
	fd, err := reopen(f.fd, unix.O_WRONLY|unix.O_NONBLOCK)
	if err != nil {
		return -1, nil, err
	}
	return fd, func() { unix.Close(fd) }, nil
}

// SetStat implements [lisafs.ControlFDImpl].
func (f *file) SetStat(req lisafs.SetStatReq) (failed uint32, failure error) {
	try := func(mask uint32, change func() error) {
		if req.Mask&mask == 0 {
			return
		}
		if err := change(); err != nil {
			failed |= req.Mask & mask
			failure = err
		}
	}
	try(unix.STATX_SIZE, func() error {
		fd, done, err := f.writable()
		if err != nil {
			return err
		}
		defer done()
		return f.t.o.Quota.extend(f.ino, fd, int64(req.Size), func() error { return unix.Ftruncate(fd, int64(req.Size)) })
	})
	// Owners before modes: a change of owner clears setuid on the host, and the guest's kernel asks for both in the end state.
	try(unix.STATX_UID|unix.STATX_GID, func() error { return f.chown(req) })
	try(unix.STATX_MODE, func() error { return f.chmod(req.Mode &^ unix.S_IFMT) })
	try(unix.STATX_ATIME|unix.STATX_MTIME, func() error { return f.utimes(req) })
	return failed, failure
}

func (f *file) chown(req lisafs.SetStatReq) error {
	if f.t.o.Host {
		uid, gid := -1, -1
		if req.Mask&unix.STATX_UID != 0 {
			uid = int(uint32(req.UID) + f.t.o.IDOffset)
		}
		if req.Mask&unix.STATX_GID != 0 {
			gid = int(uint32(req.GID) + f.t.o.IDOffset)
		}
		err := unix.Fchownat(f.fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) {
			return unix.EPERM // an id that has no place in this user namespace: programs know what that means
		}
		return err
	}
	return f.change(func(m *meta) {
		if req.Mask&unix.STATX_UID != 0 {
			m.uid = uint32(req.UID)
		}
		if req.Mask&unix.STATX_GID != 0 {
			m.gid = uint32(req.GID)
		}
	})
}

func (f *file) chmod(perm uint32) error {
	if f.IsSymlink() {
		if f.t.o.Host {
			return unix.EOPNOTSUPP
		}
		// gVisor's overlay sets the mode of every object that it copies up. A link's means nothing and is always the same.
		return nil
	}
	if f.t.o.Host {
		// A guest must not plant a program on the host that runs with another's rights.
		return unix.Chmod(procPath(f.fd), perm&^(unix.S_ISUID|unix.S_ISGID))
	}
	return f.change(func(m *meta) { m.perm = perm & 0o7777 })
}

func (f *file) change(fn func(*meta)) error {
	m, err := loadMeta(f.fd, f.IsDir())
	if err != nil {
		return err
	}
	fn(&m)
	return storeMeta(f.fd, m)
}

func (f *file) utimes(req lisafs.SetStatReq) error {
	ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
	if req.Mask&unix.STATX_ATIME != 0 {
		ts[0] = unix.Timespec{Sec: req.Atime.Sec, Nsec: int64(req.Atime.Nsec)}
	}
	if req.Mask&unix.STATX_MTIME != 0 {
		ts[1] = unix.Timespec{Sec: req.Mtime.Sec, Nsec: int64(req.Mtime.Nsec)}
	}
	return unix.UtimesNanoAt(f.fd, "", ts, unix.AT_EMPTY_PATH)
}

// StatFS implements [lisafs.ControlFDImpl].
func (f *file) StatFS() (lisafs.StatFS, error) {
	var s unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &s); err != nil {
		return lisafs.StatFS{}, err
	}
	out := lisafs.StatFS{Type: uint64(s.Type), BlockSize: s.Bsize, Blocks: s.Blocks, BlocksFree: s.Bfree, BlocksAvailable: s.Bavail,
		Files: s.Files, FilesFree: s.Ffree, NameLength: uint64(s.Namelen)}
	if f.t.o.Quota != nil {
		out = f.t.o.Quota.statFS(out)
	}
	return out, nil
}

// Readlink implements [lisafs.ControlFDImpl].
func (f *file) Readlink(buf func(uint32) []byte) (uint16, error) {
	for size := 256; size < math.MaxUint16; size *= 4 {
		b := buf(uint32(size))
		var n int
		var err error
		if f.t.o.Host {
			n, err = unix.Readlinkat(f.fd, "", b)
		} else {
			n, err = unix.Pread(f.fd, b, 0)
		}
		if err != nil {
			return 0, err
		}
		if n < size {
			return uint16(n), nil
		}
	}
	return 0, unix.ENAMETOOLONG
}

// Connect implements [lisafs.ControlFDImpl]: sockets of the host are out of reach.
func (f *file) Connect(uint32) (int, error) { return -1, unix.EPERM }

// ConnectWithCreds implements [lisafs.ControlFDImpl].
func (f *file) ConnectWithCreds(uint32, lisafs.UID, lisafs.GID) (int, error) { return -1, unix.EPERM }

// BindAt implements [lisafs.ControlFDImpl]: the guest's kernel keeps sockets in its memory.
func (f *file) BindAt(string, uint32, linux.FileMode, lisafs.UID, lisafs.GID) (*lisafs.ControlFD, lisafs.Statx, *lisafs.BoundSocketFD, int, error) {
	return nil, lisafs.Statx{}, nil, -1, unix.EPERM
}

// Unlink implements [lisafs.ControlFDImpl].
func (f *file) Unlink(name string, flags uint32) error {
	if f.t.reserved(name) {
		return unix.ENOENT
	}
	q := f.t.o.Quota
	return q.naming([]int{f.fd, f.t.root}, func() error {
		if !f.t.o.Host {
			if err := f.t.prepare(); err != nil {
				return err
			}
		}
		return q.losing(f.fd, name, func() error {
			err := unix.Unlinkat(f.fd, name, int(flags))
			if err == unix.ENOTEMPTY && !f.t.o.Host && f.sweep(name) {
				err = unix.Unlinkat(f.fd, name, int(flags))
			}
			if err == nil {
				q.owe()
			}
			return err
		})
	})
}

// sweep removes what killed servers left in a directory that the guest believes empty.
func (f *file) sweep(name string) bool {
	fd, err := unix.Openat(f.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	found := false
	_ = listDir(fd, math.MaxInt, func(e dirent) {
		if strings.HasPrefix(e.name, tmpPrefix) {
			err := f.t.o.Quota.losing(fd, e.name, func() error {
				err := unix.Unlinkat(fd, e.name, 0)
				if err != nil {
					err = unix.Unlinkat(fd, e.name, unix.AT_REMOVEDIR)
				}
				return err
			})
			found = err == nil || found
		}
	})
	return found
}

// RenameAt implements [lisafs.ControlFDImpl].
func (f *file) RenameAt(from string, dir lisafs.ControlFDImpl, to string) error {
	return f.RenameAt2(from, dir, to, 0)
}

// RenameAt2 implements [lisafs.ControlFDImpl].
func (f *file) RenameAt2(from string, dir lisafs.ControlFDImpl, to string, flags uint32) error {
	d := dir.(*file)
	if f.t.reserved(from) {
		return unix.ENOENT
	}
	if f.t.reserved(to) || flags&^(unix.RENAME_NOREPLACE|unix.RENAME_EXCHANGE) != 0 {
		return unix.EINVAL
	}
	q := f.t.o.Quota
	return q.naming([]int{f.fd, d.fd, f.t.root}, func() error {
		if !f.t.o.Host {
			if err := q.overdrawn(); err != nil {
				return err
			}
			if err := f.t.prepare(); err != nil {
				return err
			}
		}
		return q.losing(d.fd, to, func() error {
			err := unix.Renameat2(f.fd, from, d.fd, to, uint(flags))
			if err == unix.ENOTEMPTY && !f.t.o.Host && d.sweep(to) {
				err = unix.Renameat2(f.fd, from, d.fd, to, uint(flags))
			}
			if err == nil {
				q.owe()
			}
			return err
		})
	})
}

// Renamed implements [lisafs.ControlFDImpl]; nothing here depends on a name.
func (f *file) Renamed() {}
