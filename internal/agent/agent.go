// Package agent is the first process of a box: it makes the box's root, starts and reaps processes, moves their bytes and files,
// and ends the box in order. It serves exactly one connection, that of the shim, and trusts it fully; it decides nothing about
// policy and knows nothing of images, engines or the host. It is linked into a program of its own that must stay small.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// Rootfs makes the box's root out of what the engine provides, and enters it for the whole process.
type Rootfs interface {
	// Extras gives the image what its kernel does not show of it, before Enter. It returns what failed and a box can do without.
	Extras(e wire.Extras) (warnings []string, err error)
	// Enter returns the steps that failed and that the box can do without.
	Enter(s wire.Setup) (warnings []string, err error)
}

// Config is what an agent is made of.
type Config struct {
	Conn   io.ReadWriteCloser // stream to the shim, owned by the agent
	Rootfs Rootfs             // nil: the agent stays where it is, and needs no configuration
	Log    *slog.Logger       // nil: silent
}

// Agent serves one box.
type Agent struct {
	log    *slog.Logger
	rootfs Rootfs
	sess   *wire.Session
	meet   wire.Meeting
	reap   *reaper
	users  userDB
	proc   procfs

	mu         sync.Mutex
	configured bool
	env        map[string]string // defaults for processes
	stopping   bool
	main       *proc
	mainExit   *wire.ExitStatus
	quit       chan struct{}
	quitOnce   sync.Once
	work       sync.WaitGroup

	checking sync.Mutex // held while a health check runs
}

// outputGrace is how long the output of an ended process may stay open in other hands before it is no longer followed. What the
// process itself wrote needs no such time: it is in the pipe when the process ends.
const outputGrace = 100 * time.Millisecond

// killBound ends the patience with processes that do not die: the kernel has them then, and the box's end takes them.
const killBound = 5 * time.Second

// Run serves until the connection ends or the box is shut down. Everything in the box is dead when it returns, if this is the
// box's first process; else every process that it started and its sessions.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	// A first collection would start threads, which are dear in a box, while somebody waits for its first process.
	gc := debug.SetGCPercent(-1)
	limit := debug.SetMemoryLimit(32 << 20)
	frugal := time.AfterFunc(time.Second, func() {
		// Nothing here holds much: a small heap that is collected often costs less than one that waits to double.
		debug.SetGCPercent(25)
		debug.SetMemoryLimit(limit)
		debug.FreeOSMemory()
	})
	defer func() {
		frugal.Stop()
		debug.SetGCPercent(gc)
		debug.SetMemoryLimit(limit)
	}()
	sess, err := wire.NewServer(cfg.Conn)
	if err != nil {
		return err
	}
	a := &Agent{
		log: cfg.Log, rootfs: cfg.Rootfs, sess: sess, configured: cfg.Rootfs == nil,
		reap: newReaper(), quit: make(chan struct{}), env: map[string]string{},
	}
	defer a.proc.close()
	if os.Getpid() == 1 {
		defer shield()()
	}
	unix.Umask(0o022)
	sealDescriptors()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.work.Go(func() {
		select {
		case <-a.quit:
		case <-sess.Done():
		case <-ctx.Done():
		}
		cancel()
	})
	for {
		h, s, err := sess.Accept(ctx)
		if err != nil {
			break
		}
		if h.Part != wire.PartControl {
			a.meet.Join(h, s)
			continue
		}
		a.work.Go(func() { a.serve(ctx, h, s) })
	}
	a.setStopping()
	a.killAll()
	unix.Sync()
	sess.Close()
	a.work.Wait()
	a.reap.close()
	return nil
}

// shield lets signals have no effect, as Linux does for the first process of a pid namespace: some that root of the box sends would
// end or stop the box. What the agent starts has the defaults again. It returns what undoes it.
//
// It takes those that Go's runtime does not ignore by itself where nobody has asked for them, and no more: each costs a handover
// between threads, and sixty of them took 20 ms of a box's start. (32 to 34 are the C library's own and cannot be had this way.)
func shield() func() {
	nowhere := make(chan os.Signal, 1) // what does not fit is dropped
	signal.Notify(nowhere, unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGILL, unix.SIGTRAP, unix.SIGABRT, unix.SIGBUS,
		unix.SIGFPE, unix.SIGSEGV, unix.SIGSTKFLT, unix.SIGSYS, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU)
	return func() { signal.Stop(nowhere) }
}

// sealDescriptors keeps what the agent was started with from what it starts.
func sealDescriptors() {
	if unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for fd := 3; fd < 1024; fd++ { // a kernel without the call; the limit on open files is not lower than this
		unix.CloseOnExec(fd)
	}
}

func (a *Agent) setStopping() {
	a.mu.Lock()
	a.stopping = true
	a.mu.Unlock()
}

// ready says why an operation cannot be served now, if it cannot.
func (a *Agent) ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.configured {
		return wire.Errorf(wire.CodeInvalid, "box is not configured yet")
	}
	return nil
}

