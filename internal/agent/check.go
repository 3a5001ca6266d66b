package agent

import (
	"io"
	"time"

	"github.com/coffer-box/coffer/internal/wire"
)

// check serves a health check. When it is answered nothing of the check's session lives: what one check left behind, the next would
// leave again.
func (a *Agent) check(h wire.Header, s *wire.Stream) {
	var req wire.CheckRequest
	err := decode(h, &req)
	var out wire.CheckReply
	if err == nil {
		out, err = a.runCheck(req, s)
	}
	wire.Reply(s, out, err)
}

func (a *Agent) runCheck(req wire.CheckRequest, s *wire.Stream) (wire.CheckReply, error) {
	var out wire.CheckReply
	if !a.checking.TryLock() {
		return out, wire.Errorf(wire.CodeInvalid, "the check before this one has not ended")
	}
	defer a.checking.Unlock()
	req.Process.TTY = false
	p, err := a.start(wire.ExecRequest{Process: req.Process}, wanted{out: true, joined: true})
	if err != nil {
		return out, err
	}
	defer close(p.finished)
	gone := make(chan struct{})
	a.work.Go(func() {
		// The host sends nothing: the end of its half is its word that it does not want to know any more.
		io.Copy(io.Discard, s)
		close(gone)
	})
	defer s.SetReadDeadline(time.Unix(1, 0))
	output := beginning{max: wire.MaxCheckOutput}
	read := make(chan struct{})
	a.work.Go(func() {
		defer close(read)
		_, _ = io.Copy(&output, p.stdout)
	})
	var timeout <-chan time.Time
	if req.Process.Timeout > 0 {
		t := time.NewTimer(req.Process.Timeout)
		defer t.Stop()
		timeout = t.C
	}
	timedOut := false
	select {
	case <-p.child.done:
	case <-timeout:
		timedOut = true
	case <-gone:
	}
	a.killSession(p.child)
	ended := waitFor(p.child.done, killBound)
	// Only what is in a session of its own can hold the output open now. It is not followed, and may die of that.
	p.stdout.SetReadDeadline(time.Now().Add(outputGrace))
	<-read
	p.stdout.Close()
	a.mu.Lock()
	stopping := a.stopping
	a.mu.Unlock()
	switch {
	case stopping:
		// The end of the box may have ended the check, which says nothing about either.
		return out, errStopping()
	case !ended:
		return out, wire.Errorf(wire.CodeFailed, "the check does not end, though it was killed")
	}
	out.Exit = p.child.exit
	out.Exit.TimedOut = timedOut
	out.Output, out.Cut = output.kept, output.cut
	return out, nil
}

// beginning keeps the first max bytes of what is written to it, and takes everything: a check is not to fail for what it says.
type beginning struct {
	max  int
	kept []byte
	cut  bool
}

func (b *beginning) Write(p []byte) (int, error) {
	n := min(len(p), b.max-len(b.kept))
	b.kept = append(b.kept, p[:n]...)
	b.cut = b.cut || n < len(p)
	return len(p), nil
}
