package coffer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/assets"
	"github.com/coffer-box/coffer/internal/cgroup"
	"github.com/coffer-box/coffer/internal/engine"
	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
)

// version is set by the linker for releases.
var version string

// Version is this build's version.
func Version() string {
	if version != "" {
		return version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// Stats is what a running box uses of the host: the whole of its jail, its kernel included.
type Stats struct {
	ID          string        `json:"id"`
	Name        string        `json:"name"`
	CPU         time.Duration `json:"cpu"`
	Memory      int64         `json:"memory"`       // bytes; proportional share where no control group counts it; -1: not known
	MemoryLimit int64         `json:"memory_limit"` // bytes; 0: none is enforced
	PIDs        int           `json:"pids"`
}

// Stats measures the given boxes, or all that run. What it could measure comes with the error about what it could not.
func (r *Runtime) Stats(ctx context.Context, refs ...string) ([]Stats, error) {
	var boxes []*state.Box
	var errs []error
	for _, ref := range refs {
		b, err := r.db.Get(ctx, ref)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		boxes = append(boxes, b)
	}
	if len(refs) == 0 {
		all, err := r.db.List(ctx)
		if err != nil {
			return nil, err
		}
		boxes = slices.DeleteFunc(all, func(b *state.Box) bool { return b.Phase != state.Running })
	}
	out := []Stats{}
	for _, b := range boxes {
		// The record may say that a box runs whose supervisor was killed.
		now, err := r.refresh(ctx, b)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if now != nil && (len(refs) > 0 || now.Phase == state.Running) {
			out = append(out, r.stats(now))
		}
	}
	return out, errors.Join(errs...)
}

func (r *Runtime) stats(b *state.Box) Stats {
	s := Stats{ID: b.ID, Name: b.Name, Memory: -1}
	t := r.keeper.Target(b)
	if t.Cgroup != nil {
		if g, err := cgroup.Open(*t.Cgroup); err == nil {
			use := g.Stats()
			s.Memory, s.MemoryLimit = use.Memory, max(0, use.MemoryLimit)
		}
	}
	if t.Init == nil {
		return s
	}
	p, err := t.Init.Open()
	if err != nil {
		return s
	}
	p.Close()
	pss := int64(0)
	for _, pid := range supervise.NamespaceMembers(t.Init.PID) {
		s.PIDs++
		s.CPU += supervise.CPUTime(pid)
		pss += supervise.ProportionalMemory(pid)
	}
	if s.Memory < 0 && pss > 0 {
		s.Memory = pss
	}
	return s
}

// EngineInfo says what an engine can do here.
type EngineInfo = engine.Capabilities

// HostInfo describes the host and the home.
type HostInfo struct {
	Home     string       `json:"home"`
	Instance string       `json:"instance"`
	Version  string       `json:"version"`
	Kernel   string       `json:"kernel"`
	Cgroups  string       `json:"cgroups"`
	Engine   string       `json:"engine"` // what auto means here, and why
	Engines  []EngineInfo `json:"engines"`
	Boxes    int          `json:"boxes"`
	Running  int          `json:"running"`
	Images   int          `json:"images"`
}

// HostInfo looks at the host.
func (r *Runtime) HostInfo(ctx context.Context) (HostInfo, error) {
	i := HostInfo{Home: r.home.Root, Instance: r.home.Instance, Version: Version()}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		i.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	host, err := cgroup.Detect(ctx)
	if err != nil {
		return i, err
	}
	i.Cgroups = host.Describe()
	for _, e := range engines() {
		i.Engines = append(i.Engines, e.Probe(ctx))
	}
	if name, err := chooseEngine(ctx, "auto"); err == nil {
		i.Engine = name + ", the only engine of this build"
	} else {
		i.Engine = "none: " + err.Error()
	}
	// Boxes that cannot be looked at are what List and Doctor tell of; here they count as they are on record.
	boxes, err := r.List(ctx)
	if err != nil && boxes == nil {
		return i, err
	}
	for _, b := range boxes {
		i.Boxes++
		if b.Status == string(state.Running) {
			i.Running++
		}
	}
	imgs, err := r.Images(ctx)
	i.Images = len(imgs)
	return i, err
}

// Pruned is what a [Runtime.Prune] removed.
type Pruned struct {
	Boxes   []string
	Orphans []string // left over from boxes without a record, and from other versions of coffer
	Images  RemovedImages
	Freed   int64 // bytes
}

// PruneOptions are the choices of a prune. The zero value is right for most.
type PruneOptions struct {
	// AllImages removes images that no box was made from, too, and not only those without a name.
	AllImages bool
	// Only chooses among boxes and images by their labels and when they were made; nil: any. The base image is from 1970.
	Only func(labels map[string]string, created time.Time) bool
}

// Prune removes boxes that do not run, what is left of boxes without a record, images without a name, parts of pulls that were cut off,
// and the programs that other versions of coffer have unpacked here and nothing runs from. Only what bears this home's names is touched.
func (r *Runtime) Prune(ctx context.Context, o PruneOptions) (Pruned, error) {
	var out Pruned
	infos, err := r.List(ctx)
	if err != nil && infos == nil {
		return out, err
	}
	errs := []error{err}
	for _, i := range infos {
		if state.Phase(i.Status).Live() || i.Status == restarting || o.Only != nil && !o.Only(i.Labels, i.Created) {
			continue
		}
		b := &Box{rt: r, id: i.ID, name: i.Name}
		size := b.DiskUse()
		if err := b.Remove(ctx, WithVolumes()); err != nil {
			// One that was started meanwhile is none of ours.
			if !errors.Is(err, ErrRunning) && !errors.Is(err, ErrNotFound) {
				errs = append(errs, err)
			}
			continue
		}
		out.Boxes = append(out.Boxes, i.Name)
		out.Freed += size
	}
	orphans, err := findOrphans(ctx, r.home, r.db)
	errs = append(errs, err)
	for _, o := range orphans {
		if gone, err := o.remove(ctx, r.keeper); err != nil || !gone {
			errs = append(errs, err)
			continue
		}
		out.Orphans = append(out.Orphans, o.what)
		out.Freed += o.size
	}
	versions, size, err := assets.Prune(ctx, r.home.Root)
	errs = append(errs, err)
	for _, v := range versions {
		out.Orphans = append(out.Orphans, "programs of another coffer "+v)
	}
	out.Freed += size
	out.Images, err = r.PruneImages(ctx, o)
	out.Freed += out.Images.Freed
	return out, errors.Join(append(errs, err)...)
}

// DiskUse is what the box's own files take on disk, in bytes: what it has written, its anonymous volumes and its log. Its image is shared
// and not counted.
func (b *Box) DiskUse() int64 {
	return diskUse(b.rt.home.Box(b.id).Dir) + diskUse(b.rt.home.Volumes(b.id))
}

func diskUse(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(p, &st) == nil {
			n += st.Blocks * 512
		}
		return nil
	})
	return n
}