func (a *Agent) serve(ctx context.Context, h wire.Header, s *wire.Stream) {
	// A stream's operation may wait for its bytes as long as it likes, but not longer than the agent lives.
	stop := context.AfterFunc(ctx, func() { s.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	switch h.Op {
	case wire.OpPing:
		wire.Reply(s, a.info(nil), nil)
		return
	case wire.OpExtras:
		answer(h, s, a.extras)
		return
	case wire.OpConfigure:
		answer(h, s, a.configure)
		return
	}
	if err := a.ready(); err != nil && h.Op != wire.OpShutdown {
		// Its form fits both kinds of streams: a reply and a status carry an error alike.
		wire.Reply(s, nil, err)
		return
	}
	switch h.Op {
	case wire.OpExec:
		a.exec(ctx, h, s)
	case wire.OpCheck:
		a.check(h, s)
	case wire.OpSignal:
		var req wire.SignalRequest
		err := decode(h, &req)
		if err == nil {
			err = a.signalMain(req.Signal)
		}
		wire.Reply(s, nil, err)
	case wire.OpProcesses:
		ps, err := a.processes()
		wire.Reply(s, ps, err)
	case wire.OpStats:
		st, err := a.stats()
		wire.Reply(s, st, err)
	case wire.OpSync:
		unix.Sync()
		wire.Reply(s, nil, nil)
	case wire.OpShutdown:
		var req wire.ShutdownRequest
		err := decode(h, &req)
		if err != nil {
			wire.Reply(s, nil, err)
			return
		}
		a.shutdown(s, req)
	case wire.OpStat:
		answer(h, s, statFile)
	case wire.OpTarOut:
		a.tarOut(h, s)
	case wire.OpTarIn:
		a.tarIn(h, s)
	default:
		wire.Reply(s, nil, wire.Errorf(wire.CodeUnknownOp, "agent has no operation %q", h.Op))
	}
}

// answer serves a request that has one reply.
func answer[Q, R any](h wire.Header, s *wire.Stream, serve func(Q) (R, error)) {
	var req Q
	var out R
	err := decode(h, &req)
	if err == nil {
		out, err = serve(req)
	}
	wire.Reply(s, out, err)
}

func decode(h wire.Header, v any) error {
	if err := json.Unmarshal(h.Body, v); err != nil {
		return wire.Errorf(wire.CodeInvalid, "%s: bad request: %v", h.Op, err)
	}
	return nil
}

func (a *Agent) info(warnings []string) wire.Info {
	info := wire.Info{Version: wire.Version, PID: os.Getpid(), Warnings: warnings}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		info.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	return info
}

func (a *Agent) extras(e wire.Extras) (wire.Info, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.configured {
		return wire.Info{}, wire.Errorf(wire.CodeInvalid, "box is configured already")
	}
	warnings, err := a.rootfs.Extras(e)
	if err != nil {
		return wire.Info{}, err
	}
	return a.info(warnings), nil
}

func (a *Agent) configure(s wire.Setup) (wire.Info, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.configured && a.rootfs != nil {
		return wire.Info{}, wire.Errorf(wire.CodeInvalid, "box is configured already")
	}
	var warnings []string
	if a.rootfs != nil {
		var err error
		if warnings, err = a.rootfs.Enter(s); err != nil {
			return wire.Info{}, err
		}
		if err = a.proc.own(); err != nil {
			warnings = append(warnings, "keep a view of processes: "+err.Error())
		}
	}
	a.env["HOSTNAME"] = s.Hostname
	a.configured = true
	return a.info(warnings), nil
}

func (a *Agent) signalMain(n int) error {
	a.mu.Lock()
	p := a.main
	a.mu.Unlock()
	if p == nil {
		return wire.Errorf(wire.CodeInvalid, "box has no main process")
	}
	if n < 1 || n > 64 {
		return wire.Errorf(wire.CodeInvalid, "no such signal: %d", n)
	}
	a.reap.signal(p.child, syscall.Signal(n))
	return nil
}

// shutdown answers when nothing but the agent is left and everything is written, and ends the agent.
func (a *Agent) shutdown(s *wire.Stream, req wire.ShutdownRequest) {
	a.setStopping()
	a.mu.Lock()
	main := a.main
	a.mu.Unlock()
	if req.Signal == 0 {
		req.Signal = int(unix.SIGTERM)
	}
	var out wire.ShutdownReply
	if main != nil {
		a.reap.signal(main.child, syscall.Signal(req.Signal))
		if !waitFor(main.child.done, req.Timeout) {
			out.Forced = true
		}
	}
	a.killAll()
	if main != nil && waitFor(main.finished, killBound) {
		a.mu.Lock()
		out.Exit = a.mainExit
		a.mu.Unlock()
	}
	unix.Sync()
	wire.Reply(s, out, nil)
	// The answer is on its way when the peer has closed its side too; a peer that does not is not waited for.
	s.SetReadDeadline(time.Now().Add(killBound))
	io.Copy(io.Discard, s)
	a.quitOnce.Do(func() { close(a.quit) })
}

func waitFor(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// fileError gives errors about paths the code that the host tells apart.
func fileError(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrNotExist) {
		return wire.Errorf(wire.CodeNoFile, "%v", err)
	}
	return fmt.Errorf("%w", err)
}
