package coffer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/shim"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
	"github.com/coffer-box/coffer/internal/wire"
)

// IO is what a process or an attachment is connected to; nil fields are not connected.
type IO struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Run creates a box and starts it, detached. A box that could not be started is kept, unless it was to be removed at its end.
func (r *Runtime) Run(ctx context.Context, s Spec) (*Box, error) {
	return r.run(ctx, s, func(b *Box) error { return b.Start(ctx) })
}

// RunAttached is [Runtime.Run] for a box that is started by [Box.StartAttached].
func (r *Runtime) RunAttached(ctx context.Context, s Spec, o AttachOptions) (*Box, *Attachment, error) {
	var a *Attachment
	b, err := r.run(ctx, s, func(b *Box) (err error) {
		a, err = b.StartAttached(ctx, o)
		return err
	})
	return b, a, err
}

func (r *Runtime) run(ctx context.Context, s Spec, start func(*Box) error) (*Box, error) {
	b, err := r.Create(ctx, s)
	if err != nil {
		return nil, err
	}
	if err := start(b); err != nil {
		if s.Remove {
			err = errors.Join(err, ignoreNotFound(b.Remove(context.WithoutCancel(ctx), Force())))
		}
		return nil, err
	}
	return b, nil
}

func ignoreNotFound(err error) error {
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

// StartError is an error of the main process itself: a command that is not there or cannot be run.
type StartError struct {
	Box string
	Msg string
	// Code is what Docker exits with: 127 for a command that is not there, 126 for one that cannot be run, else 125.
	Code int
}

func (e *StartError) Error() string { return fmt.Sprintf("box %s: %s", e.Box, e.Msg) }

// ExitCode is the exit code for a command line.
func (e *StartError) ExitCode() int { return e.Code }

// Start starts the box and returns when its main process runs. A box that runs already is left alone. One whose start ctx cuts off is
// ended again.
func (b *Box) Start(ctx context.Context) error {
	return b.exclusive(ctx, func(rec *state.Box) error {
		return b.start(ctx, rec)
	})
}

func (b *Box) start(ctx context.Context, rec *state.Box) error {
	for {
		var err error
		if rec, err = b.carryOn(ctx, rec); err != nil || rec.Phase.Live() {
			return err
		}
		_, launched, err := b.begin(ctx, rec, shim.Detached)
		if err == nil {
			launched.Close()
		}
		if !errors.Is(err, state.ErrStale) {
			return err
		}
		// Its shim has just restarted it, or given up to.
		if rec, err = b.rt.db.Get(ctx, b.id); err != nil {
			return err
		}
	}
}

// carryOn finishes what a command that was killed had begun, until the box runs or is at rest. The caller holds the operation lock,
// so nobody else is at it but the shim.
func (b *Box) carryOn(ctx context.Context, rec *state.Box) (*state.Box, error) {
	if rec.Phase == state.Stopping {
		if err := b.stop(ctx, rec); err != nil {
			return nil, err
		}
		return b.rt.db.Get(ctx, b.id)
	}
	for rec.Phase == state.Starting || rec.Phase == state.Running && b.dying(ctx, rec) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		var err error
		if rec, err = b.rt.db.Get(ctx, b.id); err != nil {
			return nil, err
		}
		if rec, err = b.rt.keeper.Reconcile(ctx, rec); err != nil {
			return nil, err
		}
		if rec == nil {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, b.name)
		}
	}
	return rec, nil
}

// dying tells whether a box that runs by its record has lost its kernel, which its shim is about to record. One that is merely slow to
// answer is not dying.
func (b *Box) dying(ctx context.Context, rec *state.Box) bool {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	c, err := b.rt.dial(ctx, rec)
	if err == nil {
		defer c.Close()
		_, err = c.Ping(ctx)
	}
	return err != nil && ctx.Err() == nil
}

// Restart stops the box, if it runs, and starts it.
func (b *Box) Restart(ctx context.Context, opts ...StopOption) error {
	return b.exclusive(ctx, func(rec *state.Box) error {
		if err := b.stop(ctx, rec, opts...); err != nil {
			return err
		}
		rec, err := b.rt.db.Get(ctx, b.id)
		if err != nil {
			return err
		}
		return b.start(ctx, rec)
	})
}

