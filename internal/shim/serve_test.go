//go:build linux

package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/wire"
)

// served is a running box whose agent is the test: it has the shim's socket, hub and log, and no jail.
type served struct {
	t    testing.TB
	r    *running
	sock string
	main *wire.Attachment // the agent's side of the main process
}

// serveBox starts a box whose log is rotated after so many bytes.
func serveBox(t testing.TB, logBytes int64) *served {
	t.Helper()
	dir, err := os.MkdirTemp("", "shim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// Enough files for all that a test writes: how much is kept is the log's affair, and not the matter here.
	path := filepath.Join(dir, "output.log")
	log, err := logfile.NewWriter(path, logBytes, 1000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	quiet := slog.New(slog.DiscardHandler)
	b := &served{t: t, sock: filepath.Join(dir, "sock")}
	agent := make(chan *wire.Attachment, 1)
	b.r = &running{
		s: &shim{log: quiet, box: &state.Box{}}, jail: &jail.Jail{}, ended: make(chan struct{}),
		agent: wire.NewClientOf(fakeAgent(t, agent)),
		hub:   newHub(quiet, log, path),
	}
	if b.r.listener, err = net.Listen("unix", b.sock); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.r.listener.Close() })
	b.r.open()
	if err := b.r.startMain(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	b.main = <-agent
	return b
}

// fakeAgent hands the main process over, and has every other call succeed.
func fakeAgent(t testing.TB, main chan<- *wire.Attachment) *wire.Session {
	t.Helper()
	ours, theirs := net.Pipe()
	server := make(chan *wire.Session, 1)
	go func() {
		s, err := wire.NewServer(theirs)
		if err != nil {
			close(server)
			return
		}
		server <- s
	}()
	client, err := wire.NewClient(ours)
	if err != nil {
		t.Fatal(err)
	}
	s, ok := <-server
	if !ok {
		t.Fatal("no session with the agent")
	}
	t.Cleanup(func() { client.Close(); s.Close() })
	go func() {
		var meet wire.Meeting
		for {
			h, st, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			switch {
			case h.Op == wire.OpExec && h.Part != wire.PartControl:
				meet.Join(h, st)
			case h.Op == wire.OpExec:
				go func() {
					if a, err := meet.Attach(context.Background(), h, st); err == nil {
						_ = a.Started(1)
						select {
						case main <- a:
						default:
							_ = a.Exit(wire.ExitStatus{})
						}
					}
				}()
			default:
				go func() { _ = wire.Reply(st, struct{}{}, nil) }()
			}
		}
	}()
	return client
}

// end ends the main process as the agent reports it, after all its output.
func (b *served) end(code int) {
	b.t.Helper()
	if err := b.main.Exit(wire.ExitStatus{Code: code}); err != nil {
		b.t.Fatal(err)
	}
	b.r.status, b.r.lost = b.r.main.Wait(context.Background())
	b.r.hub.end()
	close(b.r.ended)
}

func (b *served) dial() net.Conn {
	b.t.Helper()
	c, err := net.Dial("unix", b.sock)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

func (b *served) client() (*wire.Client, net.Conn) {
	b.t.Helper()
	c := b.dial()
	s, err := wire.NewClient(c)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { s.Close() })
	return wire.NewClientOf(s), c
}

// text is n numbered lines, so that anything lost or doubled shows.
func text(from, n int) []byte {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintf(&b, "%09d\n", from+i)
	}
	return b.Bytes()
}

// gated is a writer that waits for each write to be allowed; a closed gate lets everything pass.
type gated struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	gate <-chan struct{}
}

func (g *gated) Write(p []byte) (int, error) {
	<-g.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.buf.Write(p)
}

func (g *gated) bytes() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	return bytes.Clone(g.buf.Bytes())
}

func open() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// eventually waits for what must come about; how long it takes is not judged.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("never came about: %s", what)
}

type attached struct {
	out  *gated
	p    *wire.Process
	conn net.Conn
}

