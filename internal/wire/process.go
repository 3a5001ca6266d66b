package wire

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/coffer-box/coffer/internal/spec"
)

// ErrDetached is what a Stdin's Read returns to leave the process' input open: its client is about to go, and not the input's end.
var ErrDetached = errors.New("detached")

// IO is what a process is connected to. A nil Stdin is /dev/null; output for which there is no writer is thrown away in the box.
// With a terminal all output comes on Stdout.
type IO struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Process is a process, or something like one, at the other end.
type Process struct {
	control *Stream
	streams map[string]*Stream
	pid     int
	sending sync.Mutex
	ended   chan struct{} // closed when the process is known to have ended
	done    chan struct{} // closed when the outcome is known
	exit    ExitStatus
	err     error
	outputs []*ahead
	copies  sync.WaitGroup
	copyErr [2]error
}

// Start starts a process in the box.
func (c *Client) Start(ctx context.Context, req ExecRequest, stdio IO) (*Process, error) {
	if req.Process.TTY {
		stdio.Stderr = nil
	}
	return c.Attach(ctx, OpExec, req, stdio)
}

// Attach opens an attachment for op: the agent serves exec this way, and a shim may serve more. It returns when the other side
// says that it has started, or why it has not, as an *Error. ctx is for the start only.
//
// A Stdin whose Read blocks is read by a goroutine that ends at the first read after the process did.
func (c *Client) Attach(ctx context.Context, op string, body any, stdio IO) (*Process, error) {
	data, err := json.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	h := Header{Op: op, Nonce: rand.Text(), Body: data}
	if stdio.Stdin != nil {
		h.Parts = append(h.Parts, PartStdin)
	}
	if stdio.Stdout != nil {
		h.Parts = append(h.Parts, PartStdout)
	}
	if stdio.Stderr != nil {
		h.Parts = append(h.Parts, PartStderr)
	}
	control, err := c.s.Open(ctx, h)
	if err != nil {
		return nil, err
	}
	streams := make(map[string]*Stream)
	fail := func(err error) (*Process, error) {
		control.Close()
		for _, s := range streams {
			s.Close()
		}
		return nil, err
	}
	for _, part := range h.Parts {
		s, err := c.s.Open(ctx, Header{Op: op, Nonce: h.Nonce, Part: part})
		if err != nil {
			return fail(err)
		}
		streams[part] = s
	}
	stop := context.AfterFunc(ctx, func() { control.SetReadDeadline(time.Unix(1, 0)) })
	var st status
	err = ReadMsg(control, &st, MaxMessage)
	if !stop() {
		return fail(fmt.Errorf("%s: %w", op, ctx.Err()))
	}
	switch {
	case err != nil:
		return fail(lost(ctx, op, err))
	case st.Error != nil:
		return fail(st.Error)
	case !st.Started:
		return fail(fmt.Errorf("%s: the answer is neither a start nor an error", op))
	}
	p := &Process{control: control, streams: streams, pid: st.PID, ended: make(chan struct{}), done: make(chan struct{})}
	p.receive(streams[PartStdout], stdio.Stdout, 0)
	p.receive(streams[PartStderr], stdio.Stderr, 1)
	if s := streams[PartStdin]; s != nil {
		go p.feed(s, stdio.Stdin)
	}
	go p.await()
	return p, nil
}

// receive copies one output. After the writer failed the stream is closed, which the process sees as a closed pipe.
func (p *Process) receive(s *Stream, w io.Writer, i int) {
	if s == nil {
		return
	}
	in := newAhead(s)
	p.outputs = append(p.outputs, in)
	p.copies.Go(func() {
		_, werr, rerr := Copy(w, in)
		p.copyErr[i] = errors.Join(werr, rerr)
		in.stop()
		s.Close()
	})
}

func (p *Process) feed(s *Stream, r io.Reader) {
	go func() {
		// The other side closes its half when nothing reads the process's stdin any more.
		io.Copy(io.Discard, s)
		s.SetWriteDeadline(time.Unix(1, 0))
	}()
	_, _, rerr := Copy(s, r) // the process may not want it all
	if errors.Is(rerr, ErrDetached) {
		return
	}
	s.CloseWrite()
}

func (p *Process) await() {
	defer close(p.done)
	var st status
	err := ReadMsg(p.control, &st, MaxMessage)
	// What still comes has an end. It is fetched however slowly it is taken here, so that the other side need not wait for that.
	close(p.ended)
	var fetches sync.WaitGroup
	for _, o := range p.outputs {
		fetches.Go(o.fetch)
	}
	if err == nil && st.Ended {
		st = status{}
		err = ReadMsg(p.control, &st, MaxMessage)
	}
	fetches.Wait()
	p.control.Close()
	// Output precedes the exit, on other streams: the outcome is known when they have ended too. On a lost connection they end
	// by themselves.
	p.copies.Wait()
	switch {
	case err != nil:
		p.err = lost(context.Background(), "wait for the process", err)
	case st.Error != nil:
		p.err = st.Error
	case st.Exit == nil:
		p.err = errors.New("wait for the process: the answer is not an exit status")
	default:
		p.exit = *st.Exit
		if err := errors.Join(p.copyErr[0], p.copyErr[1]); err != nil {
			p.err = fmt.Errorf("copy the process's output: %w", err)
		}
	}
}

// PID is the process's number inside the box.
func (p *Process) PID() int { return p.pid }

// Ended is closed when the process has ended, or the connection to it, though some of its output may still be on its way.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// Done is closed when Wait would return at once.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end of the process and of its output. It may be called more than once. The error is about the connection
// or the writers; how the process ended is in the status alone.
func (p *Process) Wait(ctx context.Context) (ExitStatus, error) {
	select {
	case <-p.done:
		return p.exit, p.err
	case <-ctx.Done():
	}
	select {
	case <-p.done:
		return p.exit, p.err // both, and that is no reason to forget the outcome
	default:
		return ExitStatus{}, ctx.Err()
	}
}

// Signal sends a signal to the process. One that has ended gets none, which is no error.
func (p *Process) Signal(ctx context.Context, n int) error { return p.send(ctx, Event{Signal: n}) }

// Resize sets the size of the process's terminal.
func (p *Process) Resize(ctx context.Context, rows, cols uint16) error {
	return p.send(ctx, Event{Resize: &spec.WinSize{Rows: rows, Cols: cols}})
}

func (p *Process) send(ctx context.Context, ev Event) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	default:
	}
	p.sending.Lock()
	defer p.sending.Unlock()
	stop := context.AfterFunc(ctx, func() { p.control.SetWriteDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			p.control.SetWriteDeadline(time.Time{})
		}
	}()
	return WriteMsg(p.control, ev, MaxMessage)
}

// Close lets go of the process: what it is connected to ends, and the process itself too, unless it was started to stay. Wait
// then reports a lost connection, where the process had not ended before.
func (p *Process) Close() error {
	err := p.control.Close()
	for _, s := range p.streams {
		s.Close()
	}
	return err
}
