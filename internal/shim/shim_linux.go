package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/assets"
	"github.com/coffer-box/coffer/internal/cgroup"
	"github.com/coffer-box/coffer/internal/engine"
	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
	"github.com/coffer-box/coffer/internal/wire"
)

// Main is the whole life of a shim; it returns the process' exit code. The calling goroutine must be locked to the main thread
// and must stay alive until Main returns: the kernel ends the jail with that thread.
func Main(a Args, engines []engine.Engine) int {
	debug.SetGCPercent(30)
	// Terminals and login sessions of whoever started the box are nothing to it.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	words := &boundLog{f: os.Stderr, max: maxLog}
	log := slog.New(slog.NewTextHandler(words, nil))
	launch := &launcher{f: os.NewFile(LaunchFD, "launch"), kept: a.Mode != Detached}
	unix.CloseOnExec(LaunchFD)
	unix.CloseOnExec(LockFD)
	jail.CloseInherited(LockFD + 1)
	jailWords, finish, err := words.pipe()
	if err != nil {
		log.Error("shim", "error", err)
		launch.fail(err)
		return 1
	}
	defer finish()
	s := &shim{args: a, engines: engines, log: log, launch: launch, stderr: jailWords}
	if err := s.run(context.Background()); err != nil {
		log.Error("shim", "error", err)
		launch.fail(err)
		return 1
	}
	return 0
}

// launcher answers whoever started the shim, once.
type launcher struct {
	f    *os.File
	kept bool // the launcher goes on to use its end of the pipe
	done bool
}

// gone is closed when the launcher has ended or needs the shim no more.
func (l *launcher) gone() <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		// The writing end of a pipe tells nothing but that nobody reads any more.
		for {
			p := []unix.PollFd{{Fd: int32(l.f.Fd())}}
			if n, err := unix.Poll(p, -1); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		l.f.Close()
		close(ch)
	}()
	return ch
}

func (l *launcher) reply(r LaunchReply) {
	if l.done {
		return
	}
	l.done = true
	_ = json.NewEncoder(l.f).Encode(r) // the launcher may be gone, which changes nothing
	if r.OK && !l.kept {
		l.f.Close()
	}
}

func (l *launcher) fail(err error) {
	l.reply(LaunchReply{Error: err.Error(), Code: exitCode(err)})
}

// exitCode is what Docker exits with for an error before the main process ran.
func exitCode(err error) int {
	var we *wire.Error
	if errors.As(err, &we) {
		return we.ExitCode()
	}
	return 125
}

type shim struct {
	args    Args
	engines []engine.Engine
	log     *slog.Logger
	launch  *launcher
	stderr  *os.File // takes what jail and kernel have to say

	keeper  *lifecycle.Keeper
	set     assets.Set
	files   home.Box
	box     *state.Box
	handles lifecycle.Handles
	group   *cgroup.Group
	host    *cgroup.Host
	hub     *hub        // of the last generation whose agent answered
	limits  *jail.Layer // whether the limits that were asked for are enforced; nil: none were
}

func (s *shim) run(ctx context.Context) (err error) {
	lock, err := supervise.Inherit(LockFD, map[string]int{"pid": os.Getpid()})
	if err != nil {
		return err
	}
	if err := lock.Keep(); err != nil {
		return err
	}
	if err := s.open(ctx); err != nil {
		return err
	}
	defer func() { s.keeper.DB.Close() }()
	for {
		again, err := s.generation(ctx)
		if err != nil || !again {
			return err
		}
	}
}

func (s *shim) open(ctx context.Context) error {
	db, err := state.Open(ctx, s.args.Home)
	if err != nil {
		return err
	}
	l := home.Layout{Root: s.args.Home, Instance: db.Instance()}
	s.keeper = &lifecycle.Keeper{DB: db, Home: l, Log: s.log}
	s.files = l.Box(s.args.ID)
	s.box, err = db.Get(ctx, s.args.ID)
	if err != nil {
		return err
	}
	if due := s.box.Phase == state.Starting || s.args.Mode == Files && s.box.Visit; s.box.Generation != s.args.Generation || !due {
		return fmt.Errorf("box %s: %w", s.box.Name, state.ErrStale)
	}
	return nil
}

