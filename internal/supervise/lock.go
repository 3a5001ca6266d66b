package supervise

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/disk"
)

// ErrLocked is returned by [TryLock] when somebody else holds the lock.
var ErrLocked = errors.New("locked by another process")

// Lock is a lock on an open file description: it ends with the last descriptor of it, whatever kills the holder, and it can be
// looked at without being taken.
type Lock struct{ f *os.File }

// TryLock takes the lock at path, creating the file, or fails with [ErrLocked]. The content becomes who, as JSON, for people and
// for finding the holder.
func TryLock(path string, who any) (*Lock, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open lock: %w", err)
		}
		err = setLock(f, wholeFile())
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			f.Close()
			return nil, ErrLocked
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Between opening and locking the file may have been removed and made anew by somebody else.
		if !sameFile(f, path) {
			f.Close()
			continue
		}
		l := &Lock{f: f}
		// What a lock says about its holder is for people; on a full disk it still locks.
		if err := l.write(who); err != nil && !disk.NoRoom(err) {
			l.Unlock()
			return nil, err
		}
		return l, nil
	}
}

// Inherit takes over a lock through the descriptor on which this process was given it, and says who holds it now.
func Inherit(fd int, who any) (*Lock, error) {
	l := &Lock{f: os.NewFile(uintptr(fd), "lock")}
	// It succeeds for whoever has the lock already, and fails if somebody else has it.
	if err := setLock(l.f, wholeFile()); err != nil {
		return nil, fmt.Errorf("take over lock: %w", err)
	}
	if err := l.write(who); err != nil && !disk.NoRoom(err) {
		return nil, err
	}
	return l, nil
}

// WaitLock takes the lock as soon as it is free.
func WaitLock(ctx context.Context, path string, who any) (*Lock, error) {
	var l *Lock
	var err error
	poll(ctx, func() bool {
		l, err = TryLock(path, who)
		return !errors.Is(err, ErrLocked)
	})
	if errors.Is(err, ErrLocked) {
		return nil, fmt.Errorf("wait for lock %s: %w (held by %s)", path, ctx.Err(), Holder(path))
	}
	return l, err
}

func wholeFile() *unix.Flock_t { return &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart} }

func sameFile(f *os.File, path string) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

func (l *Lock) write(who any) error {
	b, err := json.Marshal(who)
	if err != nil {
		return err
	}
	if err := l.f.Truncate(0); err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	if _, err := l.f.WriteAt(append(b, '\n'), 0); err != nil {
		return fmt.Errorf("write lock: %w", err)
	}
	return nil
}

// File is the locked file, for handing the lock on to a child.
func (l *Lock) File() *os.File { return l.f }

// Keep has the lock last as long as this process does: what is done to l no longer matters to it. So whoever finds it free knows that the
// process is gone, and not only about to go.
func (l *Lock) Keep() error {
	if _, err := unix.FcntlInt(l.f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return fmt.Errorf("keep lock %s: %w", l.f.Name(), err)
	}
	return nil
}

// Unlock lets go of the lock; the file stays.
func (l *Lock) Unlock() { l.f.Close() }

// Held tells whether somebody holds the lock, without taking it: a starting process must not find it taken by a look.
func Held(path string) (bool, error) {
	w, err := Watch(path)
	if err != nil || w == nil {
		return false, err
	}
	defer w.Close()
	return w.Held()
}

// Watcher looks at one lock, even after its file was removed.
type Watcher struct {
	f    *os.File
	path string
}

// Watch opens a lock file for looking at it. It returns nil where there is none.
func Watch(path string) (*Watcher, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look at lock: %w", err)
	}
	return &Watcher{f: f, path: path}, nil
}

// Held tells whether somebody holds the lock.
func (w *Watcher) Held() (bool, error) {
	// A read lock conflicts with the holder's write lock, and needs no right to write.
	lk := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	if err := getLock(w.f, &lk); err != nil {
		return false, fmt.Errorf("look at lock %s: %w", w.path, err)
	}
	return lk.Type != unix.F_UNLCK, nil
}

// Wait returns when nobody holds the lock. A nil watcher has nothing to wait for.
func (w *Watcher) Wait(ctx context.Context) error {
	if w == nil {
		return nil
	}
	var err error
	ok := poll(ctx, func() bool {
		var held bool
		held, err = w.Held()
		return err != nil || !held
	})
	if err == nil && !ok {
		err = fmt.Errorf("%s is still held by %s: %w", w.path, Holder(w.path), ctx.Err())
	}
	return err
}

// Close lets go of the file.
func (w *Watcher) Close() {
	if w != nil {
		w.f.Close()
	}
}

// WaitFree returns when nobody holds the lock.
func WaitFree(ctx context.Context, path string) error {
	w, err := Watch(path)
	if err != nil {
		return err
	}
	defer w.Close()
	return w.Wait(ctx)
}

// Holder is what the last holder wrote about itself.
func Holder(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return "an unknown process"
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 512))
	if err != nil || !json.Valid(b) {
		return "an unknown process"
	}
	return string(b[:len(b)-1])
}
