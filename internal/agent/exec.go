package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// hangupGrace is what the processes at a terminal get to react to its hangup before they are killed.
const hangupGrace = 250 * time.Millisecond

// proc is a started process and the agent's ends of what it is connected to.
type proc struct {
	child    *child
	stdin    *os.File // nil: the process reads /dev/null
	stdout   *os.File // with a terminal, its master, and the same file as stdin
	stderr   *os.File
	tty      bool
	finished chan struct{} // closed when the outcome is recorded and reported
}

// exec serves one process from its start to the report of its end.
//
// The end is reported after the last byte of output. Bytes that the process itself wrote are never lost. Where something it
// left behind still holds the output open, that is followed for outputGrace and then no longer: it may go on writing, nobody
// reads it, and the status says so.
func (a *Agent) exec(ctx context.Context, h wire.Header, s *wire.Stream) {
	var req wire.ExecRequest
	derr := decode(h, &req)
	att, err := a.meet.Attach(ctx, h, s)
	if err != nil {
		return
	}
	if derr != nil {
		att.Fail(derr)
		return
	}
	p, err := a.start(req, wanted{in: att.Stdin != nil, out: att.Stdout != nil, err: att.Stderr != nil})
	if err != nil {
		att.Fail(err)
		return
	}
	defer close(p.finished)
	att.Started(p.child.pid)
	st := a.follow(ctx, req, att, p)
	if req.Main {
		a.mu.Lock()
		a.mainExit = &st
		a.mu.Unlock()
	}
	att.Exit(st)
}

// start forks under the gate that the end of the box closes, so that nothing is started behind its back.
func (a *Agent) start(req wire.ExecRequest, w wanted) (*proc, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopping {
		return nil, errStopping()
	}
	if req.Main && a.main != nil {
		return nil, wire.Errorf(wire.CodeInvalid, "box has a main process already")
	}
	p, err := a.spawn(req.Process, req.Main, w)
	if err != nil {
		return nil, err
	}
	if req.Main {
		a.main = p
	}
	return p, nil
}

func errStopping() error { return wire.Errorf(wire.CodeStopping, "box is stopping") }

func (a *Agent) follow(ctx context.Context, req wire.ExecRequest, att *wire.Attachment, p *proc) wire.ExitStatus {
	keep := req.Detach || req.Main
	var pumps sync.WaitGroup
	var cut [2]bool
	pumps.Go(func() { cut[0] = pump(p.stdout, att.Stdout, keep) })
	if p.stderr != nil {
		pumps.Go(func() { cut[1] = pump(p.stderr, att.Stderr, keep) })
	}
	if p.stdin != nil {
		a.work.Go(func() { feed(p, att.Stdin) })
	}
	clientGone := make(chan struct{})
	a.work.Go(func() {
		defer close(clientGone)
		for {
			ev, err := att.Next()
			if err != nil {
				return
			}
			if ev.Resize != nil && p.tty {
				setSize(p.stdout, *ev.Resize)
			}
			if ev.Signal > 0 && ev.Signal <= 64 {
				a.reap.signal(p.child, unix.Signal(ev.Signal))
			}
		}
	})
	timedOut := a.await(req, att, p, clientGone, keep)
	if req.Main {
		// The box ends with its main process. What else runs goes first: it may hold main's output open.
		a.setStopping()
		a.killAll()
		// The shim must not find the box alive for as long as somebody is slow to read the last of its output.
		_ = att.Ended()
	}
	deadline := time.Now().Add(outputGrace)
	for _, f := range []*os.File{p.stdout, p.stderr} {
		if f != nil {
			f.SetReadDeadline(deadline)
		}
	}
	pumps.Wait()
	if p.tty {
		p.stdout.Close()
	}
	if p.stdin != nil {
		p.stdin.Close()
		att.Stdin.SetReadDeadline(time.Unix(1, 0))
	}
	if req.Main {
		unix.Sync()
	}
	st := p.child.exit
	st.TimedOut = timedOut
	st.Truncated = cut[0] || cut[1]
	return st
}

// await returns when the process has been collected, and ends its session before that where its time is up or its client has
// gone.
func (a *Agent) await(req wire.ExecRequest, att *wire.Attachment, p *proc, clientGone <-chan struct{}, keep bool) (timedOut bool) {
	var timeout <-chan time.Time
	if req.Process.Timeout > 0 {
		t := time.NewTimer(req.Process.Timeout)
		defer t.Stop()
		timeout = t.C
	}
	var outGone, errGone <-chan struct{}
	if !keep {
		if att.Stdout != nil {
			outGone = att.Stdout.Gone()
		}
		if att.Stderr != nil {
			errGone = att.Stderr.Gone()
		}
	}
	for {
		select {
		case <-p.child.done:
			return timedOut
		case <-timeout:
			timedOut = true
			a.killSession(p.child)
			timeout = nil
		case <-clientGone:
			clientGone = nil
			if keep {
				continue
			}
			if p.tty {
				// As when a terminal's line drops: the kernel tells the session, and who wants to save something can.
				p.stdout.Close()
				waitFor(p.child.done, hangupGrace)
			}
			a.killSession(p.child)
		case <-outGone:
			// The process sees what it would see of a closed pipe, or terminal.
			p.stdout.Close()
			outGone = nil
		case <-errGone:
			p.stderr.Close()
			errGone = nil
		}
	}
}

// pump moves a process's output to its client until the output ends, or until the deadline that is set when the process has
// ended. It reports whether the output was still held open then. With keep, bytes that no client wants are thrown away, else
// the process is left with a closed pipe.
func pump(r *os.File, out *wire.Out, keep bool) (held bool) {
	if r == nil {
		return false
	}
	if out == nil { // a terminal that nobody watches
		io.Copy(io.Discard, r)
		return false
	}
	defer out.Close()
	buf := make([]byte, 64<<10)
	wanted := true
	write := func(b []byte) bool {
		if len(b) > 0 && wanted {
			_, err := out.Write(b)
			wanted = err == nil
		}
		return wanted || keep
	}
	for {
		n, err := r.Read(buf)
		if !write(buf[:n]) {
			r.Close()
			return false
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		break
	}
	// The deadline may have passed while the client was slow: what is in the pipe now includes all that the process wrote.
	// A pipe's worth of it is enough, and is an end, should somebody else keep writing.
	r.SetReadDeadline(time.Time{})
	for left := pipeSize(r); left > 0; {
		n := readNow(r, buf)
		if n <= 0 {
			break
		}
		left -= n
		if !write(buf[:n]) {
			break
		}
	}
	// What was left behind must not die of a closed pipe, nor wait for a full one.
	go func() {
		io.Copy(io.Discard, r)
		r.Close()
	}()
	return true
}

// readNow reads what is there without waiting.
func readNow(f *os.File, buf []byte) (n int) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	_ = rc.Read(func(fd uintptr) bool {
		n, _ = unix.Read(int(fd), buf)
		return true
	})
	return n
}

func pipeSize(f *os.File) int {
	size := 64 << 10
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) {
			if n, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil {
				size = n
			}
		})
	}
	return size
}

// feed moves the client's bytes to the process's stdin, and the end of one to the end of the other.
func feed(p *proc, in *wire.Stream) {
	_, werr, rerr := wire.Copy(p.stdin, in)
	if !p.tty {
		p.stdin.Close()
	} else if werr == nil && rerr == nil {
		// A terminal has no end of file but the character for it.
		endOfFile(p.stdin)
	}
	in.Close()
}
