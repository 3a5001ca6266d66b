package wire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// window is what a stream's sender may have under way. One MiB keeps a bulk copy from waiting for its reader over a
	// socket, and is the most that a hostile peer can make us hold per stream that we opened.
	window = 1 << 20
	// maxStreams bounds the streams a peer may have open towards an accepting side, and what the other side opens.
	maxStreams = 1024
	// maxLingering bounds the streams that we opened and closed and the peer did not, for each of which it can make us hold a window.
	// It is more than an honest peer needs even when many processes end at once: who opens waits for it.
	maxLingering = 64
	// headerTimeout is how long an accepted stream may take to say what it is for.
	headerTimeout = 10 * time.Second
	// closeTimeout frees a stream that we closed and the peer never does. It is this long because it also ends a stream whose
	// reader takes its time over the last bytes, as a pager does.
	closeTimeout = 24 * time.Hour
	// forever stands for "no time limit" where yamux wants one. A paused box does not read for as long as it is paused, and
	// that must not count as an error.
	forever = 365 * 24 * time.Hour
)

// ErrTooManyStreams is returned where a session has all the streams that it may have.
var ErrTooManyStreams = errors.New("too many open streams to the box")

// ErrClosed is returned by calls on a session that has ended.
var ErrClosed = errors.New("connection to the box is closed")

// Session multiplexes streams over one connection. One side, the host, opens streams; the other accepts them. Neither uses
// keepalives: the death of a peer is seen by the end of the connection.
type Session struct {
	mux   *yamux.Session
	guard *guardConn
	live  atomic.Int64
	// Streams that we opened and closed and the peer did not, and a word that there is one less.
	lingering atomic.Int64
	less      chan struct{}

	accepted chan acceptedStream
	loops    sync.WaitGroup
}

type acceptedStream struct {
	h Header
	s *Stream
}

// NewClient makes the side of conn that opens streams. It owns conn. A peer that opens a stream itself is hostile or broken,
// and ends the session.
func NewClient(conn io.ReadWriteCloser) (*Session, error) { return newSession(conn, false) }

// NewServer makes the side of conn that accepts streams. It owns conn.
func NewServer(conn io.ReadWriteCloser) (*Session, error) { return newSession(conn, true) }

func newSession(conn io.ReadWriteCloser, acceptor bool) (*Session, error) {
	cfg := &yamux.Config{
		AcceptBacklog:          256,
		EnableKeepAlive:        false,
		KeepAliveInterval:      time.Hour, // checked even when unused
		ConnectionWriteTimeout: forever,
		MaxStreamWindowSize:    window,
		StreamCloseTimeout:     closeTimeout,
		LogOutput:              io.Discard,
	}
	s := &Session{guard: &guardConn{conn: conn, acceptor: acceptor}, less: make(chan struct{}, 1)}
	var err error
	if acceptor {
		s.mux, err = yamux.Server(s.guard, cfg)
	} else {
		s.mux, err = yamux.Client(s.guard, cfg)
	}
	if err != nil {
		return nil, fmt.Errorf("start session: %w", err)
	}
	if acceptor {
		s.accepted = make(chan acceptedStream)
		s.loops.Go(s.acceptLoop)
	}
	return s, nil
}

// Done is closed when the session has ended, from whichever side.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Close ends the session, its streams and the connection. It returns when nothing of it runs any more.
func (s *Session) Close() error {
	err := s.mux.Close()
	s.loops.Wait()
	return err
}

