package wire

import (
	"io"
	"sync"
)

// maxAhead bounds what is fetched of an output before it is taken. It is more than an honest peer can have left when its process
// ends; from another, output is then taken as slowly as it is asked for.
const maxAhead = 16 << 20

// ahead is a reader, used by one goroutine, that another can fetch everything from before it is asked for.
type ahead struct {
	r io.Reader

	mu       sync.Mutex
	changed  *sync.Cond
	reading  bool // by whoever asks
	fetching bool
	over     bool // nobody asks any more
	buf      []byte
	err      error // the end of r, after buf
}

func newAhead(r io.Reader) *ahead {
	a := &ahead{r: r}
	a.changed = sync.NewCond(&a.mu)
	return a
}

func (a *ahead) Read(p []byte) (int, error) {
	a.mu.Lock()
	for a.fetching && len(a.buf) == 0 {
		a.changed.Wait()
	}
	if len(a.buf) > 0 {
		n := copy(p, a.buf)
		a.buf = a.buf[n:]
		a.mu.Unlock()
		return n, nil
	}
	if err := a.err; err != nil {
		a.mu.Unlock()
		return 0, err
	}
	a.reading = true
	a.mu.Unlock()
	n, err := a.r.Read(p)
	a.mu.Lock()
	a.reading, a.err = false, err
	a.changed.Broadcast()
	a.mu.Unlock()
	return n, err
}

// stop says that nobody will ask any more.
func (a *ahead) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over, a.buf = true, nil
	a.changed.Broadcast()
}

// fetch returns when everything has been fetched, or taken.
func (a *ahead) fetch() {
	a.mu.Lock()
	for a.reading {
		a.changed.Wait()
	}
	a.fetching = a.err == nil
	a.mu.Unlock()
	buf := make([]byte, copyBuffer)
	for fetched := 0; a.fetching; {
		n, err := a.r.Read(buf)
		fetched += n
		a.mu.Lock()
		a.err = err
		if !a.over {
			a.buf = append(a.buf, buf[:n]...)
		}
		a.fetching = err == nil && fetched < maxAhead
		a.changed.Broadcast()
		a.mu.Unlock()
	}
	a.mu.Lock()
	for a.err == nil && !a.over {
		a.changed.Wait()
	}
	a.mu.Unlock()
}