// orphan is something that bears this home's names and belongs to no record.
type orphan struct {
	what string
	size int64
	id   string
	gen  uint64
	dirs []string
}

// findOrphans looks for directories, control groups and live generations without a record. What it finds may be somebody's new box by the
// time that it is to be removed.
func findOrphans(ctx context.Context, l home.Layout, db *state.DB) ([]orphan, error) {
	known := map[string]uint64{}
	boxes, err := db.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range boxes {
		known[b.ID] = b.Generation
	}
	var out []orphan
	for _, top := range []string{l.Boxes(), filepath.Dir(l.Volumes("x"))} {
		entries, _ := os.ReadDir(top)
		for _, e := range entries {
			if _, ok := known[e.Name()]; ok || len(e.Name()) != 32 {
				continue
			}
			// A box is being created as long as its operation lock is held.
			if held, err := supervise.Held(l.Box(e.Name()).OpLock()); err != nil || held {
				continue
			}
			dir := filepath.Join(top, e.Name())
			out = append(out, orphan{what: "files of box " + e.Name()[:12], size: diskUse(dir), id: e.Name(), dirs: []string{dir}})
		}
	}
	if entries, _ := os.ReadDir(l.Trash()); len(entries) > 0 {
		for _, e := range entries {
			dir := filepath.Join(l.Trash(), e.Name())
			out = append(out, orphan{what: "half-removed " + e.Name(), size: diskUse(dir), dirs: []string{dir}})
		}
	}
	host, err := cgroup.Detect(ctx)
	if err != nil {
		return out, err
	}
	for _, rec := range host.Find(ctx, l.GenerationPrefix()) {
		rest := strings.TrimPrefix(rec.Name(), l.GenerationPrefix())
		id, g, ok := strings.Cut(rest, "-")
		gen, err := strconv.ParseUint(g, 10, 64)
		if have, is := known[id]; !ok || err != nil || is && have >= gen {
			continue
		}
		out = append(out, orphan{what: "processes or control groups " + rec.Name(), id: id, gen: gen})
	}
	return out, nil
}

// remove ends and deletes an orphan, if it still is one: a box may have been created or started since it was found.
func (o orphan) remove(ctx context.Context, k *lifecycle.Keeper) (gone bool, err error) {
	if o.id != "" {
		if _, err := os.Stat(k.Home.Box(o.id).Dir); err == nil {
			op, err := supervise.TryLock(k.Home.Box(o.id).OpLock(), self())
			if errors.Is(err, supervise.ErrLocked) || errors.Is(err, fs.ErrNotExist) {
				return false, nil
			}
			if err != nil {
				return false, fmt.Errorf("%s: %w", o.what, err)
			}
			defer op.Unlock()
		}
		rec, err := k.DB.Get(ctx, o.id)
		if err == nil && (len(o.dirs) > 0 || rec.Generation >= o.gen) {
			return false, nil
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			return false, fmt.Errorf("%s: %w", o.what, err)
		}
		if _, err := k.Reap(ctx, &state.Box{ID: o.id, Generation: o.gen}); err != nil {
			return false, fmt.Errorf("%s: %w", o.what, err)
		}
	}
	for _, d := range o.dirs {
		if err := lifecycle.RemoveTree(d); err != nil {
			return false, fmt.Errorf("%s: %w", o.what, err)
		}
	}
	return true, nil
}

