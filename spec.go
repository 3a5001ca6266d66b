package coffer

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/coffer-box/coffer/internal/cgroup"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/names"
	"github.com/coffer-box/coffer/internal/signals"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
)

// Spec describes a box to create. Only Image is needed; what is left empty comes from the image.
type Spec struct {
	Image      string
	Platform   string            // os/arch[/variant] of the image; empty: this host's, and nothing else runs
	Pull       string            // PullMissing (or empty), PullAlways, PullNever
	Name       string            // empty: one is made up
	Entrypoint []string          // nil: the image's
	Cmd        []string          // arguments after the entrypoint; nil: the image's, unless Entrypoint is given
	Env        []string          // "NAME=value", over the image's
	Dir        string            // working directory, made if missing
	User       string            // "user[:group]", names or numbers
	Hostname   string            // empty: the beginning of the id
	Labels     map[string]string // for people and filters
	TTY        bool              // the main process has a terminal
	Stdin      bool              // the main process has an input that can be attached to

	Memory int64   // bytes; 0: no limit
	CPUs   float64 // cores; 0: no limit
	PIDs   int64   // processes and threads of the box, its kernel's own included; 0: no limit
	// DiskSize is what the box may have on the host's disk, in bytes: its writable layer and its anonymous volumes together, every object with
	// 4 KiB and its size without holes; 0: no limit. When it is used up, writes in the box fail with ENOSPC, and nothing that is there is lost. Volumes
	// of the host's are not counted. It holds on every host, and costs speed.
	DiskSize int64
	// BestEffort runs the box without the limits that this host cannot enforce, instead of failing.
	BestEffort bool
	Rlimits    []Rlimit
	ReadOnly   bool // the root file system cannot be written to
	Tmpfs      []Tmpfs
	Volumes    []Volume // besides those that the image asks for

	StopSignal  string         // name or number; empty: the image's, else SIGTERM
	StopTimeout *time.Duration // nil: 10 s
	Remove      bool           // the box is removed when its main process has ended
	Restart     Restart
	Timeout     time.Duration // the main process is stopped after this time; 0: never
	Health      *HealthCheck  // nil: the image's, if it has one
	Engine      string        // empty or "auto": the best that works here

	// PullProgress is called while the image is pulled, by one goroutine at a time.
	PullProgress func(PullProgress)
}

// Rlimit is one resource limit of the main process, by its name without RLIMIT_ and in lower case.
type Rlimit = spec.Rlimit

// Tmpfs is a file system in memory.
type Tmpfs = spec.Tmpfs

// Restart is a restart policy: "no" (or empty), "on-failure", "always".
type Restart = spec.Restart

// Volume shows a file or directory of the host in the box.
type Volume struct {
	Source   string // empty: an anonymous volume, which begins with what the image has there and is removed with the box if asked for
	Target   string // absolute
	ReadOnly bool
}

// DefaultStopTimeout is how long a stop waits before it kills.
const DefaultStopTimeout = 10 * time.Second

// invalidError is an [ErrInvalid] that says only what is wrong.
type invalidError struct{ error }

func (e invalidError) Unwrap() error        { return e.error }
func (e invalidError) Is(target error) bool { return target == ErrInvalid }

func invalid(format string, args ...any) error { return invalidError{fmt.Errorf(format, args...)} }

func checkName(name string) error {
	ok := name != "" && len(name) <= 128
	for i, c := range name {
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		ok = ok && (letter || i > 0 && (c == '_' || c == '.' || c == '-'))
	}
	if !ok {
		return invalid("name %q: use letters, digits, '_', '.' and '-', beginning with a letter or digit, at most 128 of them", name)
	}
	return nil
}

// Create records a box and makes its files; nothing runs.
func (r *Runtime) Create(ctx context.Context, s Spec) (*Box, error) {
	engine, err := chooseEngine(ctx, s.Engine)
	if err != nil {
		return nil, err
	}
	img, err := r.resolveImage(ctx, s)
	if err != nil {
		return nil, err
	}
	id := newID()
	b, err := r.resolve(ctx, s, img, id)
	if err != nil {
		return nil, err
	}
	b.Engine = engine
	name := s.Name
	if name == "" {
		name = names.Random()
	} else if err := checkName(name); err != nil {
		return nil, err
	}
	files := r.home.Box(id)
	if err := os.MkdirAll(files.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("create box: %w", r.unwritable(err))
	}
	op, err := r.lockOp(ctx, id)
	if err != nil {
		return nil, err
	}
	defer op.Unlock()
	rec := &state.Box{ID: id, Name: name, Spec: *b}
	if err := r.db.Create(ctx, rec); err != nil {
		_ = os.RemoveAll(files.Dir)
		return nil, err
	}
	// The image may have been removed since it was looked up. From here on, a removal sees the box.
	if err := r.images.Confirm(ctx, img); err != nil {
		return nil, errors.Join(fmt.Errorf("create box: %w", err), r.keeper.Discard(context.WithoutCancel(ctx), rec, true))
	}
	if err := r.makeFiles(rec); err != nil {
		return nil, errors.Join(fmt.Errorf("create box: %w", err), r.keeper.Discard(context.WithoutCancel(ctx), rec, true))
	}
	rec, err = r.db.Update(ctx, id, state.Change{}, func(b *state.Box) error { b.Phase, b.Spec = state.Created, rec.Spec; return nil })
	if err != nil {
		return nil, err
	}
	return &Box{rt: r, id: rec.ID, name: rec.Name}, nil
}

