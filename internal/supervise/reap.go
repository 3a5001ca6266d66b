package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/cgroup"
)

// Target names one generation of a box by everything that is known about it. Any field but Name may be missing: whatever is
// there is used, and what is missing is looked for by derived name.
type Target struct {
	Name     string         // "coffer-<instance>-<box>-<generation>"
	BootID   string         // of the boot on which it was started; empty: unknown
	Cgroup   *cgroup.Record // as recorded at the start
	Shim     *Handle
	Init     *Handle // the jail's first process
	ShimLock string  // path of the lock that the shim holds
	InitLock string  // path of the lock file that the jail's first process keeps open
}

// Report says what a reap found.
type Report struct {
	Found bool // something of the generation was alive, or a control group was left of it
}

// LeftError says what a reap could not end. The record and the files of the box must be kept.
type LeftError struct{ Left []string }

func (e *LeftError) Error() string {
	return "still alive after the kill: " + strings.Join(e.Left, "; ") + "; see coffer doctor"
}

// Patience bounds how long the kernel may take to end killed processes.
const Patience = 10 * time.Second

// Reap ends everything of a generation and returns when it has seen that nothing is left. It may be called any number of times,
// by any process of the box's owner, at any point of the generation's life. A generation of an earlier boot is never signalled.
func Reap(ctx context.Context, t Target, log *slog.Logger) (Report, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	boot, err := BootID()
	if err != nil {
		return Report{}, err
	}
	if t.BootID != "" && t.BootID != boot {
		log.DebugContext(ctx, "generation of an earlier boot", "name", t.Name)
		return Report{}, otherBoot(ctx, t)
	}
	r := reaper{t: t, log: log}
	defer r.close()
	if err := r.find(ctx); err != nil {
		return Report{}, err
	}
	return r.finish(ctx)
}

// finish ends what has been found, and what that made until it ended.
func (r *reaper) finish(ctx context.Context) (Report, error) {
	report := Report{Found: len(r.procs) > 0 || len(r.groups) > 0}
	if left, err := r.end(ctx); err != nil {
		return report, err
	} else if len(left) > 0 {
		return report, &LeftError{Left: left}
	}
	for _, g := range r.groups {
		if err := g.Remove(context.WithoutCancel(ctx)); err != nil {
			return report, &LeftError{Left: []string{err.Error()}}
		}
	}
	if left := r.verify(); len(left) > 0 {
		return report, &LeftError{Left: left}
	}
	return report, nil
}

// otherBoot signals nothing: no process of this boot can be the generation's. That nothing of it lives is looked at all the
// same, since a database that was copied or restored may name the wrong boot.
func otherBoot(ctx context.Context, t Target) error {
	r := reaper{t: t}
	var left []string
	for _, path := range r.locks() {
		if held, err := Held(path); err != nil {
			return err
		} else if held {
			left = append(left, "lock "+path+" is held by "+Holder(path)+", although its record is of an earlier boot")
		}
	}
	if err := r.findByName(ctx); err != nil {
		return err
	}
	for _, g := range r.groups {
		if busy, err := g.Populated(); err != nil || busy {
			left = append(left, "control group "+g.Record().Name()+" has processes, although its record is of an earlier boot")
		} else if err := g.Remove(ctx); err != nil {
			left = append(left, err.Error())
		}
	}
	if len(left) > 0 {
		return &LeftError{Left: left}
	}
	return nil
}

// retry is when a kill is given again, doubled each time: it covers what was on its way into the control group during the first.
const retry = 100 * time.Millisecond

// foreignBound is how long processes that are not the box's may keep its pid namespace from ending before that is reported.
const foreignBound = 2 * time.Second

// end kills until everything is seen to have ended, or patience does, and says what is left.
func (r *reaper) end(ctx context.Context) ([]string, error) {
	began := time.Now()
	for slice := retry; ; slice *= 2 {
		kerr := r.kill(ctx)
		sctx, cancel := context.WithTimeout(ctx, slice)
		left, foreign := r.left(sctx)
		cancel()
		switch {
		case len(left) == 0:
			if busy, err := r.lookAgain(ctx); err != nil || !busy {
				return nil, err
			}
		case ctx.Err() != nil, errors.Is(kerr, os.ErrPermission), foreign && time.Since(began) > foreignBound:
			if kerr != nil {
				left = append(left, kerr.Error())
			}
			return left, nil
		}
		if err := r.findHolders(); err != nil {
			return nil, err
		}
	}
}