// generation runs the box once and carries out what follows. It tells whether to run it again.
func (s *shim) generation(ctx context.Context) (bool, error) {
	r, err := s.start(ctx)
	if err != nil {
		end := lifecycle.End{Code: exitCode(err), Reason: lifecycle.ReasonFailed, Error: err.Error()}
		if _, ferr := s.finish(ctx, end); ferr != nil {
			err = errors.Join(err, ferr)
		}
		return false, err
	}
	if s.args.Mode == Files {
		r.visit(ctx)
		return s.finish(ctx, lifecycle.End{})
	}
	return s.finish(ctx, r.wait(ctx))
}

// Launch implements [engine.Launcher]: the jail is placed and recorded while its gate is shut.
func (s *shim) Launch(ctx context.Context, cfg jail.Config) (out *jail.Jail, err error) {
	// The child inherits the open file description, and with it the lock.
	lock, err := supervise.TryLock(s.files.InitLock(), map[string]any{"box": s.args.ID, "generation": s.box.Generation})
	if err != nil {
		return nil, fmt.Errorf("lock of the jail: %w", err)
	}
	defer lock.Unlock()
	if cfg.Cgroup, err = s.group.Birthplace(cgroup.Tree); err != nil {
		return nil, err
	}
	defer cfg.Cgroup.Close()
	cfg.Name, cfg.Lock, cfg.Stderr = s.keeper.Home.GenerationName(s.args.ID, s.box.Generation), lock.File(), s.stderr
	j, err := jail.Spawn(cfg)
	if err != nil {
		return nil, err
	}
	if err := s.group.Add(ctx, cgroup.Tree, j.PID()); err != nil {
		j.Abandon()
		return nil, err
	}
	h, err := supervise.Capture(j.PID())
	if err != nil {
		j.Abandon()
		return nil, err
	}
	s.handles.Init = &h
	if err := s.record(ctx, nil); err != nil {
		j.Abandon()
		return nil, err
	}
	if s.args.Mode == Detached {
		// While the jail sets itself up, since the kernel takes its time to move a process.
		moved := make(chan error, 1)
		go func() { moved <- s.group.Add(ctx, cgroup.Shim, os.Getpid()) }()
		defer func() {
			merr := <-moved
			if merr == nil {
				// Where the kernel has no pidfs, the generation's own control group is what tells this process from others.
				var self supervise.Handle
				if self, merr = supervise.Capture(os.Getpid()); merr == nil {
					s.handles.Shim = &self
				}
			}
			if merr != nil && err == nil {
				j.Kill()
				<-j.Done()
				out, err = nil, merr
			}
		}()
	}
	layers, err := j.Release(ctx)
	if err != nil {
		return nil, err
	}
	if s.limits != nil {
		layers = append(layers, *s.limits)
	}
	if s.box.Layers, err = json.Marshal(layers); err != nil {
		return nil, err
	}
	return j, nil
}

// record writes the handles as they are now.
func (s *shim) record(ctx context.Context, more func(*state.Box)) error {
	h, err := json.Marshal(s.handles)
	if err != nil {
		return err
	}
	event := ""
	if more != nil {
		event = "start"
	}
	layers := s.box.Layers
	b, err := s.keeper.DB.Update(ctx, s.args.ID, state.Change{Generation: s.box.Generation, Event: event}, func(b *state.Box) error {
		if b.Phase != state.Starting && !b.Visit {
			return fmt.Errorf("box %s is %s: %w", b.Name, b.Phase, state.ErrStale)
		}
		b.Handles, b.Layers = h, layers
		if more != nil {
			more(b)
		}
		return nil
	})
	if err == nil {
		s.box = b
	}
	return err
}

