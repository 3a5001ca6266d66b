package boxfs

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// Attributes of a stored object on the host.
const (
	metaAttr   = "user.coffer.stat"
	guestAttrs = "user.coffer.x." // + the guest's own attribute name
)

// Host permissions of stored objects. The type of what a plain file stands for is in the group's bits, so that a listing of a
// directory needs no attribute of each entry; nobody but the owner can reach the files, whatever those bits say.
const (
	filePerm = 0o600
	dirPerm  = 0o700
)

var typeBits = map[uint32]uint32{
	unix.S_IFREG: 0, unix.S_IFLNK: 1 << 3, unix.S_IFCHR: 2 << 3, unix.S_IFBLK: 3 << 3,
}

// hostType is the guest's type of an object with this host mode.
func hostType(mode uint32) uint32 {
	if mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.S_IFDIR
	}
	switch mode >> 3 & 7 {
	case 1:
		return unix.S_IFLNK
	case 2:
		return unix.S_IFCHR
	case 3:
		return unix.S_IFBLK
	}
	return unix.S_IFREG
}

// meta is what the guest sees of an object and the host cannot hold.
type meta struct {
	perm         uint32 // permission bits, with setuid, setgid and sticky
	uid, gid     uint32
	major, minor uint32
}

const metaVersion = 1
const metaSize = 24

func (m meta) encode() []byte {
	b := make([]byte, metaSize)
	for i, v := range []uint32{metaVersion, m.perm, m.uid, m.gid, m.major, m.minor} {
		binary.LittleEndian.PutUint32(b[4*i:], v)
	}
	return b
}

// decodeMeta reads an attribute; what is not one of ours is refused, not guessed.
func decodeMeta(b []byte) (meta, bool) {
	if len(b) != metaSize || binary.LittleEndian.Uint32(b) != metaVersion {
		return meta{}, false
	}
	v := func(i int) uint32 { return binary.LittleEndian.Uint32(b[4*i:]) }
	return meta{perm: v(1) & 0o7777, uid: v(2), gid: v(3), major: v(4), minor: v(5)}, true
}

// loadMeta reads an object's attribute. An object without one was being created when its server was killed: it is the guest's
// root's and closed to others, the most careful reading.
func loadMeta(fd int, dir bool) (meta, error) {
	var buf [metaSize + 1]byte
	n, err := unix.Fgetxattr(fd, metaAttr, buf[:])
	if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ERANGE) {
		return meta{}, err
	}
	if err == nil {
		if m, ok := decodeMeta(buf[:n]); ok {
			return m, nil
		}
	}
	if dir {
		return meta{perm: 0o700}, nil
	}
	return meta{perm: 0o600}, nil
}

func storeMeta(fd int, m meta) error { return unix.Fsetxattr(fd, metaAttr, m.encode(), 0) }

// stat is what the guest sees of an open object.
func (t *tree) stat(fd int) (lisafs.Statx, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return lisafs.Statx{}, err
	}
	out := lisafs.Statx{
		Mask: st.Mask, Mode: st.Mode, DevMinor: st.Dev_minor, DevMajor: st.Dev_major, Ino: st.Ino, Nlink: st.Nlink,
		UID: st.Uid, GID: st.Gid, RdevMinor: st.Rdev_minor, RdevMajor: st.Rdev_major,
		Size: st.Size, Blksize: st.Blksize, Blocks: st.Blocks,
		Atime: lisafs.StatxTimestamp{Sec: st.Atime.Sec, Nsec: st.Atime.Nsec},
		Btime: lisafs.StatxTimestamp{Sec: st.Btime.Sec, Nsec: st.Btime.Nsec},
		Mtime: lisafs.StatxTimestamp{Sec: st.Mtime.Sec, Nsec: st.Mtime.Nsec},
		Ctime: lisafs.StatxTimestamp{Sec: st.Ctime.Sec, Nsec: st.Ctime.Nsec},
	}
	if t.o.Host {
		out.UID, out.GID = t.shown(st.Uid), t.shown(st.Gid)
		return out, nil
	}
	m, err := loadMeta(fd, st.Mode&unix.S_IFMT == unix.S_IFDIR)
	if err != nil {
		return lisafs.Statx{}, err
	}
	out.Mode = uint16(hostType(uint32(st.Mode)) | m.perm)
	out.UID, out.GID, out.RdevMajor, out.RdevMinor = m.uid, m.gid, m.major, m.minor
	return out, nil
}

// overflow is the id that the kernel shows for owners that have no place in a user namespace.
const overflow = 65534

func (t *tree) shown(id uint32) uint32 {
	if id < t.o.IDOffset {
		return overflow
	}
	return id - t.o.IDOffset
}