func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// resolve works out every default and checks every value.
func (r *Runtime) resolve(ctx context.Context, s Spec, img image.Image, id string) (*spec.Box, error) {
	conf := img.Config.Config
	b := &spec.Box{
		Image: s.Image, ImageID: img.ID, RootfsID: img.RootfsID, Hostname: s.Hostname, Labels: map[string]string{},
		Ports:     slices.Sorted(maps.Keys(conf.ExposedPorts)),
		Resources: spec.Resources{Memory: s.Memory, CPUs: s.CPUs, PIDs: s.PIDs, DiskSize: s.DiskSize, BestEffort: s.BestEffort},
		ReadOnly:  s.ReadOnly, Tmpfs: s.Tmpfs, Remove: s.Remove, Restart: s.Restart, Timeout: s.Timeout, OpenStdin: s.Stdin,
	}
	for k, v := range conf.Labels {
		b.Labels[k] = v
	}
	for k, v := range s.Labels {
		b.Labels[k] = v
	}
	entry, cmd := conf.Entrypoint, conf.Cmd
	if s.Entrypoint != nil {
		entry, cmd = s.Entrypoint, nil
	}
	if s.Cmd != nil {
		cmd = s.Cmd
	}
	b.Main = spec.Process{
		Args: slices.Concat(entry, cmd), Env: mergeEnv(conf.Env, s.Env), Dir: first(s.Dir, conf.WorkingDir, "/"),
		User: first(s.User, conf.User), TTY: s.TTY, Rlimits: s.Rlimits,
	}
	if len(b.Main.Args) == 0 || b.Main.Args[0] == "" {
		return nil, invalid("image %s names no command: give one", s.Image)
	}
	if !path.IsAbs(b.Main.Dir) {
		return nil, invalid("working directory %q is not absolute", b.Main.Dir)
	}
	if b.Hostname == "" {
		b.Hostname = id[:12]
	}
	if len(b.Hostname) > 64 || strings.ContainsAny(b.Hostname, "/ \n\x00") {
		return nil, invalid("host name %q: at most 64 letters, digits, '.' and '-'", b.Hostname)
	}
	sig, err := signals.Parse(first(s.StopSignal, conf.StopSignal, "SIGTERM"))
	if err != nil {
		return nil, invalid("stop signal: %w", err)
	}
	b.StopSignal, b.StopTimeout = sig, DefaultStopTimeout
	if s.StopTimeout != nil {
		b.StopTimeout = *s.StopTimeout
	}
	if b.Health, err = r.health(ctx, s, conf); err != nil {
		return nil, err
	}
	for _, check := range []func(*spec.Box) error{checkLimits, checkPolicy, checkMounts} {
		if err := check(b); err != nil {
			return nil, err
		}
	}
	if b.Volumes, err = volumes(s.Volumes); err != nil {
		return nil, err
	}
	if b.Volumes, err = imageVolumes(b, conf.Volumes); err != nil {
		return nil, err
	}
	if !s.BestEffort {
		host, err := cgroup.Detect(ctx)
		if err != nil {
			return nil, err
		}
		if err := host.Supports(cgroup.Limits{Memory: s.Memory, CPUs: s.CPUs, PIDs: s.PIDs}); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func first(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

const (
	minMemory   = 32 << 20 // less than this the box's kernel itself does not start in
	minPIDs     = 32       // the kernel's own threads count
	minDiskSize = 1 << 20  // a box of the smallest image begins with 100 KiB
)

func checkLimits(b *spec.Box) error {
	r := b.Resources
	switch {
	case r.Memory < 0:
		return invalid("memory limit %d is negative", r.Memory)
	case r.Memory > 0 && r.Memory < minMemory:
		return invalid("memory limit %d bytes is too small for the box's kernel: at least 32m", r.Memory)
	case r.CPUs < 0 || math.IsNaN(r.CPUs) || math.IsInf(r.CPUs, 0):
		return invalid("cpus %v: use a positive number of cores", r.CPUs)
	case r.CPUs > 0 && r.CPUs < 0.01:
		return invalid("cpus %v is too small: at least 0.01", r.CPUs)
	case r.CPUs > float64(runtime.NumCPU()):
		return invalid("cpus %v: this host has %d", r.CPUs, runtime.NumCPU())
	case r.PIDs < 0:
		return invalid("pids limit %d is negative", r.PIDs)
	case r.PIDs > 0 && r.PIDs < minPIDs:
		return invalid("pids limit %d is too small for the box's kernel: at least %d", r.PIDs, minPIDs)
	case r.DiskSize < 0:
		return invalid("disk size %d is negative", r.DiskSize)
	case r.DiskSize > 0 && r.DiskSize < minDiskSize:
		return invalid("disk size %d bytes is too small for the box's own files: at least 1m", r.DiskSize)
	}
	return nil
}

func checkPolicy(b *spec.Box) error {
	switch b.Restart.Policy {
	case "":
		b.Restart.Policy = "no"
	case "no", "on-failure", "always":
	default:
		return invalid("restart policy %q: use no, on-failure[:n] or always", b.Restart.Policy)
	}
	switch {
	case b.Restart.Max < 0:
		return invalid("restart count %d is negative", b.Restart.Max)
	case b.Remove && b.Restart.Policy != "no":
		return invalid("a box that is removed at its end cannot be restarted: use --rm or --restart")
	case b.Timeout < 0:
		return invalid("timeout %v is negative", b.Timeout)
	case b.StopTimeout < 0:
		return invalid("stop timeout %v is negative", b.StopTimeout)
	}
	return nil
}

func checkMounts(b *spec.Box) error {
	for _, t := range b.Tmpfs {
		if err := checkTarget(t.Target); err != nil {
			return err
		}
		if t.Size < 0 {
			return invalid("size of tmpfs %s is negative", t.Target)
		}
	}
	return nil
}

func checkTarget(t string) error {
	if !path.IsAbs(t) || path.Clean(t) == "/" || strings.ContainsRune(t, 0) {
		return invalid("mount target %q: use an absolute path below /", t)
	}
	return nil
}

func volumes(in []Volume) ([]spec.Volume, error) {
	var out []spec.Volume
	seen := map[string]bool{}
	for _, v := range in {
		if err := checkTarget(v.Target); err != nil {
			return nil, err
		}
		o := spec.Volume{Target: path.Clean(v.Target), ReadOnly: v.ReadOnly, Anonymous: v.Source == ""}
		if seen[o.Target] {
			return nil, invalid("two volumes at %s", o.Target)
		}
		seen[o.Target] = true
		if v.Source != "" {
			abs, err := filepath.Abs(v.Source)
			if err != nil {
				return nil, err
			}
			// Where a symbolic link leads is decided now, by its owner, and not at each start by whoever can write there.
			if o.Source, err = filepath.EvalSymlinks(abs); errors.Is(err, fs.ErrNotExist) {
				return nil, invalid("volume source %s does not exist: create it first", v.Source)
			} else if err != nil {
				return nil, invalid("volume source %s: %w", v.Source, err)
			}
			st, err := os.Stat(o.Source)
			if err != nil {
				return nil, invalid("volume source %s: %w", v.Source, err)
			}
			if !st.IsDir() && !st.Mode().IsRegular() {
				return nil, invalid("volume source %s is neither a directory nor a plain file", v.Source)
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// maxImageVolumes bounds what an image may ask for: each volume is a mount of its own.
const maxImageVolumes = 64

// imageVolumes adds an anonymous volume at each place where the image wants one and the user wants nothing else.
func imageVolumes(b *spec.Box, wanted map[string]struct{}) ([]spec.Volume, error) {
	out := b.Volumes
	covered := map[string]bool{}
	for _, v := range b.Volumes {
		covered[v.Target] = true
	}
	for _, t := range b.Tmpfs {
		covered[path.Clean(t.Target)] = true
	}
	if len(wanted) > maxImageVolumes {
		return nil, invalid("image %s wants %d volumes, at most %d can be had", b.Image, len(wanted), maxImageVolumes)
	}
	for _, p := range slices.Sorted(maps.Keys(wanted)) {
		target := path.Clean("/" + p)
		if err := checkTarget(target); err != nil {
			return nil, fmt.Errorf("image %s: %w", b.Image, err)
		}
		if !covered[target] {
			covered[target] = true
			out = append(out, spec.Volume{Target: target, Anonymous: true})
		}
	}
	return out, nil
}

func noEngine() error {
	return fmt.Errorf("boxes need Linux: no engine is available on %s/%s; run coffer on a Linux host or in a Linux VM",
		runtime.GOOS, runtime.GOARCH)
}

func chooseEngine(ctx context.Context, name string) (string, error) {
	if len(engines()) == 0 {
		return "", noEngine()
	}
	var known []string
	for _, e := range engines() {
		known = append(known, e.Name())
		if name != "" && name != "auto" && name != e.Name() {
			continue
		}
		c := e.Probe(ctx)
		if c.Usable {
			return e.Name(), nil
		}
		if name == e.Name() || len(engines()) == 1 {
			return "", fmt.Errorf("engine %s cannot run here: %s; %s", e.Name(), c.Reason, c.Install)
		}
	}
	return "", invalid("unknown engine %q: this build has %s", name, strings.Join(known, ", "))
}

// mergeEnv is base with over's variables in the place of those of the same name; of several, the last counts.
func mergeEnv(base, over []string) []string {
	var out []string
	at := map[string]int{}
	for _, kv := range slices.Concat(base, over) {
		k, _, _ := strings.Cut(kv, "=")
		if i, have := at[k]; have {
			out[i] = kv
			continue
		}
		at[k] = len(out)
		out = append(out, kv)
	}
	return out
}