// enter makes the generation's control group.
func (s *shim) enter(ctx context.Context) error {
	var err error
	if s.host, err = cgroup.Detect(ctx); err != nil {
		return err
	}
	r := s.box.Spec.Resources
	lim := cgroup.Limits{Memory: r.Memory, CPUs: r.CPUs, PIDs: r.PIDs}
	s.limits = nil
	if lim != (cgroup.Limits{}) {
		s.limits = &jail.Layer{Name: "limits", Active: true}
	}
	if err := s.host.Supports(lim); err != nil && r.BestEffort {
		s.limits.Active, s.limits.Detail = false, err.Error()
		s.log.Warn("not every limit is enforced", "reason", err)
		lim = s.host.Enforceable(lim)
	}
	name := s.keeper.Home.GenerationName(s.args.ID, s.box.Generation)
	if s.group, err = s.host.Create(ctx, name, lim); err != nil {
		return err
	}
	rec := s.group.Record()
	boot, err := supervise.BootID()
	if err != nil {
		return err
	}
	self, err := supervise.Capture(os.Getpid())
	if err != nil {
		return err
	}
	s.handles = lifecycle.Handles{BootID: boot, Cgroup: &rec, Shim: &self}
	return nil
}

// startTime is how long a start may take. What a box with a quota has written is counted first, and may be that many objects of 4 KiB.
func startTime(b spec.Box) time.Duration {
	return time.Minute + time.Duration(b.Resources.DiskSize>>12)*100*time.Microsecond
}

// start brings the box up to where its main process runs, or, with a client to wait for, to where that client can start it.
func (s *shim) start(ctx context.Context) (_ *running, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTime(s.box.Spec))
	defer cancel()
	if err := s.enter(ctx); err != nil {
		return nil, err
	}
	set, err := assets.Ensure(ctx, s.keeper.Home.Root)
	if err != nil {
		return nil, err
	}
	// Held until the next start or the shim's end: policy may start the sentry again.
	s.set.Close()
	s.set = set
	images, err := image.Open(s.keeper.Home.Images(), s.log)
	if err != nil {
		return nil, err
	}
	rootfs, err := images.RootfsPaths(image.Image{RootfsID: s.box.Spec.RootfsID})
	if err != nil {
		return nil, err
	}
	eng, err := s.engine()
	if err != nil {
		return nil, err
	}
	in, err := eng.Start(ctx, engine.Spec{
		ID: s.keeper.Home.GenerationName(s.args.ID, s.box.Generation), Box: s.box.Spec, Sentry: set.Sentry, Scaffold: set.Scaffold,
		Images: rootfs, StateDir: s.files.State(), HostID: jail.HostIDFor(s.args.ID),
	}, s)
	if err != nil {
		return nil, err
	}
	r := &running{s: s, jail: in.Jail(), ended: make(chan struct{})}
	defer func() {
		if err != nil {
			r.kill()
		}
	}()
	sess, err := wire.NewClient(in.Agent())
	if err != nil {
		return nil, fmt.Errorf("connect to the box's agent: %w", err)
	}
	r.agent = wire.NewClientOf(sess)
	lower := lowerDirs(len(rootfs))
	if err := s.extras(ctx, r.agent, images, lower); err != nil {
		return nil, err
	}
	info, err := r.agent.Configure(ctx, setup(s.box, lower))
	if err != nil {
		return nil, fmt.Errorf("set up the box: %w", err)
	}
	for _, w := range info.Warnings {
		s.log.Warn("the box does without", "what", w)
	}
	log, err := logfile.NewWriter(s.files.Log(), s.box.Spec.LogMaxBytes, s.box.Spec.LogFiles)
	if err != nil {
		return nil, err
	}
	if s.box.Spec.Health != nil {
		r.health = s.newHealth(r.agent)
	}
	r.hub = newHub(s.log, log, s.files.Log())
	s.hub = r.hub
	if r.listener, err = s.listen(ctx); err != nil {
		return nil, err
	}
	r.open()
	if s.args.Mode == Files {
		s.launch.reply(LaunchReply{OK: true})
		return r, nil
	}
	if s.args.Mode == Attached && !s.launch.done {
		s.launch.reply(LaunchReply{OK: true})
		if err := r.awaitStart(ctx); err != nil {
			return nil, err
		}
	} else if err := r.startMain(ctx, nil); err != nil {
		return nil, err
	}
	if err := s.record(ctx, func(b *state.Box) {
		b.Phase, b.StartedAt, b.FinishedAt, b.Error = state.Running, time.Now().UTC().Round(0), time.Time{}, ""
		b.Health = ""
		if r.health != nil {
			b.Health = state.HealthStarting
		}
	}); err != nil {
		return nil, err
	}
	s.launch.reply(LaunchReply{OK: true})
	return r, nil
}