// lookAgain finds the control groups anew once all processes have ended: a shim that had recorded nothing may have made them, or more of
// them, after they were looked for. It tells whether something lives in one.
func (r *reaper) lookAgain(ctx context.Context) (busy bool, err error) {
	if r.recorded || len(r.procs) == 0 {
		return false, nil
	}
	r.groups = nil
	if err := r.findByName(ctx); err != nil {
		return false, err
	}
	for _, g := range r.groups {
		b, err := g.Populated()
		if err != nil {
			return false, err
		}
		busy = busy || b
	}
	return busy, nil
}

// verify looks once more, in ways that share nothing with the kill.
func (r *reaper) verify() []string {
	var left []string
	for _, path := range r.locks() {
		if held, err := Held(path); err != nil {
			left = append(left, err.Error())
		} else if held {
			left = append(left, "lock "+path+" is held by "+Holder(path))
		}
	}
	if r.t.InitLock != "" {
		for _, p := range jailInits(r.t.InitLock) {
			left = append(left, describe(p.PID)+" still holds "+r.t.InitLock)
			p.Close()
		}
	}
	return left
}

// locks lists the lock files of the generation.
func (r *reaper) locks() []string {
	return slices.DeleteFunc([]string{r.t.ShimLock, r.t.InitLock}, func(p string) bool { return p == "" })
}

type reaper struct {
	t      Target
	log    *slog.Logger
	groups []*cgroup.Group
	procs  []*Process // the shim and the first processes of jails
	shim   *Process   // those of procs that a handle or lock led to
	init   *Process

	recorded bool // the group is the one on record, and so whole
}

// add keeps a process, unless it is the caller itself or kept already.
func (r *reaper) add(p *Process) bool {
	if p.PID == os.Getpid() || slices.ContainsFunc(r.procs, func(o *Process) bool { return o.PID == p.PID && o.exists() }) {
		p.Close()
		return false
	}
	r.procs = append(r.procs, p)
	return true
}

func (r *reaper) close() {
	for _, p := range r.procs {
		p.Close()
	}
}

// find collects processes by record and by lock, then control groups by record or by derived name, before anything is signalled. In this
// order a group that is not found can only be made by a process that is.
func (r *reaper) find(ctx context.Context) error {
	for _, k := range []struct {
		h  *Handle
		to **Process
	}{{r.t.Shim, &r.shim}, {r.t.Init, &r.init}} {
		if k.h == nil {
			continue
		}
		p, err := k.h.Open()
		switch {
		case err == nil && p.Ended():
			// A zombie that its parent has not collected is dead, however long that takes; ours is collected.
			collect(p.fd)
			p.Close()
		case err == nil:
			if r.add(p) {
				*k.to = p
			}
		case errors.Is(err, ErrGone), errors.Is(err, ErrStranger):
		default:
			return err
		}
	}
	if err := r.findHolders(); err != nil {
		return err
	}
	if r.t.Cgroup != nil && r.t.Cgroup.Name() == r.t.Name {
		g, err := cgroup.Open(*r.t.Cgroup)
		switch {
		case err == nil:
			r.groups, r.recorded = append(r.groups, g), true
		case errors.Is(err, cgroup.ErrGone), errors.Is(err, cgroup.ErrRecord):
			r.log.DebugContext(ctx, "recorded control group cannot be used", "name", r.t.Name, "error", err)
		default:
			return err
		}
	}
	if r.recorded {
		return nil
	}
	return r.findByName(ctx)
}

func (r *reaper) findByName(ctx context.Context) error {
	if r.t.Name == "" {
		return nil
	}
	h, err := cgroup.Detect(ctx)
	if err != nil {
		return err
	}
	for _, rec := range h.Find(ctx, r.t.Name) {
		if rec.Name() != r.t.Name { // the prefix also finds generation 10 for 1
			continue
		}
		g, err := cgroup.Open(rec)
		if errors.Is(err, cgroup.ErrGone) {
			continue
		}
		if err != nil {
			return err
		}
		r.groups = append(r.groups, g)
	}
	return nil
}

