package shim

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/wire"
)

// hub brings the main process' output to the log and to whoever is attached.
type hub struct {
	slog *slog.Logger

	mu      sync.Mutex
	log     *logfile.Writer
	path    string
	subs    map[*sub]bool
	changed chan struct{} // closed and replaced when a client has gone

	endOnce, deadOnce sync.Once
	ending            chan struct{} // closed when the main process has ended, though not all of its output is here
	dead              chan struct{} // closed when nothing of the box lives: what still comes was under way
}

func newHub(log *slog.Logger, w *logfile.Writer, path string) *hub {
	return &hub{slog: log, log: w, path: path, subs: map[*sub]bool{}, changed: make(chan struct{}), ending: make(chan struct{}),
		dead: make(chan struct{})}
}

// end says that the main process has ended.
func (h *hub) end() { h.endOnce.Do(func() { close(h.ending) }) }

// die says that nothing of the box lives.
func (h *hub) die() {
	h.end()
	h.deadOnce.Do(func() { close(h.dead) })
}

// sub is one attached client.
type sub struct {
	out, err lane
	must     bool // the box waits for this client rather than losing it
	gone     chan struct{}
	once     sync.Once
	lagged   atomic.Bool // it was cut off
}

// lane is one output on its way to one client.
type lane struct {
	ch chan []byte
	// rest comes after what is in ch. It is the writer's until the output has ended.
	rest [][]byte
	size int
}

const (
	// queue is how many pieces of output (of at most 64 KiB) wait for a client. One that falls further behind is dropped, with an
	// error, unless the box must wait for it.
	queue = 128
	// maxRest is what may be kept for a client once the main process has ended, so that its end waits for no reader. What the process
	// can have left in its pipes and on the wire is less; only an agent that is not ours any more sends more.
	maxRest = 4 << 20
)

func newSub(must bool) *sub {
	return &sub{out: lane{ch: make(chan []byte, queue)}, err: lane{ch: make(chan []byte, queue)}, must: must, gone: make(chan struct{})}
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
		l := &s.out
		if w.stream == logfile.Stderr {
			l = &s.err
		}
		h.put(s, l, b)
	}
	return len(p), nil
}

// put brings a piece of output on its way to a client.
func (h *hub) put(s *sub, l *lane, b []byte) {
	// Asked first: one that was cut off must not get what came after, though its queue may have room again.
	select {
	case <-s.gone:
		return
	default:
	}
	if len(l.rest) == 0 {
		select {
		case l.ch <- b:
			return
		default:
		}
		if !s.must {
			s.lagged.Store(true)
			s.drop()
			return
		}
		select {
		case l.ch <- b:
			return
		case <-s.gone:
			return
		case <-h.ending:
		}
	}
	if l.size+len(b) > maxRest {
		select {
		case <-s.gone:
			return
		case <-h.dead:
		}
	}
	l.rest = append(l.rest, b)
	l.size += len(b)
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
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	s.drop()
}

// delivered returns when every client has got what it was to get, or has gone, or ctx ends.
func (h *hub) delivered(ctx context.Context) {
	for {
		h.mu.Lock()
		left, changed := len(h.subs), h.changed
		h.mu.Unlock()
		if left == 0 {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// pump writes what comes on l to out, until ended is closed and nothing is left, or the receiver is gone.
func pump(l *lane, out *wire.Out, s *sub, ended <-chan struct{}) {
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
		case b := <-l.ch:
			if !write(b) {
				s.discard(l.ch, ended)
				return
			}
		case <-s.gone:
			return
		case <-ended:
			for len(l.ch) > 0 {
				if !write(<-l.ch) {
					return
				}
			}
			for _, b := range l.rest {
				if !write(b) {
					return
				}
			}
			return
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