// begin opens a generation that somebody asked for. If ctx cuts that off it is ended, for nothing must be left half started.
func (b *Box) begin(ctx context.Context, rec *state.Box, mode shim.Mode) (*state.Box, io.Closer, error) {
	rec, launched, err := b.open(ctx, rec, mode, startingAnew(0))
	if err != nil && rec != nil && ctx.Err() != nil {
		err = b.giveUp(ctx, rec)
	}
	return rec, launched, err
}

// giveUp ends a generation whose beginning ctx has cut off, and returns why. The caller holds the operation lock.
func (b *Box) giveUp(ctx context.Context, rec *state.Box) error {
	cause := context.Cause(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 6*grace)
	defer cancel()
	return errors.Join(cause, b.stopForGood(ctx, rec, WithTimeout(0)))
}

// launch restarts the box by its policy, as the given number of restarts. The caller holds the operation lock.
func (b *Box) launch(ctx context.Context, rec *state.Box, restarts int) error {
	_, launched, err := b.open(ctx, rec, shim.Detached, startingAnew(restarts))
	if err == nil {
		launched.Close()
	}
	return err
}

// startingAnew is the change of a record with which a new run of the main process begins.
func startingAnew(restarts int) func(*state.Box) {
	return func(s *state.Box) {
		s.Phase, s.ManualStop, s.RestartCount, s.Visit = state.Starting, false, restarts, false
		s.ExitCode, s.Reason, s.Error, s.OOMKilled = 0, "", "", false // they were the last run's
	}
}