func (s *shim) engine() (engine.Engine, error) {
	for _, e := range s.engines {
		if e.Name() == s.box.Spec.Engine {
			return e, nil
		}
	}
	return nil, fmt.Errorf("this coffer has no engine %q", s.box.Spec.Engine)
}

func (s *shim) listen(ctx context.Context) (net.Listener, error) {
	path := s.files.Socket()
	for {
		if err := s.keeper.Home.MakeRun(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		// We hold the box's lock, so whatever has the name is left over.
		_ = os.Remove(path)
		old := unix.Umask(0o177)
		l, err := net.Listen("unix", path)
		unix.Umask(old)
		if err == nil {
			return l, nil
		}
		// The directory may have gone with another box's socket just now.
		if !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
}

// lowerDirs are where an engine has put the segments of an image.
func lowerDirs(segments int) []string {
	var dirs []string
	for i := range segments {
		dirs = append(dirs, "/lower/"+strconv.Itoa(i))
	}
	return dirs
}

func setup(b *state.Box, lower []string) wire.Setup {
	out := wire.Setup{Hostname: b.Spec.Hostname, Lower: lower, ReadOnly: b.Spec.ReadOnly, Tmpfs: b.Spec.Tmpfs}
	for i, v := range b.Spec.Volumes {
		out.Volumes = append(out.Volumes, wire.SetupVolume{
			Staging: "/vol/" + strconv.Itoa(i), Target: v.Target, ReadOnly: v.ReadOnly, Fill: v.Anonymous && !v.ReadOnly,
		})
	}
	out.Files = []wire.SetupFile{
		{Path: "/etc/hosts", Data: []byte("127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.0.1\t" + b.Spec.Hostname + "\n")},
		{Path: "/etc/resolv.conf", Data: []byte("# this box has no network\n"), Keep: true},
	}
	return out
}

// finish ends what is left of the generation, records its end, and decides what follows.
func (s *shim) finish(ctx context.Context, end lifecycle.End) (again bool, err error) {
	_ = s.files.RemoveSocket() // else the next command does
	if s.group != nil {
		end.OOMKilled = s.group.OOMKilled()
		if end.OOMKilled && end.Reason != lifecycle.ReasonStopped {
			end.Reason = lifecycle.ReasonOOM
		}
		if err := s.clear(ctx); err != nil {
			return false, err
		}
	}
	if s.args.Mode == Files {
		return false, nil // the box is as it was
	}
	b, err := s.keeper.DB.Get(ctx, s.args.ID)
	if err != nil {
		return false, err
	}
	if b.Generation != s.box.Generation || b.Phase == state.Removing {
		return false, nil // somebody else has taken over
	}
	if b, err = s.keeper.MarkEnded(ctx, b, end); err != nil {
		return false, err
	}
	s.box = b
	if lifecycle.WantsRestart(b) {
		return s.restart(ctx, pause(b.RestartCount))
	}
	s.deliver(ctx, end)
	if b.Spec.Remove {
		return false, s.removeSelf(ctx, end)
	}
	return false, nil
}

// deliver waits for the clients that have not taken the last of the output yet. They take it at once, unless they are stopped. Nothing
// of the box lives meanwhile but this process, which holds the box's lock and is ended by whoever starts or removes the box.
func (s *shim) deliver(ctx context.Context, end lifecycle.End) {
	if s.hub == nil {
		return
	}
	if end.Reason == lifecycle.ReasonStopped {
		// Somebody waits for that lock.
		var cancel func()
		ctx, cancel = context.WithTimeout(ctx, stopGrace)
		defer cancel()
	}
	s.hub.delivered(ctx)
}

// clear kills the tree, sees it empty, and takes this process out of the group so that all of it can be removed.
func (s *shim) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, supervise.Patience)
	defer cancel()
	if err := s.group.Kill(ctx, cgroup.Tree); err != nil {
		return err
	}
	if err := s.group.WaitEmpty(ctx, cgroup.Tree); err != nil && !s.group.Empty() {
		return fmt.Errorf("processes of the box do not end: %w", err)
	}
	if s.args.Mode == Detached {
		if err := s.group.Leave(); err != nil {
			// Then the next command removes the directories, once this process has ended.
			s.log.Warn("control group is left for the next command", "error", err)
			return nil
		}
	}
	return s.group.Remove(ctx)
}