// Finding is one thing that the doctor looked at.
type Finding struct {
	Topic   string `json:"topic"`
	Detail  string `json:"detail"`
	Problem bool   `json:"problem"`
	Fix     string `json:"fix,omitempty"` // what to do
}

// Doctor checks the host and a home, without needing either to be in order. With fix it moves a damaged database aside and ends
// what is left over.
func Doctor(ctx context.Context, c Config, fix bool) ([]Finding, error) {
	var out []Finding
	add := func(topic, detail string, problem bool, fix string) {
		out = append(out, Finding{Topic: topic, Detail: detail, Problem: problem, Fix: fix})
	}
	for _, e := range engines() {
		p := e.Probe(ctx)
		if p.Usable {
			add("engine "+p.Name, "usable: "+p.Kernel, false, "")
		} else {
			add("engine "+p.Name, p.Reason, true, p.Install)
		}
	}
	if len(engines()) == 0 {
		add("engine", noEngine().Error(), true, "")
	}
	for _, s := range jail.Switches() {
		detail := s.Path + "=" + s.Value
		if s.Blocking {
			detail = s.Reason
		}
		add("user namespaces", detail, s.Blocking, s.Fix)
	}
	host, err := cgroup.Detect(ctx)
	if err != nil {
		return out, err
	}
	add("cgroups", host.Describe(), false, "")
	if host.Kind() == cgroup.KindNone {
		out[len(out)-1].Fix = "boxes run and are ended through their pid namespaces; limits need root, or delegated cgroups"
	}
	rt, err := Open(ctx, c)
	if errors.Is(err, ErrCorrupt) || err == nil && errors.Is(rt.check(ctx), ErrCorrupt) {
		return doctorDamaged(ctx, c, fix, out)
	}
	if err != nil {
		add("home", err.Error(), true, "")
		return out, nil
	}
	defer rt.Close()
	add("home", rt.home.Root+", instance "+rt.home.Instance, false, "")
	if _, err := rt.helperPath(); err != nil {
		add("helper", err.Error(), true, "")
	}
	boxes, err := rt.List(ctx)
	if err != nil && boxes == nil {
		return out, err
	}
	if err == nil {
		add("boxes", fmt.Sprintf("%d recorded", len(boxes)), false, "")
	} else {
		add("boxes", err.Error(), true, "end what is named, if it is yours; then coffer rm -f the box")
	}
	orphans, err := findOrphans(ctx, rt.home, rt.db)
	if err != nil {
		return out, err
	}
	return append(out, doctorOrphans(ctx, rt.keeper, orphans, fix)...), nil
}

// check reads everything once.
func (r *Runtime) check(ctx context.Context) error {
	_, err := r.db.List(ctx)
	return err
}

func doctorOrphans(ctx context.Context, k *lifecycle.Keeper, orphans []orphan, fix bool) []Finding {
	var out []Finding
	for _, o := range orphans {
		f := Finding{Topic: "leftover", Detail: o.what, Problem: true, Fix: "coffer doctor --fix, or coffer prune"}
		if fix {
			switch gone, err := o.remove(ctx, k); {
			case err != nil:
				f.Fix = err.Error()
			case gone:
				f.Problem, f.Fix = false, "removed"
			default:
				continue // it has become somebody's
			}
		}
		out = append(out, f)
	}
	return out
}

func doctorDamaged(ctx context.Context, c Config, fix bool, out []Finding) ([]Finding, error) {
	dir, err := home.Dir(c.Home, os.Getenv)
	if err != nil {
		return out, err
	}
	f := Finding{Topic: "home", Detail: filepath.Join(dir, state.File) + " is damaged", Problem: true, Fix: "coffer doctor --fix"}
	if !fix {
		return append(out, f), nil
	}
	to, err := state.Recover(dir)
	if err != nil {
		return out, err
	}
	f.Problem, f.Fix = false, "moved to "+to
	out = append(out, f)
	db, err := state.OpenFresh(ctx, dir)
	if err != nil {
		return out, err
	}
	defer db.Close()
	l := home.Layout{Root: dir, Instance: db.Instance()}
	k := &lifecycle.Keeper{DB: db, Home: l}
	boxes, _ := os.ReadDir(l.Boxes())
	for _, e := range boxes {
		// What still runs is ended; files of boxes are named and kept, for they may hold work.
		if len(e.Name()) != 32 {
			continue
		}
		f := Finding{Topic: "leftover", Detail: "box " + e.Name()[:12] + " has lost its record; its files are in " + l.Box(e.Name()).Dir,
			Fix: "copy what you need, then coffer prune"}
		if _, err := k.Reap(ctx, &state.Box{ID: e.Name()}); err != nil {
			f.Problem, f.Fix = true, err.Error()
		}
		out = append(out, f)
	}
	// Their generations were on record alone; the control groups tell them.
	orphans, err := findOrphans(ctx, l, db)
	orphans = slices.DeleteFunc(orphans, func(o orphan) bool { return o.gen == 0 })
	return append(out, doctorOrphans(ctx, k, orphans, true)...), err
}