// Open starts a stream. The announcement and the header travel together, and nobody waits for an answer.
//
// When ctx ends first, the stream is given up; should the connection be stuck, the piece being sent stays with it until the
// session ends.
func (s *Session) Open(ctx context.Context, h Header) (*Stream, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	b, err := frame(h, MaxHeader)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", h.Op, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := s.admit(ctx); err != nil {
		return nil, fmt.Errorf("open %s: %w", h.Op, err)
	}
	type result struct {
		s   *Stream
		err error
	}
	open := func() result {
		m, err := s.mux.OpenStream()
		if err != nil {
			s.live.Add(-1)
			return result{nil, fmt.Errorf("open %s: %w", h.Op, closedErr(err))}
		}
		st := &Stream{mux: m, opener: s}
		if _, err := m.Write(b); err != nil {
			st.Close()
			return result{nil, fmt.Errorf("open %s: %w", h.Op, closedErr(err))}
		}
		return result{st, nil}
	}
	if ctx.Done() == nil {
		r := open()
		return r.s, r.err
	}
	done := make(chan result, 1)
	go func() { done <- open() }()
	select {
	case r := <-done:
		return r.s, r.err
	case <-ctx.Done():
		go func() {
			if r := <-done; r.s != nil {
				r.s.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// admit waits until the peer has closed enough of what we did, and counts one stream more.
func (s *Session) admit(ctx context.Context) error {
	for s.lingering.Load() >= maxLingering {
		select {
		case <-s.less:
		case <-s.Done():
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("the box has not closed %d streams that are over: %w", maxLingering, ctx.Err())
		}
	}
	s.oneLess() // for the next who waits
	if s.live.Add(1) > maxStreams {
		s.live.Add(-1)
		return ErrTooManyStreams
	}
	return nil
}

func (s *Session) oneLess() {
	select {
	case s.less <- struct{}{}:
	default:
	}
}

// Accept returns the next stream whose header has arrived and is valid. Streams that never say what they are for hold nobody
// up. Streams need not arrive in the order in which they were opened.
func (s *Session) Accept(ctx context.Context) (Header, *Stream, error) {
	if s.accepted == nil {
		return Header{}, nil, errors.New("accept: this side of the session only opens streams")
	}
	select {
	case a := <-s.accepted:
		return a.h, a.s, nil
	case <-s.Done():
		return Header{}, nil, ErrClosed
	case <-ctx.Done():
		return Header{}, nil, ctx.Err()
	}
}

func (s *Session) acceptLoop() {
	for {
		m, err := s.mux.AcceptStream()
		if err != nil {
			return
		}
		if s.live.Add(1) > maxStreams {
			s.live.Add(-1)
			m.Close()
			continue
		}
		st := &Stream{mux: m, release: sync.OnceFunc(func() { s.live.Add(-1) })}
		s.loops.Go(func() { s.readHeader(st) })
	}
}

func (s *Session) readHeader(st *Stream) {
	st.SetReadDeadline(time.Now().Add(headerTimeout))
	data, err := readFrame(st, MaxHeader)
	if err != nil {
		st.Close()
		return
	}
	h, err := ParseHeader(data)
	if err != nil {
		st.Close()
		return
	}
	st.SetReadDeadline(time.Time{})
	select {
	case s.accepted <- acceptedStream{h, st}:
	case <-s.Done():
		st.Close()
	}
}

func closedErr(err error) error {
	switch {
	case errors.Is(err, yamux.ErrSessionShutdown), errors.Is(err, yamux.ErrRemoteGoAway), errors.Is(err, io.EOF):
		return ErrClosed
	}
	return err
}

// Stream is one flow-controlled, bidirectional byte stream of a session.
type Stream struct {
	mux     *yamux.Stream
	opener  *Session // of a stream that we opened
	release func()   // of one that the peer did
	closing atomic.Bool
	// reading is held while the multiplexer reads: two of its readers can lock each other out for good, as when one finds the stream
	// closed by the peer while the other tells that there is room again.
	reading sync.Mutex
}

func (s *Stream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	return s.mux.Read(p)
}

func (s *Stream) Write(p []byte) (int, error) {
	if s.closing.Load() {
		return 0, yamux.ErrStreamClosed
	}
	return s.mux.Write(p)
}

// CloseWrite tells the peer that nothing more will come. Reading goes on.
func (s *Stream) CloseWrite() error { return s.mux.Close() }

// Close ends both directions, and waits for nothing: not for a peer that reads nothing either. What the peer still sends is thrown
// away until it closes too, so that a peer in the middle of a write is never stuck on us.
func (s *Stream) Close() error {
	if s.closing.Swap(true) {
		return nil
	}
	if s.opener != nil {
		s.opener.lingering.Add(1)
	}
	s.mux.SetWriteDeadline(time.Unix(1, 0))
	go func() {
		_ = s.mux.Close() // only waits
		s.mux.SetReadDeadline(time.Time{})
		s.drain()
		if s.release != nil {
			s.release()
		}
		if s.opener != nil {
			s.opener.live.Add(-1)
			s.opener.lingering.Add(-1)
			s.opener.oneLess()
		}
	}()
	return nil
}

// drain throws away what comes, and the memory that it came in.
func (s *Stream) drain() {
	buf := make([]byte, 4<<10)
	for {
		if _, err := s.Read(buf); err != nil {
			return
		}
		s.mux.Shrink()
	}
}

// SetReadDeadline and SetWriteDeadline work as those of a net.Conn, also on a call that is already waiting.
func (s *Stream) SetReadDeadline(t time.Time) error  { return s.mux.SetReadDeadline(t) }
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.mux.SetWriteDeadline(t) }
