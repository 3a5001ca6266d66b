package coffer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/shim"
	"github.com/coffer-box/coffer/internal/signals"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
	"github.com/coffer-box/coffer/internal/wire"
)

// Box is a handle of one box. It holds no connection and no state; each call looks at what is.
type Box struct {
	rt   *Runtime
	id   string
	name string
}

// ID is the box's identity, 32 hexadecimal digits.
func (b *Box) ID() string { return b.id }

// Name is the name that the box had when the handle was made.
func (b *Box) Name() string { return b.name }

// Layer is one protection of a box's jail.
type Layer = jail.Layer

// Info is what is known about a box. Times that are not known are zero.
type Info struct {
	ID           string            `json:"id"`
	Name         string            `json:"name"`
	Image        string            `json:"image"`
	ImageID      string            `json:"image_id"`
	Engine       string            `json:"engine"`
	Status       string            `json:"status"`           // creating, created, starting, running, stopping, stopped, restarting, removing, failed
	Health       *Health           `json:"health,omitempty"` // nil: not checked, or not running; in a list it is the status alone
	Command      []string          `json:"command"`
	Env          []string          `json:"env,omitempty"`
	Dir          string            `json:"dir"`
	User         string            `json:"user,omitempty"`
	TTY          bool              `json:"tty"`
	OpenStdin    bool              `json:"open_stdin"`
	Hostname     string            `json:"hostname"`
	Labels       map[string]string `json:"labels,omitempty"`
	ExposedPorts []string          `json:"exposed_ports,omitempty"` // that the image says it serves, as "5432/tcp"
	Created      time.Time         `json:"created"`
	Started      time.Time         `json:"started,omitzero"`
	Finished     time.Time         `json:"finished,omitzero"`
	ExitCode     int               `json:"exit_code"`
	Reason       string            `json:"reason,omitempty"` // why it ended: exited, stopped, killed, oom, timeout, lost, failed, copied (with its home)
	OOMKilled    bool              `json:"oom_killed"`
	Error        string            `json:"error,omitempty"`
	Generation   uint64            `json:"generation"`
	RestartCount int               `json:"restart_count"`
	Restart      Restart           `json:"restart"`
	Remove       bool              `json:"remove"`
	StopSignal   string            `json:"stop_signal"`
	StopTimeout  time.Duration     `json:"stop_timeout"`
	Timeout      time.Duration     `json:"timeout,omitempty"`
	HealthCheck  *spec.Health      `json:"health_check,omitempty"` // how it is checked; nil: not at all
	Resources    spec.Resources    `json:"resources"`
	ReadOnly     bool              `json:"read_only"`
	Tmpfs        []Tmpfs           `json:"tmpfs,omitempty"`
	Volumes      []spec.Volume     `json:"volumes,omitempty"`
	ShimPID      int               `json:"shim_pid,omitempty"`
	InitPID      int               `json:"init_pid,omitempty"` // first process of the jail, on the host
	Cgroup       string            `json:"cgroup,omitempty"`
	Layers       []Layer           `json:"layers,omitempty"` // protections of the jail at the last start
	StateDir     string            `json:"state_dir"`
	ShimLog      string            `json:"shim_log"`
}

// restarting is the status of a box that has ended and that its policy starts again.
const restarting = "restarting"

