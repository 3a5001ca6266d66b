package shim

import (
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/wire"
)

// hub brings the main process' output to the log and to whoever is attached.
type hub struct {
	slog *slog.Logger

	mu   sync.Mutex
	log  *logfile.Writer
	path string
	subs map[*sub]bool
}

// sub is one attached client.
type sub struct {
	out, err chan []byte
	must     bool // the box waits for this client rather than losing it
	gone     chan struct{}
	once     sync.Once
	lagged   atomic.Bool // it was cut off
}

// queue is how many pieces of output (of at most 32 KiB) wait for a client. One that falls further behind is dropped, with an
// error, unless the box must wait for it.
const queue = 128

func newSub(must bool) *sub {
	return &sub{out: make(chan []byte, queue), err: make(chan []byte, queue), must: must, gone: make(chan struct{})}
}

func (s *sub) drop() { s.once.Do(func() { close(s.gone) }) }

// writer is one of the main process' two outputs.
type writer struct {
	h      *hub
	stream string
}

// Write implements [io.Writer]. It never fails: neither a full disk nor a lost client may end the box.
func (w writer) Write(p []byte) (int, error) {
	h := w.h
	h.mu.Lock()
	if err := h.log.Append(w.stream, p); err != nil {
		h.slog.Warn("output not logged", "error", err)
	}
	subs := make([]*sub, 0, len(h.subs))
	for s := range h.subs {
		subs = append(subs, s)
	}
	h.mu.Unlock()
	if len(subs) == 0 {
		return len(p), nil
	}
	b := append([]byte(nil), p...)
	for _, s := range subs {
		ch := s.out
		if w.stream == logfile.Stderr {
			ch = s.err
		}
		// Asked first: one that was cut off must not get what came after, though its queue may have room again.
		select {
		case <-s.gone:
			continue
		default:
		}
		select {
		case ch <- b:
			continue
		default:
		}
		if !s.must {
			s.lagged.Store(true)
			s.drop()
			continue
		}
		select {
		case ch <- b:
		case <-s.gone:
		}
	}
	return len(p), nil
}

// join adds a client. The snapshot holds exactly the output that the client will not get live.
func (h *hub) join(s *sub, backlog bool) (*logfile.Snapshot, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var snap *logfile.Snapshot
	if backlog {
		var err error
		if snap, err = logfile.Snap(h.path); err != nil {
			return nil, err
		}
	}
	h.subs[s] = true
	return snap, nil
}

func (h *hub) leave(s *sub) {
	h.mu.Lock()
	delete(h.subs, s)
	h.mu.Unlock()
	s.drop()
}

// pump writes what comes on ch to out, until ended is closed and ch is empty, or the receiver is gone.
func pump(ch <-chan []byte, out *wire.Out, s *sub, ended <-chan struct{}) {
	if out != nil {
		defer out.Close()
	}
	write := func(b []byte) bool {
		if out == nil {
			return true
		}
		_, err := out.Write(b)
		return err == nil
	}
	for {
		select {
		case b := <-ch:
			if !write(b) {
				s.discard(ch, ended)
				return
			}
		case <-s.gone:
			return
		case <-ended:
			for {
				select {
				case b := <-ch:
					if !write(b) {
						return
					}
				default:
					return
				}
			}
		}
	}
}

// discard keeps a client that no longer reads one of its streams from holding up the box.
func (s *sub) discard(ch <-chan []byte, ended <-chan struct{}) {
	for {
		select {
		case <-ch:
		case <-s.gone:
			return
		case <-ended:
			return
		}
	}
}