// open opens a new generation after change has been made to the record, and returns the record with it, in case of failure too. Unless
// it is detached, the shim goes on to need the returned connection: until a client has come, or as long as the files are used.
func (b *Box) open(ctx context.Context, rec *state.Box, mode shim.Mode, change func(*state.Box)) (*state.Box, io.Closer, error) {
	if rec.Damaged {
		return nil, nil, fmt.Errorf("box %s cannot be started: %w: its files are in %s: copy what you need, then remove it",
			rec.Name, ErrDamaged, b.rt.home.Box(b.id).Dir)
	}
	if lifecycle.WantsRestart(rec) {
		// Its shim may be about to do that. From here on it leaves the box alone; if it was faster, the record has moved on.
		if _, err := b.rt.db.Update(ctx, b.id, state.Change{Generation: rec.Generation}, func(s *state.Box) error {
			if s.Phase != rec.Phase {
				return state.ErrStale
			}
			s.ManualStop = true
			return nil
		}); err != nil {
			return nil, nil, err
		}
	}
	// Whatever the record says: on top of a live tree no second one is ever started.
	if _, err := b.rt.keeper.Reap(ctx, rec); err != nil {
		return nil, nil, fmt.Errorf("start box %s: %w", rec.Name, err)
	}
	lock, err := supervise.TryLock(b.rt.home.Box(b.id).ShimLock(), self())
	if err != nil {
		return nil, nil, fmt.Errorf("start box %s: %w", rec.Name, err)
	}
	defer lock.Unlock()
	manual := rec.ManualStop
	rec, err = b.rt.db.Update(ctx, b.id, state.Change{Generation: rec.Generation}, func(s *state.Box) error {
		s.ManualStop = manual
		change(s)
		s.Generation++
		s.Handles = nil
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	reply, launched, err := b.rt.spawnShim(ctx, rec, mode, lock)
	if err != nil {
		// The shim is gone or was never there; the record must not say otherwise.
		_, rerr := b.rt.keeper.Reconcile(context.WithoutCancel(ctx), rec)
		return rec, nil, errors.Join(err, rerr)
	}
	if !reply.OK {
		launched.Close()
		return rec, nil, &StartError{Box: rec.Name, Msg: reply.Error, Code: reply.Code}
	}
	return rec, launched, nil
}

// spawnShim starts the supervisor, hands the lock over to it, and waits for its word. It returns the connection on which that came.
func (r *Runtime) spawnShim(ctx context.Context, rec *state.Box, mode shim.Mode, lock *supervise.Lock) (reply shim.LaunchReply, launched io.Closer, err error) {
	helper, err := r.helperPath()
	if err != nil {
		return reply, nil, err
	}
	mine, theirs, err := os.Pipe()
	if err != nil {
		return reply, nil, fmt.Errorf("start supervisor: %w", err)
	}
	defer func() {
		if err != nil {
			mine.Close()
		}
	}()
	log, err := os.OpenFile(r.home.Box(rec.ID).ShimLog(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		theirs.Close()
		return reply, nil, fmt.Errorf("start supervisor: %w", err)
	}
	defer log.Close()
	args := shim.Args{Home: r.home.Root, ID: rec.ID, Generation: rec.Generation, Mode: mode}
	cmd := &exec.Cmd{Path: helper, Args: append([]string{helperName}, args.Words()...), Env: []string{}, Dir: "/", Stderr: log,
		ExtraFiles: []*os.File{theirs, lock.File()}, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	err = cmd.Start()
	theirs.Close()
	lock.Unlock()
	if err != nil {
		return reply, nil, fmt.Errorf("start supervisor: %w", err)
	}
	// A program that embeds Coffer lives long: it must not collect its shims as zombies.
	go func() { _ = cmd.Wait() }()
	stop := context.AfterFunc(ctx, func() { mine.Close() })
	defer stop()
	if err := json.NewDecoder(mine).Decode(&reply); err != nil {
		if ctx.Err() != nil {
			return reply, nil, ctx.Err()
		}
		return reply, nil, fmt.Errorf("the supervisor of box %s ended without a word; its log is %s", rec.Name, r.home.Box(rec.ID).ShimLog())
	}
	return reply, mine, nil
}

// dial connects to the box's shim.
func (r *Runtime) dial(ctx context.Context, rec *state.Box) (*wire.Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", r.home.Box(rec.ID).Socket())
	if err != nil {
		return nil, fmt.Errorf("connect to the supervisor of box %s: %w", rec.Name, err)
	}
	sess, err := wire.NewClient(conn)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect to the supervisor of box %s: %w", rec.Name, err)
	}
	return wire.NewClientOf(sess), nil
}

// withAgent runs fn with a connection that reaches the agent.
func (b *Box) withAgent(ctx context.Context, fn func(*wire.Client) error) error {
	return b.withAgentIn(ctx, fn, state.Running)
}

// withAgentIn is withAgent for a box in one of the given phases.
func (b *Box) withAgentIn(ctx context.Context, fn func(*wire.Client) error, phases ...state.Phase) error {
	_, c, err := b.connect(ctx, phases...)
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(c)
}

// connect reaches the supervisor of a box in one of the given phases, and returns the record that it went by.
func (b *Box) connect(ctx context.Context, phases ...state.Phase) (*state.Box, *wire.Client, error) {
	var deadline time.Time
	for {
		rec, err := b.rt.db.Get(ctx, b.id)
		if err != nil {
			return nil, nil, err
		}
		if !deadline.IsZero() || !slices.Contains(phases, rec.Phase) {
			if rec, err = b.rt.refresh(ctx, rec); err != nil {
				return nil, nil, err
			}
			if rec == nil {
				return nil, nil, fmt.Errorf("box %s is gone: %w", b.name, ErrNotFound)
			}
			if !slices.Contains(phases, rec.Phase) {
				return nil, nil, fmt.Errorf("box %s is %s: %w: start it first", b.name, rec.Phase, ErrNotRunning)
			}
		}
		c, err := b.rt.dial(ctx, rec)
		switch {
		case err == nil:
			return rec, c, nil
		case deadline.IsZero():
			// The record may be older than the truth, or its shim about to correct it.
			deadline = time.Now().Add(grace)
		case ctx.Err() != nil:
			return nil, nil, ctx.Err()
		case time.Now().After(deadline):
			return nil, nil, fmt.Errorf("the supervisor of box %s does not answer: see %s: %w", rec.Name, b.rt.home.Box(b.id).ShimLog(), err)
		default:
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// ErrDetached is what the Read of an attachment's Stdin may return to leave the main process' input open, before the attachment is closed.
var ErrDetached = wire.ErrDetached

// Attachment is a connection to a box's main process.
type Attachment struct {
	proc   *wire.Process
	client *wire.Client
	shim   *supervise.Watcher // of a box that this attachment started
	gen    uint64             // the generation that it started
	cut    bool
}

// AttachOptions say how to attach.
type AttachOptions struct {
	IO
	// Backlog sends first what the main process has put out so far.
	Backlog bool
	// Rows and Cols are the terminal's size; 0: not known.
	Rows, Cols uint16
}

// Attach connects to the main process of a running box. What it puts out is delivered without gap or repetition; a client that
// falls far behind is dropped with an error rather than hold up the box.
func (b *Box) Attach(ctx context.Context, o AttachOptions) (*Attachment, error) {
	_, c, err := b.connect(ctx, state.Running)
	if err != nil {
		return nil, err
	}
	return attach(ctx, c, o, shim.AttachRequest{Backlog: o.Backlog})
}

func attach(ctx context.Context, c *wire.Client, o AttachOptions, req shim.AttachRequest) (*Attachment, error) {
	req.WinSize = spec.WinSize{Rows: o.Rows, Cols: o.Cols}
	p, err := c.Attach(ctx, shim.OpAttach, req, wire.IO{Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
	if err != nil {
		c.Close()
		return nil, err
	}
	return &Attachment{proc: p, client: c}, nil
}

// StartAttached starts the box connected to o: nothing of the main process' output is missed, and its input ends with o.Stdin,
// unless that is [ErrDetached]. At a terminal, the end of this program is no end of input. If ctx ends before the main process has
// begun, so does what was started of the box; after that, ctx means nothing to it.
func (b *Box) StartAttached(ctx context.Context, o AttachOptions) (*Attachment, error) {
	var a *Attachment
	err := b.exclusive(ctx, func(rec *state.Box) (err error) {
		rec, err = b.carryOn(ctx, rec)
		if err != nil {
			return err
		}
		if rec.Phase.Live() {
			return fmt.Errorf("box %s: %w: attach to it", rec.Name, ErrRunning)
		}
		rec, launched, err := b.begin(ctx, rec, shim.Attached)
		if err != nil {
			return err
		}
		defer launched.Close()
		defer func() {
			if err != nil && ctx.Err() != nil {
				err = b.giveUp(ctx, rec)
			}
		}()
		c, err := b.rt.dial(ctx, rec)
		if err != nil {
			return err
		}
		watch, err := supervise.Watch(b.rt.home.Box(b.id).ShimLock())
		if err != nil {
			c.Close()
			return err
		}
		a, err = attach(ctx, c, o, shim.AttachRequest{Start: true, CloseStdin: true})
		if err == nil {
			a.shim, a.gen = watch, rec.Generation
			return nil
		}
		// The shim reports the failure in the record, and ends.
		_ = watch.Wait(ctx)
		watch.Close()
		var we *wire.Error
		if errors.As(err, &we) {
			return &StartError{Box: rec.Name, Msg: we.Error(), Code: we.ExitCode()}
		}
		return err
	})
	return a, err
}

// Wait waits for the end of the main process and of its output, and returns its exit code.
func (a *Attachment) Wait(ctx context.Context) (int, error) {
	st, err := a.proc.Wait(ctx)
	if err != nil {
		return 0, err
	}
	a.cut = st.Truncated
	return st.Code, a.client.Close()
}

// Truncated is as with [Command.Truncated], after [Attachment.Wait].
func (a *Attachment) Truncated() bool { return a.cut }

// Signal sends a signal to the main process.
func (a *Attachment) Signal(ctx context.Context, n int) error { return a.proc.Signal(ctx, n) }

// Resize sets the size of its terminal.
func (a *Attachment) Resize(ctx context.Context, rows, cols uint16) error {
	return a.proc.Resize(ctx, rows, cols)
}

// Close detaches; the box runs on.
func (a *Attachment) Close() error { return errors.Join(a.proc.Close(), a.client.Close()) }

// Settle waits, after [Attachment.Wait] on a box that it started, until the box is at rest: its supervisor gone, its policy carried
// out, nothing of it left. It returns false if the box was removed by that policy. A box that is to run again is not waited for.
func (b *Box) Settle(ctx context.Context, a *Attachment) (bool, error) {
	defer a.shim.Close()
	for {
		look, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		err := a.shim.Wait(look)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return false, err
		}
		rec, err := b.rt.db.Get(ctx, b.id)
		switch {
		case errors.Is(err, ErrNotFound): // its supervisor is about to go, too
		case err != nil:
			return false, err
		case rec.Generation > a.gen, lifecycle.WantsRestart(rec):
			return true, nil
		}
	}
	_, err := b.Info(ctx)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}