func (r *Runtime) info(b *state.Box) Info {
	s := b.Spec
	files := r.home.Box(b.ID)
	i := Info{
		ID: b.ID, Name: b.Name, Image: s.Image, ImageID: s.ImageID, Engine: s.Engine, Status: string(b.Phase), Command: s.Main.Args,
		Env: s.Main.Env, Dir: s.Main.Dir, User: s.Main.User, TTY: s.Main.TTY, OpenStdin: s.OpenStdin, Hostname: s.Hostname, Labels: s.Labels,
		ExposedPorts: s.Ports, Created: b.CreatedAt, Started: b.StartedAt, Finished: b.FinishedAt, ExitCode: b.ExitCode, Reason: b.Reason, OOMKilled: b.OOMKilled,
		Error: b.Error, Generation: b.Generation, RestartCount: b.RestartCount, Restart: s.Restart, Remove: s.Remove,
		StopSignal: signals.Name(s.StopSignal), StopTimeout: s.StopTimeout, Timeout: s.Timeout, Resources: s.Resources, ReadOnly: s.ReadOnly,
		Tmpfs: s.Tmpfs, Volumes: s.Volumes, Health: recordedHealth(b), HealthCheck: s.Health, StateDir: files.State(), ShimLog: files.ShimLog(),
	}
	if lifecycle.WantsRestart(b) {
		i.Status = restarting
	}
	_ = json.Unmarshal(b.Layers, &i.Layers)
	var h lifecycle.Handles
	if b.Phase.Live() && json.Unmarshal(b.Handles, &h) == nil {
		if h.Shim != nil {
			i.ShimPID = h.Shim.PID
		}
		if h.Init != nil {
			i.InitPID = h.Init.PID
		}
		if h.Cgroup != nil {
			i.Cgroup = h.Cgroup.Unified
		}
	}
	return i
}

// Get finds a box by name, id, or the beginning of an id.
func (r *Runtime) Get(ctx context.Context, ref string) (*Box, error) {
	b, err := r.db.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	return &Box{rt: r, id: b.ID, name: b.Name}, nil
}

// List returns all boxes, oldest first. What it says of each was looked at, not only read: a box whose supervisor was killed is
// reaped and shown as ended. One that cannot be looked at or ended is listed as it is on record, with what is wrong in its Error and
// in the error that comes with the list.
func (r *Runtime) List(ctx context.Context) ([]Info, error) {
	boxes, err := r.db.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Info, 0, len(boxes))
	var errs []error
	for _, b := range boxes {
		now, err := r.refresh(ctx, b)
		if err != nil {
			b.Error, now = err.Error(), b
			errs = append(errs, err)
		}
		if now != nil {
			out = append(out, r.info(now))
		}
	}
	return out, errors.Join(errs...)
}

// Info looks at the box.
func (b *Box) Info(ctx context.Context) (Info, error) {
	rec, err := b.rt.db.Get(ctx, b.id)
	if err != nil {
		return Info{}, err
	}
	if rec, err = b.rt.refresh(ctx, rec); err != nil {
		return Info{}, err
	}
	if rec == nil {
		return Info{}, fmt.Errorf("%w: %s", ErrNotFound, b.name)
	}
	i := b.rt.info(rec)
	i.Health = b.healthOf(ctx, rec)
	return i, nil
}

// refresh reconciles a record that may be out of date, if nobody else is working on that box right now.
func (r *Runtime) refresh(ctx context.Context, b *state.Box) (*state.Box, error) {
	if lifecycle.Settled(b) {
		return b, nil
	}
	if b.Phase != state.Stopping && b.Phase != state.Removing && b.Phase != state.Creating {
		if alive, err := r.keeper.Alive(b); err != nil || alive {
			return b, err
		}
	}
	dir := r.home.Box(b.ID).Dir
	if b.Phase == state.Removing {
		// A removal that was cut off may have moved it away already.
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("box %s: %w", b.Name, err)
		}
	}
	op, err := supervise.TryLock(r.home.Box(b.ID).OpLock(), self())
	if errors.Is(err, supervise.ErrLocked) || errors.Is(err, os.ErrNotExist) {
		// Somebody is at it; or the box's directory is lost, and what may live of it is still found by its names.
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	defer op.Unlock()
	if b, err = r.db.Get(ctx, b.ID); errors.Is(err, ErrNotFound) {
		return nil, os.RemoveAll(dir) // made again above
	} else if err != nil {
		return nil, err
	}
	if b, err = r.keeper.Reconcile(ctx, b); err != nil || b == nil {
		return nil, err
	}
	return r.resume(ctx, b)
}