func (b *served) attach(t *testing.T, gate <-chan struct{}) *attached {
	t.Helper()
	c, conn := b.client()
	a := &attached{out: &gated{gate: gate}, conn: conn}
	var err error
	if a.p, err = c.Attach(t.Context(), OpAttach, AttachRequest{Backlog: true}, wire.IO{Stdout: a.out, Stderr: io.Discard}); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestAttach: clients that attach at any moment, while the log is rotated under them, get everything once and in order, and the exit
// code after it. One that is too slow may be cut off, but what it got has no hole. One that vanishes is forgotten, and neither that nor
// one that never reads holds up the box.
func TestAttach(t *testing.T) {
	b := serveBox(t, 64<<10)
	const pieces, lines = 1000, 1000
	want := text(0, pieces*lines)
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	later := make(chan struct{})
	var fast, slow []*attached
	for i := range pieces {
		switch {
		case i%200 == 20:
			fast = append(fast, b.attach(t, open()))
		case i == 10:
			b.attach(t, never)
		case i%300 == 50:
			slow = append(slow, b.attach(t, later))
		case i%300 == 100:
			b.attach(t, open()).conn.Close()
		}
		if _, err := b.main.Stdout.Write(want[i*lines*10 : (i+1)*lines*10]); err != nil {
			t.Fatal(err)
		}
		if i%20 == 19 {
			for n, c := range fast {
				eventually(t, fmt.Sprintf("client %d has everything", n), func() bool { return len(c.out.bytes()) == (i+1)*lines*10 })
			}
		}
	}
	close(later)
	eventually(t, "only the clients that read are left", func() bool {
		b.r.hub.mu.Lock()
		defer b.r.hub.mu.Unlock()
		return len(b.r.hub.subs) <= len(fast)+len(slow)+1
	})
	b.end(3)
	for i, c := range fast {
		if st, err := c.p.Wait(t.Context()); err != nil || st.Code != 3 || !bytes.Equal(c.out.bytes(), want) {
			t.Errorf("client %d: code %d, %v, %d of %d bytes", i, st.Code, err, len(c.out.bytes()), len(want))
		}
	}
	for i, c := range slow {
		if st, err := c.p.Wait(t.Context()); err == nil && (st.Code != 3 || !bytes.Equal(c.out.bytes(), want)) {
			t.Errorf("slow client %d was told the end, with %d of %d bytes", i, len(c.out.bytes()), len(want))
		}
		if !bytes.HasPrefix(want, c.out.bytes()) {
			t.Errorf("slow client %d got output with a hole in it", i)
		}
	}
	var logged bytes.Buffer
	snap, err := logfile.Snap(b.r.hub.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := snap.Each(func(e logfile.Entry) error { logged.Write(e.Data()); return nil }); err != nil || !bytes.Equal(logged.Bytes(), want) {
		t.Errorf("the log holds %d of %d bytes: %v", logged.Len(), len(want), err)
	}
}

// TestNoHole: a client that was cut off gets nothing that came after, however the queue has emptied since.
func TestNoHole(t *testing.T) {
	for range 50 {
		h := testHub(t)
		s := newSub(false)
		h.subs[s] = true
		w := writer{h, logfile.Stdout}
		for i := range queue + 1 { // one too many
			fmt.Fprint(w, i)
		}
		<-s.out.ch
		fmt.Fprint(w, "after")
		for range queue - 1 {
			<-s.out.ch
		}
		select {
		case p := <-s.out.ch:
			t.Fatalf("%q was queued though a piece before it was lost", p)
		default:
		}
	}
}

func testHub(t *testing.T) *hub {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	log, err := logfile.NewWriter(path, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	return newHub(slog.New(slog.DiscardHandler), log, path)
}

// TestMustClient: the box waits for the client that started it, and no longer once that has gone.
func TestMustClient(t *testing.T) {
	h := testHub(t)
	s := newSub(true)
	h.subs[s] = true
	written := make(chan int, queue+2)
	go func() {
		for i := range queue + 2 {
			fmt.Fprint(writer{h, logfile.Stdout}, i)
			written <- i
		}
		close(written)
	}()
	for range queue {
		<-written
	}
	// The next is stuck: it goes on with every piece that is taken, and none is lost.
	for i := range queue + 1 {
		if got := string(<-s.out.ch); got != fmt.Sprint(i) {
			t.Fatalf("piece %s, not %d", got, i)
		}
	}
	for range written {
	}
	for i := range queue {
		if len(s.out.ch) == queue {
			break
		}
		fmt.Fprint(writer{h, logfile.Stdout}, i)
	}
	done := make(chan struct{})
	go func() {
		fmt.Fprint(writer{h, logfile.Stdout}, "last")
		close(done)
	}()
	h.leave(s)
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("the box still waits for a client that has gone")
	}
}

// TestEndWaitsForNoReader: the last output of a main process that has ended is kept for the client that started it, and the box's end
// waits for no reader; what an agent goes on to send all the same has a bound, until nothing of the box lives.
func TestEndWaitsForNoReader(t *testing.T) {
	h := testHub(t)
	s := newSub(true)
	h.subs[s] = true
	piece := bytes.Repeat([]byte("x"), 64<<10)
	written := make(chan int, 1000)
	go func() {
		defer close(written)
		for i := range queue + maxRest/len(piece) + 2 {
			piece[0] = byte(i)
			_, _ = writer{h, logfile.Stdout}.Write(piece)
			written <- i
		}
	}()
	wait := func(n int) {
		t.Helper()
		for i := range n {
			if got, ok := <-written; !ok || got != i && n == queue {
				t.Fatalf("piece %d: %d, %v", i, got, ok)
			}
		}
	}
	wait(queue)
	h.end()
	wait(maxRest / len(piece))
	eventually(t, "the bound is met", func() bool { return len(written) == 0 })
	h.die()
	wait(2)
	if _, more := <-written; more {
		t.Fatal("more was written than there is")
	}
	for i := range queue {
		if p := <-s.out.ch; p[0] != byte(i) {
			t.Fatalf("piece %d is %d", i, p[0])
		}
	}
	for i, p := range s.out.rest {
		if p[0] != byte(queue+i) {
			t.Fatalf("piece %d is %d", queue+i, p[0])
		}
	}
	if want := maxRest/len(piece) + 2; len(s.out.rest) != want {
		t.Errorf("%d pieces are kept for the end, not %d", len(s.out.rest), want)
	}
}

// TestDelivered: the shim's end waits for the clients that have not got theirs, and for none that has gone.
func TestDelivered(t *testing.T) {
	b := serveBox(t, 0)
	later := make(chan struct{})
	slow, dead := b.attach(t, later), b.attach(t, open())
	want := text(0, 500_000) // more than fits the connection, less than the queue
	if _, err := b.main.Stdout.Write(want); err != nil {
		t.Fatal(err)
	}
	dead.conn.Close()
	b.end(3)
	// Nobody takes the output, and the shim is let go all the same: the client has it all.
	b.r.hub.delivered(t.Context())
	if n := len(slow.out.bytes()); n != 0 {
		t.Fatalf("%d bytes were taken", n)
	}
	slow.conn.Close()
	close(later)
	if st, err := slow.p.Wait(t.Context()); err != nil || st.Code != 3 || !bytes.Equal(slow.out.bytes(), want) {
		t.Errorf("code %d, %v, %d of %d bytes", st.Code, err, len(slow.out.bytes()), len(want))
	}
}

// failing fails to accept a few times.
type failing struct {
	net.Listener
	left atomic.Int32
}

func (f *failing) Accept() (net.Conn, error) {
	if f.left.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return f.Listener.Accept()
}

// TestAcceptFails: a connection that could not be accepted keeps no other from being.
func TestAcceptFails(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	f := &failing{Listener: l}
	f.left.Store(3)
	b := serveBox(t, 0)
	r := &running{s: b.r.s, agent: b.r.agent, listener: f}
	served := make(chan struct{})
	go func() {
		r.serve()
		close(served)
	}()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := wire.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := wire.NewClientOf(s).Sync(ctx); err != nil {
		t.Error(err)
	}
	l.Close()
	<-served
}

// TestRelay: what the shim does not serve itself reaches the agent, and its answer the client.
func TestRelay(t *testing.T) {
	b := serveBox(t, 0)
	c, _ := b.client()
	if err := c.Sync(t.Context()); err != nil {
		t.Error(err)
	}
	var none struct{}
	err := c.Call(t.Context(), OpStop, json.RawMessage(`{"timeout":"x"}`), &none)
	if err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("a malformed stop: %v", err)
	}
}

// FuzzRequest sends the shim's own operations with any body.
func FuzzRequest(f *testing.F) {
	f.Add(true, []byte(`{"backlog":true,"close_stdin":true,"win_size":{"rows":1,"cols":2}}`))
	f.Add(true, []byte(`{"start":true}`))
	f.Add(false, []byte(`{"timeout":-1,"signal":15}`))
	f.Add(false, []byte(`{"timeout":9223372036854775807,"restart":true}`))
	f.Add(true, []byte(`[`))
	f.Fuzz(func(t *testing.T, attach bool, body []byte) {
		if !json.Valid(body) {
			body, _ = json.Marshal(string(body)) // a header holds JSON
		}
		b := serveBox(t, 0)
		c, _ := b.client()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if !attach {
			_ = c.Call(ctx, OpStop, json.RawMessage(body), nil)
		} else if p, err := c.Attach(ctx, OpAttach, json.RawMessage(body), wire.IO{Stdout: io.Discard}); err == nil {
			p.Close()
		}
		// Whatever that was, the next client is served.
		good, _ := b.client()
		if err := good.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		b.end(0)
	})
}

// FuzzBytes sends the shim anything at all.
func FuzzBytes(f *testing.F) {
	f.Add([]byte("\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x18\x00\x00\x00\x14{\"op\":\"shim.attach\"}"))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte("\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := serveBox(t, 0)
		c := b.dial()
		_, _ = c.Write(data)
		c.Close()
		good, _ := b.client()
		if err := good.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		b.end(0)
	})
}
