package shim

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/wire"
)

// running is one generation whose agent answers.
type running struct {
	s        *shim
	jail     *jail.Jail
	agent    *wire.Client
	hub      *hub
	listener net.Listener

	stdin  *io.PipeWriter // nil: the main process has no input
	health *health        // nil: it is not checked

	mu       sync.Mutex
	reason   string        // why the end was asked for
	stopping chan struct{} // closed when it was
	starts   chan startRequest
	main     *wire.Process
	begun    chan struct{} // closed when the main process runs
	ended    chan struct{} // closed when it has ended and status is set
	status   wire.ExitStatus
	lost     error // no status could be had
}

// startRequest is a client's wish to start the main process.
type startRequest struct {
	size spec.WinSize
	done chan error
}

func (r *running) open() {
	r.starts = make(chan startRequest)
	r.begun = make(chan struct{})
	r.stopping = make(chan struct{})
	go r.serve()
}

// awaitStart waits for the client that starts the main process.
func (r *running) awaitStart(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	const gone = "the command that started the box went away before it was connected"
	select {
	case req := <-r.starts:
		err := r.startMain(ctx, &req.size)
		req.done <- err
		return err
	case <-ctx.Done():
		return errors.New(gone)
	case <-r.s.launch.gone():
		return errors.New(gone)
	case <-r.jail.Done():
		return errors.New("the box's kernel ended before the main process was started")
	}
}

func (r *running) startMain(ctx context.Context, size *spec.WinSize) error {
	p := r.s.box.Spec.Main
	if size != nil && size.Rows > 0 {
		p.WinSize = *size
	}
	stdio := wire.IO{Stdout: writer{r.hub, logfile.Stdout}, Stderr: writer{r.hub, logfile.Stderr}}
	if r.s.box.Spec.OpenStdin {
		pr, pw := io.Pipe()
		stdio.Stdin, r.stdin = pr, pw
	}
	proc, err := r.agent.Start(ctx, wire.ExecRequest{Process: p, Main: true}, stdio)
	if err != nil {
		return err
	}
	r.main = proc
	close(r.begun)
	return nil
}

// visit serves the box's files until the launcher goes away, and ends the jail.
func (r *running) visit(ctx context.Context) {
	select {
	case <-r.s.launch.gone():
	case <-r.jail.Done():
	}
	r.flush(ctx)
	r.kill()
}

// flush gives the agent a moment to write everything out.
func (r *running) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = r.agent.Sync(ctx)
}

// wait returns when the main process has ended and everything in the jail with it.
func (r *running) wait(ctx context.Context) lifecycle.End {
	if t := r.s.box.Spec.Timeout; t > 0 {
		timer := time.AfterFunc(t, func() { r.stop(lifecycle.ReasonTimeout, r.s.box.Spec.StopTimeout) })
		defer timer.Stop()
	}
	go func() {
		<-r.main.Ended()
		r.hub.end()
		<-r.jail.Done()
		r.hub.die()
	}()
	var checks sync.WaitGroup
	if r.health != nil {
		checks.Go(func() { r.watchHealth(ctx) })
	}
	st, err := r.main.Wait(ctx)
	r.hub.end()
	r.status, r.lost = st, err
	close(r.ended)
	if r.stdin != nil {
		r.stdin.Close()
	}
	// The agent has written everything out before it told the end of the main process.
	r.kill()
	checks.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	end := lifecycle.End{Code: st.Code, Reason: lifecycle.ReasonExited}
	if err != nil {
		end.Code, end.Reason = lifecycle.CodeLost, lifecycle.ReasonKilled
	}
	if r.reason != "" {
		end.Reason = r.reason
	}
	if end.Reason == lifecycle.ReasonTimeout {
		end.Code = codeTimeout
	}
	return end
}

// watchHealth has the box checked until it is to stop or its main process has ended.
func (r *running) watchHealth(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-r.stopping:
		case <-r.main.Ended():
		case <-ctx.Done():
		}
		cancel()
	}()
	r.health.watch(ctx)
}

// codeTimeout is what timeout(1) exits with.
const codeTimeout = 124

// stopGrace is how long after an orderly stop the end of the main process may take to arrive.
const stopGrace = 3 * time.Second

// stop asks the agent for an orderly end; wait then returns.
func (r *running) stop(reason string, timeout time.Duration) {
	r.mu.Lock()
	if r.reason == "" {
		r.reason = reason
		close(r.stopping)
	}
	r.mu.Unlock()
	// A very long wish must not become one that is over already.
	timeout = min(timeout, MaxStop)
	ctx, cancel := context.WithTimeout(context.Background(), timeout+2*time.Second)
	defer cancel()
	_, err := r.agent.Shutdown(ctx, r.s.box.Spec.StopSignal, timeout)
	if err == nil {
		// The answer is the guest's word only.
		select {
		case <-r.ended:
		case <-time.After(stopGrace):
			err = errors.New("the box has not ended, although its agent said so")
		}
	}
	if err != nil {
		select {
		case <-r.ended:
		default:
			r.s.log.Warn("orderly stop failed", "error", err)
			r.jail.Kill()
		}
	}
}

// kill ends the jail and what serves it.
func (r *running) kill() {
	if jail.Outlives {
		os.Exit(0)
	}
	r.jail.Kill()
	<-r.jail.Done()
	if r.agent != nil {
		r.agent.Close()
	}
	if r.listener != nil {
		r.listener.Close()
	}
}
