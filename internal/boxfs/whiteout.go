package boxfs

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
)

// The overlay in the guest's kernel first moves or removes a name and then makes a whiteout there (a character device 0:0), which
// hides what the image has of that name. It cannot go back by then: its answer to a failure is a panic that ends the box. So a
// whiteout must never fail, not on a disk without inodes either, and what comes before it is refused when it would.

// Names in the root of a layer. Whiteouts are links to the first, which need no inode. The second is one that is made already, for
// file systems where a link needs one (tmpfs).
const (
	whiteName = tmpPrefix + "whiteout"
	spareName = tmpPrefix + "spare"
)

// manyLinks is when the file that whiteouts are links to is exchanged, long before a file system's bound (ext4: 65000): while there is
// room, and again at every further whiteout until it has worked.
const manyLinks = 30000

// whiteouts is what a layer keeps for making them.
type whiteouts struct {
	mu    sync.Mutex
	spare bool // known to be there
}

func isWhiteout(mode linux.FileMode, major, minor uint32) bool {
	return uint32(mode.FileType()) == unix.S_IFCHR && major == 0 && minor == 0
}

// prepare sees to it that a whiteout can be made, whatever happens to the disk.
func (t *tree) prepare() error {
	t.white.mu.Lock()
	defer t.white.mu.Unlock()
	if t.white.spare {
		return nil
	}
	err := t.linkWhiteout(t.root, spareName)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	t.white.spare = true
	return nil
}

// linkWhiteout makes a link to the one whiteout, and first that where it is missing or can have no more.
func (t *tree) linkWhiteout(dir int, name string) error {
	err := unix.Linkat(t.root, whiteName, dir, name, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EMLINK) {
		if err := t.newWhiteout(); err != nil {
			return err
		}
		err = unix.Linkat(t.root, whiteName, dir, name, 0)
	}
	if err == nil {
		t.o.Quota.add(chargeLink)
	}
	return err
}

func (t *tree) newWhiteout() error {
	tmp := tmpName()
	fd, err := makeTemp(t.root, tmp, unix.S_IFCHR, meta{}, "")
	if err != nil {
		return err
	}
	unix.Close(fd)
	err = t.o.Quota.losing(t.root, whiteName, func() error { return unix.Renameat(t.root, tmp, t.root, whiteName) })
	if err != nil {
		_ = unix.Unlinkat(t.root, tmp, 0)
		return err
	}
	t.o.Quota.add(chargeBlock)
	return nil
}

// whiteout makes one under a name of a directory and opens it.
func (f *file) whiteout(name string) (int, error) {
	t := f.t
	if t.reserved(name) {
		return -1, unix.EPERM
	}
	fd := -1
	return fd, t.o.Quota.naming([]int{f.fd, t.root}, func() (err error) {
		if err := t.o.Quota.hide(); err != nil {
			return err
		}
		fd, err = f.makeWhiteout(name)
		return err
	})
}

func (f *file) makeWhiteout(name string) (int, error) {
	t := f.t
	t.white.mu.Lock()
	defer t.white.mu.Unlock()
	err := t.linkWhiteout(f.fd, name)
	if errors.Is(err, unix.EEXIST) {
		return f.unmoved(name)
	}
	if err != nil {
		// Also where it is not known to be there: this is the last chance.
		err = unix.Renameat2(t.root, spareName, f.fd, name, unix.RENAME_NOREPLACE)
		t.white.spare = false
	}
	if err != nil {
		return -1, err
	}
	fd, err := t.openAt(f.fd, name)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil && st.Nlink > manyLinks {
		_ = t.newWhiteout() // the next one tries again
	}
	return fd, nil
}

// unmoved answers for a whiteout where there is a file still. Of two names of one file neither goes when one is renamed to the
// other, as POSIX has it; the overlay knows only of the success. That the file itself is there is then what the guest has to see.
func (f *file) unmoved(name string) (int, error) {
	fd, err := f.t.openAt(f.fd, name)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && (hostType(st.Mode) == unix.S_IFDIR || st.Nlink < 2) {
		err = unix.EEXIST
	}
	if err == nil && hostType(st.Mode) == unix.S_IFCHR {
		if m, merr := loadMeta(fd, false); merr != nil || m.major == 0 && m.minor == 0 {
			err = unix.EEXIST
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// opaqueAttr marks a directory whose content in the image is hidden, as gVisor's overlay calls it where its upper layer is a file server's.
// The overlay sets it when it can no longer go back, too, so it is no attribute on the host, for which there may be no room, but the
// sticky bit, which says nothing in a directory of one user.
const (
	opaqueAttr = "user.overlay.opaque"
	opaqueBit  = unix.S_ISVTX
)

// opaque reports whether a directory has the mark.
func (f *file) opaque() bool {
	var st unix.Stat_t
	return unix.Fstat(f.fd, &st) == nil && st.Mode&opaqueBit != 0
}

func (f *file) setOpaque(on bool) error {
	perm := uint32(dirPerm)
	if on {
		perm |= opaqueBit
	}
	return unix.Fchmod(f.fd, perm)
}

// marks tells an attribute that is kept in a directory's host mode.
func (f *file) marks(name string) bool { return !f.t.o.Host && name == opaqueAttr && f.IsDir() }