// findHolders adds the holders of locks that are held although no record led to a live process: it was lost, never written, or
// cannot be proved on this kernel.
func (r *reaper) findHolders() error {
	if path := r.t.InitLock; path != "" && (r.init == nil || r.init.Ended()) {
		held, err := Held(path)
		if err != nil {
			return err
		}
		if held {
			for _, p := range jailInits(path) {
				if r.add(p) {
					r.init = p
					r.log.Debug("found by its lock", "pid", p.PID, "name", r.t.Name)
				}
			}
		}
	}
	if path := r.t.ShimLock; path != "" && (r.shim == nil || r.shim.Ended()) {
		held, err := Held(path)
		if err != nil {
			return err
		}
		if held {
			for _, p := range lockHolders(path) {
				if r.add(p) {
					r.shim = p
					r.log.Debug("found by its lock", "pid", p.PID, "name", r.t.Name)
				}
			}
		}
	}
	return nil
}

// ShimArg is the hidden command whose process is a shim.
const ShimArg = "_shim"

// kill uses every handle there is, even after one failed: one may be blind where another sees.
func (r *reaper) kill(ctx context.Context) error {
	if !killTree {
		return killShimOnly(r)
	}
	var errs []error
	for _, g := range r.groups {
		errs = append(errs, g.Kill(ctx))
	}
	for _, p := range r.procs {
		if err := p.Signal(unix.SIGKILL); err != nil && !errors.Is(err, ErrGone) {
			errs = append(errs, fmt.Errorf("kill process %d: %w", p.PID, err))
		}
	}
	return errors.Join(errs...)
}

// left watches until all is gone or ctx ends, and names what is not. It trusts no kill: control groups must be empty, held
// processes ended (a pid namespace's first process ends last of all in it), locks free. foreign says that all there is to wait
// for is the doing of processes that are not the box's.
func (r *reaper) left(ctx context.Context) (out []string, foreign bool) {
	foreign = true
	for _, g := range r.groups {
		if err := g.WaitEmpty(ctx); err != nil {
			foreign = false
			m, _ := g.Members()
			for _, pid := range m {
				out = append(out, describe(pid))
			}
			if len(m) == 0 {
				out = append(out, "a control group that does not empty: "+err.Error())
			}
		}
	}
	for _, p := range r.procs {
		if err := p.Wait(ctx); err != nil {
			who := namespaceHolders(p.PID)
			foreign = foreign && who != ""
			out = append(out, describe(p.PID)+who)
			continue
		}
		collect(p.fd)
	}
	if len(out) > 0 {
		return out, foreign // the locks are theirs
	}
	for _, path := range r.locks() {
		if err := WaitFree(ctx, path); err != nil {
			foreign = false
			out = append(out, err.Error())
		}
	}
	return out, foreign
}

func describe(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	st, err := parseStat(string(b))
	if err != nil {
		return fmt.Sprintf("process %d", pid)
	}
	return fmt.Sprintf("process %d (%s, state %c)", pid, st.comm, st.state)
}

// namespaceHolders names outsiders that keep a pid namespace from ending: a process of ours that does not collect a child it
// put into the namespace. They are named, never killed.
func namespaceHolders(init int) string {
	ns := pidNamespace(init)
	if ns == 0 || ns == pidNamespace(os.Getpid()) {
		return ""
	}
	var who []string
	for _, pid := range pids() {
		if pidNamespace(pid) != ns {
			continue
		}
		if b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status"); err == nil {
			if t := parseStatus(string(b)).tracer; t != 0 && pidNamespace(t) != ns {
				who = append(who, fmt.Sprintf("%s, traced from outside by %s", describe(pid), describe(t)))
			}
		}
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || pid == init {
			continue
		}
		if st, err := parseStat(string(b)); err == nil && st.state == 'Z' && pidNamespace(st.ppid) != ns {
			who = append(who, fmt.Sprintf("%s, kept by its parent %s", describe(pid), describe(st.ppid)))
		}
	}
	if len(who) == 0 {
		return ""
	}
	return " waits for " + strings.Join(who, ", ")
}
