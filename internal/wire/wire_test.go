package wire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair makes the two sides of a session over a real socket.
func pair(t testing.TB) (client, server *Session) {
	t.Helper()
	a, b := sockets(t)
	client, err := NewClient(a)
	if err != nil {
		t.Fatal(err)
	}
	server, err = NewServer(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func sockets(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if out[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return out[0], out[1]
}

func TestMessages(t *testing.T) {
	var buf bytes.Buffer
	want := ExitStatus{Code: 137, Signal: 9, TimedOut: true}
	if err := WriteMsg(&buf, want, MaxMessage); err != nil {
		t.Fatal(err)
	}
	var got ExitStatus
	if err := ReadMsg(&buf, &got, MaxMessage); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
	for name, c := range map[string]struct {
		in   string
		want error
	}{
		"nothing":   {"", io.EOF},
		"half size": {"\x00\x00", io.ErrUnexpectedEOF},
		"half body": {"\x00\x00\x00\x05{", io.ErrUnexpectedEOF},
		"too large": {"\xff\xff\xff\xff", ErrTooLarge},
	} {
		if err := ReadMsg(strings.NewReader(c.in), &got, MaxMessage); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	if err := WriteMsg(io.Discard, strings.Repeat("x", 100), 50); !errors.Is(err, ErrTooLarge) {
		t.Errorf("write beyond the bound: %v", err)
	}
}

func TestErrorsKeepTheirCode(t *testing.T) {
	err := fmt.Errorf("outer: %w", Errorf(CodeNotFound, "no %s", "ls"))
	got := asError(err)
	if !errors.Is(got, ErrCommandNotFound) || errors.Is(got, ErrNoUser) || got.Error() != "outer: no ls" || got.ExitCode() != 127 {
		t.Fatalf("got %#v", got)
	}
	if long := asError(errors.New(strings.Repeat("x", 1<<20))); len(long.Msg) > maxErrorText+8 {
		t.Fatalf("text of %d bytes", len(long.Msg))
	}
}

func TestHalfClose(t *testing.T) {
	client, server := pair(t)
	s, err := client.Open(t.Context(), Header{Op: "echo", Body: []byte(`{"a":1}`)})
	if err != nil {
		t.Fatal(err)
	}
	h, r, err := server.Accept(t.Context())
	if err != nil || h.Op != "echo" || string(h.Body) != `{"a":1}` {
		t.Fatal(h, err)
	}
	go func() {
		io.Copy(r, r)
		r.Close()
	}()
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // beyond the window
	go func() {
		s.Write(data)
		s.CloseWrite()
	}()
	got, err := io.ReadAll(s)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	s.Close()
}

// A reader that takes nothing must hold up neither other streams nor memory beyond the window.
func TestStuckReader(t *testing.T) {
	client, server := pair(t)
	stuck, err := client.Open(t.Context(), Header{Op: "stuck"})
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan int)
	go func() {
		n, _ := stuck.Write(make([]byte, 64<<20))
		wrote <- n
	}()
	for range 10 {
		s, err := client.Open(t.Context(), Header{Op: "other"})
		if err != nil {
			t.Fatal(err)
		}
		var other *Stream
		for other == nil {
			h, r, err := server.Accept(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if h.Op == "other" {
				other = r
			}
		}
		Reply(other, "hello", nil)
		var got string
		if err := readReply(t.Context(), "other", s, &got, MaxReply); err != nil || got != "hello" {
			t.Fatal(got, err)
		}
		s.Close()
	}
	stuck.SetWriteDeadline(time.Unix(1, 0))
	if n := <-wrote; n > window {
		t.Fatalf("%d bytes went to a reader that takes none, the window is %d", n, window)
	}
}

func TestRelay(t *testing.T) {
	client, front := pair(t)
	back, agent := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		h, a, err := front.Accept(ctx)
		if err != nil {
			ended <- err
			return
		}
		b, err := back.Open(ctx, h)
		if err != nil {
			ended <- err
			return
		}
		ended <- Relay(ctx, a, b)
	}()
	s, err := client.Open(ctx, Header{Op: "x", Nonce: "n", Body: []byte(`[1]`), Part: PartStdin})
	if err != nil {
		t.Fatal(err)
	}
	h, r, err := agent.Accept(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Header{Op: "x", Nonce: "n", Body: []byte(`[1]`), Part: PartStdin}, h); d != "" {
		t.Fatal("header changed on the way", d)
	}
	s.Write([]byte("ping"))
	s.CloseWrite()
	if got, err := io.ReadAll(r); err != nil || string(got) != "ping" {
		t.Fatal(string(got), err)
	}
	// The other direction is still open.
	r.Write([]byte("pong"))
	r.CloseWrite()
	if got, err := io.ReadAll(s); err != nil || string(got) != "pong" {
		t.Fatal(string(got), err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// The death of a relay's client must reach the agent as the end of its streams, also in the middle of a stuck write.
func TestRelayClientDies(t *testing.T) {
	client, front := pair(t)
	back, agent := pair(t)
	ended := make(chan error, 1)
	go func() {
		h, a, _ := front.Accept(t.Context())
		b, _ := back.Open(t.Context(), h)
		ended <- Relay(t.Context(), a, b)
	}()
	if _, err := client.Open(t.Context(), Header{Op: "x"}); err != nil {
		t.Fatal(err)
	}
	_, r, err := agent.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := NewOut(r)
	wrote := make(chan error, 1)
	go func() {
		for {
			if _, err := out.Write(make([]byte, 1<<20)); err != nil {
				wrote <- err
				return
			}
		}
	}()
	client.Close()
	if err := <-wrote; !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
	out.Close()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

func TestRelayEndsWithContext(t *testing.T) {
	client, front := pair(t)
	back, agent := pair(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		// Only the relay is to see the end of ctx.
		h, a, _ := front.Accept(t.Context())
		b, _ := back.Open(t.Context(), h)
		ended <- Relay(ctx, a, b)
	}()
	client.Open(t.Context(), Header{Op: "x"})
	if _, _, err := agent.Accept(t.Context()); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// A peer that opens a stream towards the host ends the session, and is not kept waiting in a queue. Without the guard the
// session lives on, and this test waits in vain.
func TestHostAcceptsNothing(t *testing.T) {
	for name, frame := range map[string]string{
		"stream by window": "\x00\x01\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00",
		"stream by data":   "\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x01x",
		"ping":             "\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07",
		"bad version":      "\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			a, b := sockets(t)
			defer b.Close()
			s, err := NewClient(a)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			// In two pieces, as the bounds of reads are not those of frames.
			b.Write([]byte(frame[:5]))
			b.Write([]byte(frame[5:]))
			select {
			case <-s.Done():
			case <-time.After(10 * time.Second):
				t.Fatal("session goes on")
			}
			if n := s.mux.NumStreams(); n != 0 {
				t.Fatalf("%d streams", n)
			}
		})
	}
}

func TestOpenGivesUpWithContext(t *testing.T) {
	a, b := sockets(t)
	defer b.Close()
	s, err := NewClient(a)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for {
		// Nobody reads: the socket fills up.
		_, err := s.Open(ctx, Header{Op: "x", Body: []byte(`"` + strings.Repeat("x", 1<<18-100) + `"`)})
		if err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			return
		}
	}
}

// serveAttach answers attachments like a shim that replays a log: no process is behind it.
func serveAttach(s *Session, f func(*Attachment)) {
	var m Meeting
	for {
		h, st, err := s.Accept(context.Background())
		if err != nil {
			return
		}
		if h.Part != PartControl {
			m.Join(h, st)
			continue
		}
		go func() {
			if a, err := m.Attach(context.Background(), h, st); err == nil {
				f(a)
			}
		}()
	}
}

func TestAttach(t *testing.T) {
	cs, ss := pair(t)
	go serveAttach(ss, func(a *Attachment) {
		a.Started(42)
		ev, err := a.Next()
		in, _ := io.ReadAll(a.Stdin)
		fmt.Fprintf(a.Stdout, "in %q event %d %v", in, ev.Signal, err)
		a.Stdout.Close()
		io.WriteString(a.Stderr, "bad")
		a.Stderr.Close()
		a.Exit(ExitStatus{Code: 3})
	})
	c := NewClientOf(cs)
	var out, errOut strings.Builder
	p, err := c.Attach(t.Context(), "shim.attach", nil, IO{Stdin: strings.NewReader("hello"), Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(t.Context(), 15); err != nil || p.PID() != 42 {
		t.Fatal(err, p.PID())
	}
	st, err := p.Wait(t.Context())
	if err != nil || st.Code != 3 || out.String() != `in "hello" event 15 <nil>` || errOut.String() != "bad" {
		t.Fatal(st, err, out.String(), errOut.String())
	}
}

type gatedWriter struct {
	gate <-chan struct{}
	strings.Builder
}

func (g *gatedWriter) Write(p []byte) (int, error) {
	<-g.gate
	return g.Builder.Write(p)
}

// Once the process has ended, the client fetches all of its output and lets go of the server, however slow its own reader is.
func TestAttachFetchesTheRest(t *testing.T) {
	cs, ss := pair(t)
	text := strings.Repeat("0123456789abcdef", 1<<18) // beyond the window
	gone := make(chan struct{})
	go serveAttach(ss, func(a *Attachment) {
		defer close(gone)
		a.Started(1)
		io.WriteString(a.Stdout, text[:100])
		a.Ended()
		io.WriteString(a.Stdout, text[100:])
		a.Stdout.Close()
		a.Exit(ExitStatus{Code: 3})
		a.Next()
	})
	gate := make(chan struct{})
	out := &gatedWriter{gate: gate}
	p, err := NewClientOf(cs).Attach(t.Context(), "x", nil, IO{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-gone:
	case <-time.After(30 * time.Second):
		t.Fatal("the server still waits for a reader that does not read")
	}
	ss.Close()
	close(gate)
	if st, err := p.Wait(t.Context()); err != nil || st.Code != 3 || out.String() != text {
		t.Fatal(st, err, out.Len())
	}
}

func TestAttachFails(t *testing.T) {
	cs, ss := pair(t)
	go serveAttach(ss, func(a *Attachment) { a.Fail(Errorf(CodeNotFound, "no such thing")) })
	_, err := NewClientOf(cs).Attach(t.Context(), "shim.attach", nil, IO{Stdout: io.Discard})
	if !errors.Is(err, ErrCommandNotFound) {
		t.Fatal(err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

// A client that can no longer write must be seen by the serving side, and its Wait must end.
func TestAttachWriterFails(t *testing.T) {
	cs, ss := pair(t)
	go serveAttach(ss, func(a *Attachment) {
		a.Started(1)
		io.WriteString(a.Stdout, "x")
		<-a.Stdout.Gone()
		a.Exit(ExitStatus{})
	})
	p, err := NewClientOf(cs).Attach(t.Context(), "x", nil, IO{Stdout: brokenWriter{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = p.Wait(t.Context()); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Fatal(err)
	}
}

func TestSessionLossEndsWait(t *testing.T) {
	cs, ss := pair(t)
	go serveAttach(ss, func(a *Attachment) {
		a.Started(1)
		ss.Close()
	})
	p, err := NewClientOf(cs).Attach(t.Context(), "x", nil, IO{Stdout: io.Discard})
	if err == nil {
		_, err = p.Wait(t.Context())
	}
	if !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestChunks(t *testing.T) {
	var buf bytes.Buffer
	data := bytes.Repeat([]byte("chunk"), 50_000)
	w := NewChunkWriter(&buf)
	w.Write(data)
	w.Finish(nil)
	whole := bytes.Clone(buf.Bytes())
	if got, err := io.ReadAll(NewChunkReader(&buf)); err != nil || !bytes.Equal(got, data) {
		t.Fatal(len(got), err)
	}
	for _, n := range []int{0, 3, 100, len(whole) - 1, len(whole) - 10} {
		if _, err := io.ReadAll(NewChunkReader(bytes.NewReader(whole[:n]))); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	buf.Reset()
	NewChunkWriter(&buf).Finish(Errorf(CodeNoFile, "gone"))
	if _, err := io.ReadAll(NewChunkReader(&buf)); !errors.Is(err, ErrNoFile) {
		t.Fatal(err)
	}
}

// TestCloseWhileReading: a stream that is closed while it is being read, and by its peer, comes to its end.
func TestCloseWhileReading(t *testing.T) {
	client, server := pair(t)
	go func() {
		for {
			_, s, err := server.Accept(t.Context())
			if err != nil {
				return
			}
			go func() {
				for range 5 {
					_, _ = s.Write(make([]byte, 100))
				}
				s.Close()
			}()
		}
	}()
	const atOnce = 50
	ended := make(chan struct{}, atOnce)
	for range 100 {
		for range atOnce {
			s, err := client.Open(t.Context(), Header{Op: "x"})
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s}, make([]byte, 30))
				ended <- struct{}{}
			}()
			go s.Close()
		}
		for range atOnce {
			select {
			case <-ended:
			case <-time.After(20 * time.Second):
				t.Fatal("a reader never ends")
			}
		}
	}
}
