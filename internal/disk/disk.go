// Package disk holds the steps by which several processes change the files of a home at once and without harm: a lock that is
// waited for, a file that is replaced whole, and renames that outlive a crash. It knows no file by name.
package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Lock waits for the flock(2) of the file at path, which is made when it is missing. The lock ends with the process at the latest.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := OpenLocked(ctx, path)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// OpenLocked is [Lock] for who also works with the file. Closing it gives the lock back.
func OpenLocked(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		got, err := TryLock(f)
		if got {
			return f, nil
		}
		if err == nil {
			select {
			case <-ctx.Done():
				err = fmt.Errorf("lock %s: %w", path, ctx.Err())
			case <-time.After(wait):
				continue
			}
		}
		f.Close()
		return nil, err
	}
}

// TryLock takes the lock of an open file or directory, unless another open file has it. Closing f gives it back.
func TryLock(f *os.File) (bool, error) { return tryFlock(f, unix.LOCK_EX) }

// TryShare is [TryLock] for a lock that any number may have at once, while nobody has it alone.
func TryShare(f *os.File) (bool, error) { return tryFlock(f, unix.LOCK_SH) }

func tryFlock(f *os.File, how int) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		case !errors.Is(err, unix.EINTR):
			return false, &os.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
	}
}

// Replace gives path new contents so that a reader, now or after a crash, sees the old or the new ones. What a killed process
// leaves of it is called ".<name>-*".
func Replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails after the rename, as it should
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = SyncDir(filepath.Dir(path))
	}
	return err
}

// Spare makes a file of size bytes at path, unless there is one of at least that size: room for a [ReplaceWith] to come. It may fail
// for want of room, and leaves nothing then.
func Spare(path string, size int) error {
	if fi, err := os.Lstat(path); err == nil && fi.Size() >= int64(size) {
		return nil
	}
	err := os.WriteFile(path, make([]byte, size), 0o600)
	if err != nil {
		os.Remove(path)
	}
	return err
}

// ReplaceWith is [Replace] for a full disk: the new contents take the room of a spare file, which becomes the one at path. Nothing
// that fills the disk can be faster, as with room that is given up first.
func ReplaceWith(spare, path string, b []byte) error {
	f, err := os.OpenFile(spare, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Truncate(int64(len(b)))
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(spare, path)
	}
	if err == nil {
		err = SyncDir(filepath.Dir(path))
	}
	return err
}

// NoRoom tells an error of a full disk, or of a quota that is used up.
func NoRoom(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// SyncDir makes the renames in a directory last.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
