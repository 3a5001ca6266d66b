package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/coffer-box/coffer/internal/spec"
)

// Client is the host's view of an agent, over a session that leads straight to it or through a shim.
type Client struct {
	s *Session
}

// NewClientOf makes a client of a session that opens streams.
func NewClientOf(s *Session) *Client { return &Client{s: s} }

// Session is what the client uses.
func (c *Client) Session() *Session { return c.s }

// Close ends the session.
func (c *Client) Close() error { return c.s.Close() }

// reply answers a call.
type reply struct {
	Error *Error          `json:"error,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
}

// Reply answers a call that came in on s, and closes it. v may be nil.
func Reply(s *Stream, v any, err error) error {
	defer s.Close()
	r := reply{Error: asError(err)}
	if err == nil && v != nil {
		b, merr := json.Marshal(v)
		if merr != nil {
			return merr
		}
		r.Body = b
	}
	return WriteMsg(s, r, MaxReply)
}

// Call opens a stream for op, and decodes the one answer into out (which may be nil). It serves the shim's own operations too.
func (c *Client) Call(ctx context.Context, op string, in, out any) error {
	s, done, err := c.open(ctx, op, in)
	if err != nil {
		return err
	}
	defer done()
	return readReply(ctx, op, s, out, MaxReply)
}

// open opens a stream that ends with ctx.
func (c *Client) open(ctx context.Context, op string, in any) (*Stream, func(), error) {
	h := Header{Op: op}
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", op, err)
		}
		h.Body = b
	}
	s, err := c.s.Open(ctx, h)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		s.SetReadDeadline(time.Unix(1, 0))
		s.SetWriteDeadline(time.Unix(1, 0))
	})
	return s, func() { stop(); s.Close() }, nil
}

func readReply(ctx context.Context, op string, s *Stream, out any, most int) error {
	var r reply
	if err := ReadMsg(s, &r, most); err != nil {
		return lost(ctx, op, err)
	}
	if r.Error != nil {
		return r.Error
	}
	if out != nil {
		if err := json.Unmarshal(r.Body, out); err != nil {
			return fmt.Errorf("%s: decode the answer: %w", op, err)
		}
	}
	return nil
}

// lost explains a stream that ended where it should not have.
func lost(ctx context.Context, op string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", op, ctx.Err())
	}
	if errors.Is(cut(err), io.ErrUnexpectedEOF) {
		return fmt.Errorf("%s: %w before it answered", op, ErrClosed)
	}
	return fmt.Errorf("%s: %w", op, err)
}

// Extras gives the box what its kernel does not show of the image. It comes before Configure, and may come again with more.
func (c *Client) Extras(ctx context.Context, e Extras) (Info, error) {
	var info Info
	err := c.Call(ctx, OpExtras, e, &info)
	return info, err
}

// Configure sets up the box's root; but for Extras it must be the first call to an agent.
func (c *Client) Configure(ctx context.Context, s Setup) (Info, error) {
	var info Info
	err := c.Call(ctx, OpConfigure, s, &info)
	return info, err
}

// Ping asks for a sign of life.
func (c *Client) Ping(ctx context.Context) (Info, error) {
	var info Info
	err := c.Call(ctx, OpPing, nil, &info)
	return info, err
}

// Check runs a health check. The end of ctx ends it in the box, too.
func (c *Client) Check(ctx context.Context, p spec.Process) (CheckReply, error) {
	var out CheckReply
	s, done, err := c.open(ctx, OpCheck, CheckRequest{Process: p})
	if err != nil {
		return out, err
	}
	defer done()
	if err := readReply(ctx, OpCheck, s, &out, MaxMessage); err != nil {
		return CheckReply{}, err
	}
	if len(out.Output) > MaxCheckOutput {
		out.Output, out.Cut = slices.Clone(out.Output[:MaxCheckOutput]), true // the rest is let go
	}
	return out, nil
}

// Signal sends a signal to the main process.
func (c *Client) Signal(ctx context.Context, signal int) error {
	return c.Call(ctx, OpSignal, SignalRequest{Signal: signal}, nil)
}

// Processes lists what runs in the box, but the agent.
func (c *Client) Processes(ctx context.Context) ([]ProcessInfo, error) {
	var out []ProcessInfo
	err := c.Call(ctx, OpProcesses, nil, &out)
	return out, err
}

// Stats asks the box's kernel.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var out Stats
	err := c.Call(ctx, OpStats, nil, &out)
	return out, err
}

// Sync writes the box's file systems out.
func (c *Client) Sync(ctx context.Context) error { return c.Call(ctx, OpSync, nil, nil) }

// Shutdown sends the signal to the main process, waits for its end up to timeout, kills the rest and writes everything out.
// The agent exits after it answered.
func (c *Client) Shutdown(ctx context.Context, signal int, timeout time.Duration) (ShutdownReply, error) {
	var out ShutdownReply
	err := c.Call(ctx, OpShutdown, ShutdownRequest{Signal: signal, Timeout: timeout}, &out)
	return out, err
}

// Stat describes a file.
func (c *Client) Stat(ctx context.Context, path string, follow bool) (FileInfo, error) {
	var out FileInfo
	err := c.Call(ctx, OpStat, PathRequest{Path: path, Follow: follow}, &out)
	return out, err
}

// TarOut writes an archive of path to w. Names in it begin with the last element of path.
func (c *Client) TarOut(ctx context.Context, path string, follow bool, w io.Writer) error {
	s, done, err := c.open(ctx, OpTarOut, PathRequest{Path: path, Follow: follow})
	if err != nil {
		return err
	}
	defer done()
	_, werr, rerr := Copy(w, NewChunkReader(s))
	if werr != nil {
		return fmt.Errorf("write archive of %s: %w", path, werr)
	}
	if rerr != nil {
		if _, ok := errors.AsType[*Error](rerr); ok {
			return rerr
		}
		return lost(ctx, "read archive of "+path, rerr)
	}
	return nil
}

// TarIn unpacks an archive into the directory path.
func (c *Client) TarIn(ctx context.Context, path string, r io.Reader, opt TarInOptions) error {
	s, done, err := c.open(ctx, OpTarIn, TarInRequest{Path: path, TarInOptions: opt})
	if err != nil {
		return err
	}
	defer done()
	result := make(chan error, 1)
	go func() {
		// The agent may give up in the middle: its answer is then the reason, and unblocks the copy.
		result <- readReply(ctx, OpTarIn, s, nil, MaxReply)
		s.SetWriteDeadline(time.Unix(1, 0))
	}()
	cw := NewChunkWriter(s)
	_, werr, rerr := Copy(cw, r)
	if werr == nil {
		werr = cw.Finish(rerr)
	}
	err = <-result
	if rerr != nil {
		return fmt.Errorf("read archive: %w", rerr)
	}
	if err == nil && werr != nil {
		return fmt.Errorf("send archive to %s: %w", path, werr)
	}
	return err
}
