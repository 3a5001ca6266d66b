package boxfs

import (
	"crypto/rand"
	"encoding/hex"
	"errors"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// create makes a plain file that stands for a guest object of any type but directories.
func (f *file) create(name string, typ uint32, m meta, content string) (int, error) {
	if f.t.reserved(name) {
		return -1, unix.EPERM
	}
	return f.t.o.Quota.making(f.fd, name, chargeBlock+blocks(int64(len(content))), func() (int, error) {
		// It gets its name only when it is whole: a server may be killed between any two steps.
		tmp := tmpName()
		fd, err := makeTemp(f.fd, tmp, typ, m, content)
		if err != nil {
			return -1, err
		}
		if err := unix.Renameat2(f.fd, tmp, f.fd, name, unix.RENAME_NOREPLACE); err != nil {
			_ = unix.Unlinkat(f.fd, tmp, 0)
			unix.Close(fd)
			return -1, err
		}
		return fd, nil
	})
}

// takeBack removes what was just made.
func (f *file) takeBack(name string, fd int) {
	q := f.t.o.Quota
	_ = q.naming([]int{f.fd}, func() error {
		return q.losingOpen(fd, func() error { return unix.Unlinkat(f.fd, name, 0) })
	})
}

// makeTemp makes a plain file that stands for a guest object, under a name that no guest sees.
func makeTemp(dir int, tmp string, typ uint32, m meta, content string) (int, error) {
	fd, err := unix.Openat(dir, tmp, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, filePerm)
	if err != nil {
		return -1, err
	}
	err = storeMeta(fd, m)
	if bits := typeBits[typ]; err == nil && bits != 0 {
		err = unix.Fchmod(fd, filePerm|bits)
	}
	if err == nil && content != "" {
		_, err = unix.Pwrite(fd, []byte(content), 0)
	}
	if err != nil {
		_ = unix.Unlinkat(dir, tmp, 0)
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func tmpName() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return tmpPrefix + hex.EncodeToString(b[:])
}

func newMeta(mode linux.FileMode, uid lisafs.UID, gid lisafs.GID) meta {
	m := meta{perm: uint32(mode) & 0o7777}
	if uid.Ok() {
		m.uid = uint32(uid)
	}
	if gid.Ok() {
		m.gid = uint32(gid)
	}
	return m
}

// own gives a new object of a volume the owner that the guest asks for, if it is not the serving user's already. Where it can be nobody
// else's, as in the boxes of an ordinary user, it stays the serving user's: the guest's kernel has allowed its maker to make it.
func (f *file) own(fd int, uid lisafs.UID, gid lisafs.GID) error {
	u, g := -1, -1
	if uid.Ok() {
		u = int(uint32(uid) + f.t.o.IDOffset)
	}
	if gid.Ok() {
		g = int(uint32(gid) + f.t.o.IDOffset)
	}
	err := unix.Fchownat(fd, "", u, g, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	// The second is for ids that have no place in this user namespace.
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// createHost makes a plain file of a volume. It returns the descriptor that stands for it, and the one that it was made with: the
// mode may forbid even its maker to open it again.
func (f *file) createHost(name string, mode linux.FileMode, uid lisafs.UID, gid lisafs.GID, access uint32) (fd, open int, err error) {
	const flags = unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	open, err = unix.Openat(f.fd, name, flags|int(access&unix.O_ACCMODE), uint32(mode)&0o777)
	if err != nil {
		return -1, -1, err
	}
	if err = f.own(open, uid, gid); err == nil {
		fd, err = reopen(open, unix.O_PATH)
	}
	if err != nil {
		_ = unix.Unlinkat(f.fd, name, 0)
		unix.Close(open)
		return -1, -1, err
	}
	return fd, open, nil
}

// OpenCreate implements [lisafs.ControlFDImpl].
func (f *file) OpenCreate(mode linux.FileMode, uid lisafs.UID, gid lisafs.GID, name string, flags uint32) (*lisafs.ControlFD, lisafs.Statx, *lisafs.OpenFD, int, error) {
	fail := func(err error) (*lisafs.ControlFD, lisafs.Statx, *lisafs.OpenFD, int, error) {
		return nil, lisafs.Statx{}, nil, -1, err
	}
	var fd, open int
	var err error
	if f.t.o.Host {
		fd, open, err = f.createHost(name, mode, uid, gid, flags)
	} else if fd, err = f.create(name, unix.S_IFREG, newMeta(mode, uid, gid), ""); err == nil {
		if open, err = reopen(fd, int(flags&unix.O_ACCMODE)|unix.O_NONBLOCK); err != nil {
			f.takeBack(name, fd)
			unix.Close(fd)
		}
	}
	if err != nil {
		return fail(err)
	}
	st, err := f.t.stat(fd)
	if err != nil {
		f.takeBack(name, fd)
		unix.Close(fd)
		unix.Close(open)
		return fail(err)
	}
	// From here on nothing may fail: the connection knows the objects that are made now, and only the client lets go of them.
	c := f.child(fd, name, st.Mode)
	o, donated := c.opened(open, flags)
	return c.FD(), st, o, donated, nil
}

// Mkdir implements [lisafs.ControlFDImpl].
func (f *file) Mkdir(mode linux.FileMode, uid lisafs.UID, gid lisafs.GID, name string) (*lisafs.ControlFD, lisafs.Statx, error) {
	if f.t.reserved(name) {
		return nil, lisafs.Statx{}, unix.EPERM
	}
	if f.t.o.Host {
		if err := unix.Mkdirat(f.fd, name, uint32(mode)&0o1777); err != nil {
			return nil, lisafs.Statx{}, err
		}
		fd, err := f.t.openAt(f.fd, name)
		if err == nil {
			if err = f.own(fd, uid, gid); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			_ = unix.Unlinkat(f.fd, name, unix.AT_REMOVEDIR)
			return nil, lisafs.Statx{}, err
		}
		return f.finish(fd, name)
	}
	fd, err := f.t.o.Quota.making(f.fd, name, 2*chargeBlock, func() (int, error) { return f.makeDir(name, newMeta(mode, uid, gid)) })
	if err != nil {
		return nil, lisafs.Statx{}, err
	}
	return f.finish(fd, name)
}

func (f *file) makeDir(name string, m meta) (int, error) {
	tmp := tmpName()
	if err := unix.Mkdirat(f.fd, tmp, dirPerm); err != nil {
		return -1, err
	}
	fd, err := unix.Openat(f.fd, tmp, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		if err = storeMeta(fd, m); err == nil {
			err = unix.Renameat2(f.fd, tmp, f.fd, name, unix.RENAME_NOREPLACE)
		}
		if err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		_ = unix.Unlinkat(f.fd, tmp, unix.AT_REMOVEDIR)
		return -1, err
	}
	return fd, nil
}

// Mknod implements [lisafs.ControlFDImpl]. Pipes and sockets are refused: the guest's kernel then keeps them in its memory, where
// they belong to running processes. Devices exist only as a note for the guest, and not at all on volumes.
func (f *file) Mknod(mode linux.FileMode, uid lisafs.UID, gid lisafs.GID, name string, minor, major uint32) (*lisafs.ControlFD, lisafs.Statx, error) {
	typ := uint32(mode.FileType())
	if typ == 0 {
		typ = unix.S_IFREG
	}
	if _, ok := typeBits[typ]; !ok || typ == unix.S_IFLNK || f.t.o.Host && typ != unix.S_IFREG {
		return nil, lisafs.Statx{}, unix.EPERM
	}
	if f.t.o.Host {
		fd, open, err := f.createHost(name, mode, uid, gid, unix.O_RDONLY)
		if err != nil {
			return nil, lisafs.Statx{}, err
		}
		unix.Close(open)
		return f.finish(fd, name)
	}
	var fd int
	var err error
	if isWhiteout(mode, major, minor) {
		fd, err = f.whiteout(name)
	} else {
		m := newMeta(mode, uid, gid)
		m.major, m.minor = major, minor
		fd, err = f.create(name, typ, m, "")
	}
	if err != nil {
		return nil, lisafs.Statx{}, err
	}
	return f.finish(fd, name)
}

// Symlink implements [lisafs.ControlFDImpl].
func (f *file) Symlink(name, target string, uid lisafs.UID, gid lisafs.GID) (*lisafs.ControlFD, lisafs.Statx, error) {
	var fd int
	var err error
	if f.t.o.Host {
		if err = unix.Symlinkat(target, f.fd, name); err != nil {
			return nil, lisafs.Statx{}, err
		}
		if fd, err = f.t.openAt(f.fd, name); err == nil {
			if err = f.own(fd, uid, gid); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			_ = unix.Unlinkat(f.fd, name, 0)
		}
	} else {
		fd, err = f.create(name, unix.S_IFLNK, newMeta(0o777, uid, gid), target)
	}
	if err != nil {
		return nil, lisafs.Statx{}, err
	}
	return f.finish(fd, name)
}

// Link implements [lisafs.ControlFDImpl].
func (f *file) Link(dir lisafs.ControlFDImpl, name string) (*lisafs.ControlFD, lisafs.Statx, error) {
	d := dir.(*file)
	if d.t.reserved(name) {
		return nil, lisafs.Statx{}, unix.EPERM
	}
	if err := f.t.o.Quota.linking(d.fd, name, func() error {
		return unix.Linkat(unix.AT_FDCWD, procPath(f.fd), d.fd, name, unix.AT_SYMLINK_FOLLOW)
	}); err != nil {
		return nil, lisafs.Statx{}, err
	}
	return d.Walk(name)
}