// pause comes before another start. It is doubled each time, as Docker does, so that a box that cannot start does not take the machine.
func pause(restarts int) time.Duration {
	return min(100*time.Millisecond<<min(restarts, 10), time.Minute)
}

// restart waits and opens the next generation, unless a user has stopped or removed the box meanwhile.
func (s *shim) restart(ctx context.Context, wait time.Duration) (bool, error) {
	deadline := time.Now().Add(wait)
	for time.Now().Before(deadline) {
		time.Sleep(min(50*time.Millisecond, time.Until(deadline)))
		b, err := s.keeper.DB.Get(ctx, s.args.ID)
		if err != nil || b.ManualStop || b.Phase != state.Stopped {
			return false, nil
		}
	}
	b, err := s.keeper.DB.Update(ctx, s.args.ID, state.Change{Generation: s.box.Generation, Event: "restart"}, func(b *state.Box) error {
		if b.ManualStop || b.Phase != state.Stopped {
			return state.ErrStale
		}
		b.Phase, b.Handles = state.Starting, nil
		b.Generation++
		b.RestartCount++
		return nil
	})
	if errors.Is(err, state.ErrStale) || errors.Is(err, state.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s.box = b
	return true, nil
}

// removePatience is how long the shim waits for a command that works on the box, such as the one that has just started it.
const removePatience = 2 * time.Second

// removeSelf carries out --rm. A command that holds the operation lock and waits for this shim's end, as stop does, does it instead; so
// does whoever looks next if the lock stays taken.
func (s *shim) removeSelf(ctx context.Context, end lifecycle.End) error {
	who := map[string]int{"pid": os.Getpid()}
	op, err := supervise.TryLock(s.files.OpLock(), who)
	if errors.Is(err, supervise.ErrLocked) && end.Reason != lifecycle.ReasonStopped {
		ctx, cancel := context.WithTimeout(ctx, removePatience)
		op, err = supervise.WaitLock(ctx, s.files.OpLock(), who)
		cancel()
	}
	switch {
	case errors.Is(err, supervise.ErrLocked), errors.Is(err, context.DeadlineExceeded), errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	defer op.Unlock()
	b, err := s.keeper.DB.Update(ctx, s.args.ID, state.Change{Generation: s.box.Generation}, func(b *state.Box) error {
		if !lifecycle.Removable(b) {
			return state.ErrStale
		}
		b.Phase, b.RemoveVolumes = state.Removing, true
		return nil
	})
	if errors.Is(err, state.ErrStale) || errors.Is(err, state.ErrNotFound) {
		return nil // somebody has started or removed it
	}
	if err != nil {
		return err
	}
	return s.keeper.Discard(ctx, b, true)
}
