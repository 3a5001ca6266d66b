package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// meetTimeout is how long the streams of an attachment wait for each other. They are sent together.
	meetTimeout = 10 * time.Second
	// maxPlaces bounds the attachments whose streams are not all there.
	maxPlaces = 256
)

// Meeting brings the streams of attachments together, on the side that accepts them. The zero value is ready.
type Meeting struct {
	mu     sync.Mutex
	places map[string]*place
}

type place struct {
	streams map[string]*Stream
	changed chan struct{} // closed and replaced at every arrival
	expire  *time.Timer
}

// at returns the place of a nonce; mu is held.
func (m *Meeting) at(nonce string) *place {
	if p := m.places[nonce]; p != nil {
		return p
	}
	if len(m.places) >= maxPlaces {
		return nil
	}
	if m.places == nil {
		m.places = make(map[string]*place)
	}
	p := &place{streams: make(map[string]*Stream), changed: make(chan struct{})}
	p.expire = time.AfterFunc(meetTimeout, func() { m.leave(nonce, p) })
	m.places[nonce] = p
	return p
}

// leave closes what nobody came for.
func (m *Meeting) leave(nonce string, p *place) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p.expire.Stop()
	if m.places[nonce] == p {
		delete(m.places, nonce)
	}
	for part, s := range p.streams {
		s.Close()
		delete(p.streams, part)
	}
}

// Join hands in a data stream (h.Part is not empty). It takes the stream over.
func (m *Meeting) Join(h Header, s *Stream) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.at(h.Nonce)
	if h.Nonce == "" || p == nil || p.streams[h.Part] != nil {
		s.Close()
		return
	}
	p.streams[h.Part] = s
	close(p.changed)
	p.changed = make(chan struct{})
}

// Attach waits for the streams that the control stream's header names. It takes control over: on error it is closed, after the
// client was told.
func (m *Meeting) Attach(ctx context.Context, h Header, control *Stream) (*Attachment, error) {
	a := &Attachment{control: control}
	ctx, cancel := context.WithTimeout(ctx, meetTimeout)
	defer cancel()
	streams, err := m.gather(ctx, h)
	if err != nil {
		a.Fail(err)
		return nil, err
	}
	for part, s := range streams {
		switch part {
		case PartStdin:
			a.Stdin = s
		case PartStdout:
			a.Stdout = NewOut(s)
		case PartStderr:
			a.Stderr = NewOut(s)
		}
	}
	return a, nil
}

func (m *Meeting) gather(ctx context.Context, h Header) (map[string]*Stream, error) {
	if len(h.Parts) == 0 {
		return nil, nil
	}
	if h.Nonce == "" {
		return nil, Errorf(CodeInvalid, "attach: header has parts and no nonce")
	}
	m.mu.Lock()
	p := m.at(h.Nonce)
	if p == nil {
		m.mu.Unlock()
		return nil, Errorf(CodeInvalid, "attach: too many unfinished attachments")
	}
	for {
		all := true
		for _, part := range h.Parts {
			all = all && p.streams[part] != nil
		}
		if all {
			got := p.streams
			p.streams = nil // nothing is left for leave to close
			p.expire.Stop()
			delete(m.places, h.Nonce)
			m.mu.Unlock()
			return got, nil
		}
		changed := p.changed
		m.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			m.leave(h.Nonce, p)
			return nil, fmt.Errorf("attach: streams did not arrive: %w", ctx.Err())
		}
		m.mu.Lock()
		if m.places[h.Nonce] != p {
			m.mu.Unlock()
			return nil, Errorf(CodeInvalid, "attach: streams did not arrive in time")
		}
	}
}

// Attachment is the serving side of a process-like connection. Streams the client did not ask for are nil. Exactly one of
// Fail or Started is sent, and Exit after Started, or Fail when it cannot be told.
type Attachment struct {
	control *Stream
	Stdin   *Stream
	Stdout  *Out
	Stderr  *Out
	sending sync.Mutex
}

func (a *Attachment) send(st status) error {
	a.sending.Lock()
	defer a.sending.Unlock()
	return WriteMsg(a.control, st, MaxMessage)
}

// Started tells the client that the process runs.
func (a *Attachment) Started(pid int) error { return a.send(status{Started: true, PID: pid}) }

// Fail tells the client that it could not be started, and closes the attachment.
func (a *Attachment) Fail(err error) error {
	serr := a.send(status{Error: asError(err)})
	a.Close()
	return serr
}

// Ended tells the client, before Exit does, that the process has ended: what is left of its output has a bound, and the client should
// fetch it however slow its reader is.
func (a *Attachment) Ended() error { return a.send(status{Ended: true}) }

// Exit tells the client how the process ended, and closes the attachment. All output must have been written and closed before.
func (a *Attachment) Exit(st ExitStatus) error {
	err := a.send(status{Exit: &st})
	a.Close()
	return err
}

// Next waits for the client's next wish. Any error means that the client is gone.
func (a *Attachment) Next() (Event, error) {
	var ev Event
	err := ReadMsg(a.control, &ev, MaxMessage)
	return ev, err
}

// Close ends every stream. It may be called more than once.
func (a *Attachment) Close() {
	for _, o := range []*Out{a.Stdout, a.Stderr} {
		if o != nil {
			o.Close()
		}
	}
	if a.Stdin != nil {
		a.Stdin.Close()
	}
	a.control.Close()
}

// Out is the sending end of a one-way stream.
type Out struct {
	s    *Stream
	gone chan struct{}
}

// NewOut makes a stream one-way.
func NewOut(s *Stream) *Out {
	o := &Out{s: s, gone: make(chan struct{})}
	go func() {
		// The receiver sends nothing: the end of its half is its word that it no longer reads.
		io.Copy(io.Discard, s)
		close(o.gone)
		s.SetWriteDeadline(time.Unix(1, 0))
	}()
	return o
}

// ErrGone is returned by writes after the receiver went away.
var ErrGone = errors.New("receiver is gone")

func (o *Out) Write(p []byte) (int, error) {
	select {
	case <-o.gone:
		return 0, ErrGone
	default:
	}
	n, err := o.s.Write(p)
	if err != nil {
		return n, fmt.Errorf("%w: %w", ErrGone, err)
	}
	return n, nil
}

// Gone is closed when the receiver no longer reads.
func (o *Out) Gone() <-chan struct{} { return o.gone }

// Close marks the end of the output.
func (o *Out) Close() error { return o.s.Close() }
