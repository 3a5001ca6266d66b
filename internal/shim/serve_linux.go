package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/wire"
)

// serve answers clients until the listener is closed.
func (r *running) serve() {
	wait := time.Duration(0)
	for {
		c, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Descriptors or memory are short: that passes, and a box that nobody can talk to does not help.
			wait = min(max(5*time.Millisecond, 2*wait), time.Second)
			r.s.log.Warn("accept", "error", err, "again_in", wait)
			time.Sleep(wait)
			continue
		}
		wait = 0
		go r.client(c)
	}
}

func (r *running) client(c net.Conn) {
	sess, err := wire.NewServer(c)
	if err != nil {
		c.Close()
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer sess.Close()
	var meet wire.Meeting
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		h, st, err := sess.Accept(ctx)
		if err != nil {
			// What the client had under way ends with it.
			cancel()
			return
		}
		switch {
		case h.Op == OpAttach && h.Part != wire.PartControl:
			meet.Join(h, st)
		case h.Op == OpAttach:
			wg.Go(func() { r.attach(ctx, sess, &meet, h, st) })
		case h.Op == OpStop:
			var req StopRequest
			err := json.Unmarshal(h.Body, &req)
			_ = wire.Reply(st, nil, err)
			if err == nil {
				go r.stopFor(req)
			}
		case h.Op == OpHealth:
			if r.health == nil {
				_ = wire.Reply(st, nil, wire.Errorf(wire.CodeInvalid, "box has no health check"))
				continue
			}
			_ = wire.Reply(st, r.health.report(), nil)
		default:
			wg.Go(func() {
				up, err := r.agent.Session().Open(ctx, h)
				if err != nil {
					st.Close()
					return
				}
				_ = wire.Relay(ctx, st, up)
			})
		}
	}
}

func (r *running) stopFor(req StopRequest) {
	timeout := time.Duration(req.Timeout)
	if timeout < 0 {
		timeout = r.s.box.Spec.StopTimeout
	}
	r.mu.Lock()
	underWay := r.reason != ""
	r.mu.Unlock()
	if req.Resume && underWay {
		return
	}
	r.stop(lifecycle.ReasonStopped, timeout)
}

// attach connects a client to the main process until one of them ends.
func (r *running) attach(ctx context.Context, sess *wire.Session, meet *wire.Meeting, h wire.Header, st *wire.Stream) {
	att, err := meet.Attach(ctx, h, st)
	if err != nil {
		return
	}
	defer att.Close()
	var req AttachRequest
	if err := json.Unmarshal(h.Body, &req); err != nil {
		_ = att.Fail(wire.Errorf(wire.CodeInvalid, "attach request: %v", err))
		return
	}
	s := newSub(req.Start)
	defer r.hub.leave(s)
	snap, err := r.hub.join(s, req.Backlog)
	if err != nil {
		_ = att.Fail(err)
		return
	}
	if snap != nil {
		defer snap.Close()
	}
	if err := r.begin(ctx, req); err != nil {
		_ = att.Fail(err)
		return
	}
	if err := att.Started(r.main.PID()); err != nil {
		return
	}
	if snap != nil {
		if err := replay(snap, att); err != nil {
			return
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-r.hub.ending:
			_ = att.Ended()
		case <-s.gone:
		}
	}()
	var pumps sync.WaitGroup
	pumps.Go(func() { pump(&s.out, att.Stdout, s, r.ended) })
	pumps.Go(func() { pump(&s.err, att.Stderr, s, r.ended) })
	if att.Stdin != nil && r.stdin != nil {
		go func() {
			_, _ = io.Copy(r.stdin, att.Stdin)
			if req.CloseStdin && !(r.s.box.Spec.Main.TTY && s.left(sess.Done())) {
				r.stdin.Close()
			}
		}()
	}
	go func() {
		for {
			ev, err := att.Next()
			if err != nil {
				s.drop()
				return
			}
			if ev.Signal != 0 {
				_ = r.main.Signal(ctx, ev.Signal)
			}
			if ev.Resize != nil {
				_ = r.main.Resize(ctx, ev.Resize.Rows, ev.Resize.Cols)
			}
		}
	}()
	pumps.Wait()
	<-ended
	if s.lagged.Load() {
		// The exit code would say that this was all of the output.
		_ = att.Fail(wire.Errorf(wire.CodeFailed, "this client read too slowly and was cut off; the box runs on, and its log has everything"))
		return
	}
	select {
	case <-r.ended:
	default:
		return // the client is gone
	}
	// With this process goes what the client has not taken from the connection yet. It closes its side when it has it all.
	defer func() { <-s.gone }()
	status := r.status
	if r.lost != nil {
		status = wire.ExitStatus{Code: lifecycle.CodeLost, Signal: 9}
	}
	r.mu.Lock()
	if r.reason == lifecycle.ReasonTimeout {
		status.Code, status.TimedOut = codeTimeout, true
	}
	r.mu.Unlock()
	_ = att.Exit(status)
}

// left tells whether a client whose input has ended has gone altogether. At a terminal that is no end of input: it may have detached.
func (s *sub) left(lost <-chan struct{}) bool {
	select {
	case <-lost:
		return true
	case <-s.gone:
		return true
	case <-time.After(100 * time.Millisecond): // what tells of it is on another stream
		return false
	}
}

// begin starts the main process for a client that asks for it, or waits until it runs.
func (r *running) begin(ctx context.Context, req AttachRequest) error {
	if req.Start {
		sr := startRequest{size: req.WinSize, done: make(chan error, 1)}
		select {
		case r.starts <- sr:
			return <-sr.done
		case <-r.begun:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case <-r.begun:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-r.jail.Done():
		return fmt.Errorf("the box has ended")
	}
}

func replay(snap *logfile.Snapshot, att *wire.Attachment) error {
	return snap.Each(func(e logfile.Entry) error {
		out := att.Stdout
		if e.Stream == logfile.Stderr {
			out = att.Stderr
		}
		if out == nil {
			return nil
		}
		_, err := out.Write(e.Data())
		return err
	})
}
