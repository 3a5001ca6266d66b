package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// Extras implements Rootfs.
func (b *boxRoot) Extras(e wire.Extras) ([]string, error) {
	if err := b.overlay(e.Lower, e.State); err != nil {
		return nil, err
	}
	var dirs dirCache
	var failed failures
	for _, d := range e.Devices {
		failed.add("make the device", d.Path, b.imageDevice(&dirs, d))
	}
	for _, x := range e.Xattrs {
		failed.add("set "+x.Name+" of", x.Path, b.setXattr(&dirs, x))
	}
	return failed.warnings(), nil
}

// imageDevice makes a device of the image. gVisor shows none with its number: a character device without one is a deleted file to its
// overlay, and a block device is there, and is none. The times, its and its directory's, stay those of the image.
func (b *boxRoot) imageDevice(dirs *dirCache, d wire.SetupDevice) error {
	p, err := b.file(dirs, d.Path)
	if err != nil {
		return err
	}
	var dir unix.Stat_t
	if err := unix.Stat(dirs.resolved, &dir); err != nil {
		return err
	}
	dev := int(unix.Mkdev(d.Major, d.Minor))
	err = unix.Mknod(p, d.Mode, dev)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil || st.Mode&unix.S_IFMT != d.Mode&unix.S_IFMT {
			return err // what is there is no device of this kind, so it is not the image's
		}
		if err := unix.Unlink(p); err != nil {
			return err
		}
		err = unix.Mknod(p, d.Mode, dev)
	}
	if err != nil {
		return err
	}
	return errors.Join(os.Lchown(p, int(d.UID), int(d.GID)), unix.Chmod(p, d.Mode&0o7777), setMtime(p, unix.Timespec{Sec: d.Sec, Nsec: d.Nsec}), setMtime(dirs.resolved, dir.Mtim))
}

func setMtime(path string, t unix.Timespec) error {
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Nsec: unix.UTIME_OMIT}, t}, unix.AT_SYMLINK_NOFOLLOW)
}

func (b *boxRoot) setXattr(dirs *dirCache, x wire.SetupXattr) error {
	p, err := b.file(dirs, x.Path)
	if err != nil {
		return err
	}
	return unix.Lsetxattr(p, x.Name, x.Value, 0)
}

// dirCache is the last directory that was looked up. Files come in the order of a walk, many of one directory after each other.
type dirCache struct{ dir, resolved string }

// file finds a file of the image. Links on the way to it are followed, and it itself is not.
func (b *boxRoot) file(dirs *dirCache, path []byte) (string, error) {
	dir, name := filepath.Split(string(path))
	if dirs.resolved == "" || dir != dirs.dir {
		resolved, err := b.resolve(dir)
		if err != nil {
			return "", err
		}
		*dirs = dirCache{dir, resolved}
	}
	return filepath.Join(dirs.resolved, name), nil
}

// maxFailures bounds what is told of one message: an image may have any number of files with something that cannot be had.
const maxFailures = 20

// failures gathers what failed of many files: one line for each kind.
type failures struct {
	kinds []failure
	more  int
}

type failure struct {
	what, path string // path is the first file's
	err        error
	more       int
}

func (f *failures) add(what string, path []byte, err error) {
	if err == nil {
		return
	}
	// Without the path that the error may tell, too.
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		err = pe.Err
	}
	for i := range f.kinds {
		if k := &f.kinds[i]; k.what == what && errors.Is(err, k.err) {
			k.more++
			return
		}
	}
	if len(f.kinds) == maxFailures {
		f.more++
		return
	}
	f.kinds = append(f.kinds, failure{what: what, path: string(path), err: err})
}

func (f *failures) warnings() []string {
	var out []string
	for _, k := range f.kinds {
		line := fmt.Sprintf("%s %q", k.what, k.path)
		if k.more > 0 {
			line += fmt.Sprintf(" and of %d more files", k.more)
		}
		out = append(out, line+": "+k.err.Error())
	}
	if f.more > 0 {
		out = append(out, fmt.Sprintf("and %d more failures", f.more))
	}
	return out
}