// resume does what is on record and whoever was to do it was killed: it asks for the rest of a stop, without waiting for it, and
// carries out the restart policy. The caller holds the operation lock.
func (r *Runtime) resume(ctx context.Context, b *state.Box) (*state.Box, error) {
	alive, err := r.keeper.Alive(b)
	if err != nil {
		return nil, err
	}
	box := &Box{rt: r, id: b.ID, name: b.Name}
	if alive && b.Phase == state.Stopping {
		box.requestStop(ctx, b, shim.StopRequest{Timeout: int64(b.Spec.StopTimeout), Resume: true})
	}
	if alive || !lifecycle.WantsRestart(b) {
		return b, nil
	}
	if err := box.launch(ctx, b, b.RestartCount+1); err != nil {
		// What keeps it from starting stands in the record, and in the log of whoever asked for one.
		r.log.WarnContext(ctx, "restart failed", "box", b.Name, "error", err)
	}
	return r.db.Get(ctx, b.ID)
}

func self() map[string]any {
	return map[string]any{"pid": os.Getpid(), "program": filepath.Base(os.Args[0])}
}

// opPatience is how long a command waits for another one on the same box.
const opPatience = 60 * time.Second

func (r *Runtime) lockOp(ctx context.Context, id string) (*supervise.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, opPatience)
	defer cancel()
	for {
		// A lost directory must not keep a box from being stopped or removed.
		if err := os.MkdirAll(r.home.Box(id).Dir, 0o700); err != nil {
			return nil, fmt.Errorf("box %.12s: %w", id, r.unwritable(err))
		}
		l, err := supervise.WaitLock(ctx, r.home.Box(id).OpLock(), self())
		if errors.Is(err, os.ErrNotExist) && ctx.Err() == nil {
			continue // whoever had the lock has removed the box, and the directory with it
		}
		return l, r.unwritable(err)
	}
}

// exclusive runs fn on the box's reconciled record while no other command works on the box.
func (b *Box) exclusive(ctx context.Context, fn func(*state.Box) error) error {
	if _, err := b.rt.db.Get(ctx, b.id); err != nil {
		return err
	}
	op, err := b.rt.lockOp(ctx, b.id)
	if err != nil {
		return err
	}
	defer op.Unlock()
	gone := func() error {
		_ = os.RemoveAll(b.rt.home.Box(b.id).Dir)
		return fmt.Errorf("%w: %s", ErrNotFound, b.name)
	}
	rec, err := b.rt.db.Get(ctx, b.id)
	if errors.Is(err, ErrNotFound) {
		return gone()
	} else if err != nil {
		return err
	}
	if rec, err = b.rt.keeper.Reconcile(ctx, rec); err != nil {
		return err
	}
	if rec == nil {
		return gone()
	}
	if err := fn(rec); err != nil {
		return errors.Join(err, b.policy(context.WithoutCancel(ctx)))
	}
	return b.policy(ctx)
}

