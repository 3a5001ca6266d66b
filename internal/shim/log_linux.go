package shim

import (
	"os"
	"strconv"
	"sync"
	"time"
)

// maxLog bounds the shim's log: the guest has ways to make its kernel complain.
const maxLog = 1 << 20

// boundLog is a file, open for appending, of which the newer half is kept when it would grow beyond max.
type boundLog struct {
	f   *os.File
	max int64

	mu sync.Mutex
}

func (l *boundLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if st, err := l.f.Stat(); err == nil && st.Mode().IsRegular() && st.Size()+int64(len(p)) > l.max {
		l.shorten(st.Size())
	}
	return l.f.Write(p)
}

// shorten drops the older half. If that cannot be read, all of it goes.
func (l *boundLog) shorten(size int64) {
	kept := make([]byte, min(size, l.max/2))
	r, err := os.Open("/proc/self/fd/" + strconv.Itoa(int(l.f.Fd())))
	if err == nil {
		defer r.Close()
		_, err = r.ReadAt(kept, size-int64(len(kept)))
	}
	if err != nil {
		kept = nil
	}
	if l.f.Truncate(0) == nil {
		_, _ = l.f.Write(append([]byte("(what came before was dropped)\n"), kept...))
	}
}

// pipe is for processes that must not write to the file themselves. finish returns when all that they wrote is there.
func (l *boundLog) pipe() (w *os.File, finish func(), err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer r.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			_, _ = l.Write(buf[:n]) // a full disk must not stop who writes here
			if err != nil {
				return
			}
		}
	}()
	return w, func() {
		w.Close()
		select {
		case <-done:
		case <-time.After(time.Second): // somebody holds the other end; it is not waited for
		}
	}, nil
}