// policy removes a box that was to be removed at its end. A shim that finds the operation lock taken leaves this to its holder.
func (b *Box) policy(ctx context.Context) error {
	rec, err := b.rt.db.Get(ctx, b.id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil || !lifecycle.Removable(rec) {
		return err
	}
	return b.rt.keeper.Remove(ctx, rec, true)
}

// makeFiles makes what a box needs on disk.
func (r *Runtime) makeFiles(b *state.Box) error {
	dirs := []string{r.home.Box(b.ID).State()}
	for i := range b.Spec.Volumes {
		v := &b.Spec.Volumes[i]
		if v.Anonymous {
			v.Source = filepath.Join(r.home.Volumes(b.ID), strconv.Itoa(i))
			dirs = append(dirs, v.Source)
		}
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
		if os.Geteuid() == 0 {
			// Root's jails run as an unprivileged id of their own, which owns the files of the layer and of anonymous volumes.
			id := int(jail.HostIDFor(b.ID))
			if err := os.Chown(d, id, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// StopOption changes a stop.
type StopOption func(*stopOptions)

type stopOptions struct {
	timeout *time.Duration
}

// WithTimeout waits at most d for an orderly end before it kills.
func WithTimeout(d time.Duration) StopOption { return func(o *stopOptions) { o.timeout = &d } }

// Stop ends the box: its stop signal first, SIGKILL for what is left after its stop timeout. It returns when nothing of the box
// lives. A box that does not run is no error.
func (b *Box) Stop(ctx context.Context, opts ...StopOption) error {
	return b.exclusive(ctx, func(rec *state.Box) error { return b.stopForGood(ctx, rec, opts...) })
}

// stopForGood is stop for a box that its restart policy is not to start again.
func (b *Box) stopForGood(ctx context.Context, rec *state.Box, opts ...StopOption) error {
	if _, err := b.rt.db.Update(ctx, b.id, state.Change{}, func(s *state.Box) error { s.ManualStop = true; return nil }); err != nil {
		return err
	}
	return b.stop(ctx, rec, opts...)
}

// stop ends the present generation. The caller holds the operation lock.
func (b *Box) stop(ctx context.Context, rec *state.Box, opts ...StopOption) error {
	alive, err := b.rt.keeper.Alive(rec)
	if err != nil {
		return err
	}
	if !alive && !rec.Phase.Live() {
		// Nothing should live. That it does not is checked all the same: the record may be wrong.
		_, err := b.rt.keeper.Reap(ctx, rec)
		return err
	}
	o := stopOptions{}
	for _, opt := range opts {
		opt(&o)
	}
	timeout := rec.Spec.StopTimeout
	if o.timeout != nil {
		timeout = *o.timeout
	}
	if rec, err = b.rt.db.Update(ctx, b.id, state.Change{}, func(s *state.Box) error {
		if s.Phase.Live() {
			s.Phase = state.Stopping
		}
		return nil
	}); err != nil {
		return err
	}
	if alive {
		b.askToStop(ctx, rec, shim.StopRequest{Timeout: int64(timeout)}, timeout)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// Whether or not the shim has done its part, this sees that nothing is left, and kills what is.
	if _, err := b.rt.keeper.Reap(ctx, rec); err != nil {
		return fmt.Errorf("stop box %s: %w", rec.Name, err)
	}
	now, err := b.rt.db.Get(ctx, b.id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if now.Phase.Live() {
		_, err = b.rt.keeper.MarkEnded(ctx, now, lifecycle.End{Code: lifecycle.CodeLost, Reason: lifecycle.ReasonStopped})
	}
	return err
}

// grace is what a shim gets beyond the stop timeout for ending the tree and recording it.
const grace = 5 * time.Second

// askToStop lets the shim end the box in order, and returns when it is gone or its time is up.
func (b *Box) askToStop(ctx context.Context, rec *state.Box, req shim.StopRequest, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, min(timeout, shim.MaxStop)+grace)
	defer cancel()
	// Watched before it is asked: with --rm the file is gone before the shim is.
	w, err := supervise.Watch(b.rt.home.Box(b.id).ShimLock())
	if err != nil {
		return
	}
	defer w.Close()
	if b.requestStop(ctx, rec, req) {
		_ = w.Wait(ctx)
	}
}

// requestStop tells the shim to end the box, and whether the shim took it.
func (b *Box) requestStop(ctx context.Context, rec *state.Box, req shim.StopRequest) bool {
	ctx, done := context.WithTimeout(ctx, grace)
	defer done()
	c, err := b.rt.dial(ctx, rec)
	if err == nil {
		defer c.Close()
		err = c.Call(ctx, shim.OpStop, req, nil)
	}
	if err != nil {
		b.rt.log.DebugContext(ctx, "shim does not answer", "box", rec.Name, "error", err)
	}
	return err == nil
}

// RemoveOption changes a removal.
type RemoveOption func(*removeOptions)

type removeOptions struct{ force, volumes bool }

// Force removes a box that runs, killing it.
func Force() RemoveOption { return func(o *removeOptions) { o.force = true } }

// WithVolumes removes the box's anonymous volumes too.
func WithVolumes() RemoveOption { return func(o *removeOptions) { o.volumes = true } }

// Remove removes the box and its files. A box that runs is [ErrRunning] unless [Force] is given. On any error the record and the
// files are kept.
func (b *Box) Remove(ctx context.Context, opts ...RemoveOption) error {
	var o removeOptions
	for _, opt := range opts {
		opt(&o)
	}
	if o.force {
		b.hurry(ctx)
	}
	return b.exclusive(ctx, func(rec *state.Box) error {
		if rec.Phase.Live() && !o.force {
			return fmt.Errorf("box %s: %w: stop it first, or force its removal", rec.Name, ErrRunning)
		}
		if lifecycle.WantsRestart(rec) && !o.force {
			return fmt.Errorf("box %s: %w: its restart policy is about to start it again: stop it first, or force its removal", rec.Name, ErrRunning)
		}
		return b.rt.keeper.Remove(ctx, rec, o.volumes || rec.Spec.Remove)
	})
}

// hurry ends the patience of a stop that another command waits for.
func (b *Box) hurry(ctx context.Context) {
	rec, err := b.rt.db.Get(ctx, b.id)
	if err == nil && rec.Phase == state.Stopping {
		b.requestStop(ctx, rec, shim.StopRequest{Timeout: 0})
	}
}

// Kill sends a signal to the main process, of a box that is being stopped too. It does not wait for what follows.
func (b *Box) Kill(ctx context.Context, signal string) error {
	n, err := signals.Parse(signal)
	if err != nil {
		return invalid("%w", err)
	}
	return b.withAgentIn(ctx, func(c *wire.Client) error {
		_, err := b.rt.db.Update(ctx, b.id, state.Change{Event: "kill", Attrs: map[string]string{"signal": signals.Name(n)}}, func(s *state.Box) error {
			if unix.Signal(n) == unix.SIGKILL {
				s.ManualStop = true
			}
			return nil
		})
		if err != nil {
			return err
		}
		return c.Signal(ctx, n)
	}, state.Running, state.Stopping)
}

// Rename gives the box another name.
func (b *Box) Rename(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	_, err := b.rt.db.Update(ctx, b.id, state.Change{Event: "rename", Attrs: map[string]string{"to": name}}, func(s *state.Box) error {
		s.Name = name
		return nil
	})
	return err
}

// ExitStatus is how a main process ended.
type ExitStatus struct {
	Code      int    // 128+n for death by signal n
	Reason    string // see Info.Reason
	OOMKilled bool
	Error     string // it never ran
}

// Wait waits until the box does not run, and tells how its last run ended. A box that was removed meanwhile is [ErrNotFound].
func (b *Box) Wait(ctx context.Context) (ExitStatus, error) {
	for {
		i, err := b.Info(ctx)
		if err != nil {
			return ExitStatus{}, err
		}
		switch state.Phase(i.Status) {
		case state.Stopped, state.Failed, restarting:
			return ExitStatus{Code: i.ExitCode, Reason: i.Reason, OOMKilled: i.OOMKilled, Error: i.Error}, nil
		case state.Created:
		default:
			lock := b.rt.home.Box(b.id).ShimLock()
			if held, err := supervise.Held(lock); err != nil {
				return ExitStatus{}, err
			} else if held {
				if err := supervise.WaitFree(ctx, lock); err != nil {
					return ExitStatus{}, err
				}
				continue
			}
		}
		select {
		case <-ctx.Done():
			return ExitStatus{}, ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}
