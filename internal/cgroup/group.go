package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Leaf is one of a group's two halves: limits bound only the tree, and the shim can leave before the rest is removed.
type Leaf string

// The leaves of a group.
const (
	Shim Leaf = "shim"
	Tree Leaf = "tree"
)

// Record is everything needed to find a group again. It is written before the group is used and never computed anew: another
// login session or user would compute other paths.
type Record struct {
	Kind    string            `json:"kind"`
	Unified string            `json:"unified,omitempty"`
	V1      map[string]string `json:"v1,omitempty"`
}

// Group is one generation's control groups. A directory is never used again after a kill: some kernels kill every process that
// is later cloned into it.
type Group struct{ rec Record }

// Create makes the directories of a group and sets its limits. On a host of [KindNone] it returns a group of no directories.
// Limits that cannot be enforced fail, wrapping [ErrUnsupported], and leave nothing.
func (h *Host) Create(_ context.Context, name string, lim Limits) (g *Group, err error) {
	if !validName(name) {
		return nil, fmt.Errorf("create cgroup %q: a name is lower-case letters, digits and dashes", name)
	}
	if err := h.Supports(lim); err != nil {
		return nil, err
	}
	made := &Group{rec: Record{Kind: h.kind}}
	g = made
	defer func() {
		if err != nil { // the results are set by then, and g with them
			_ = made.Remove(context.Background())
		}
	}()
	if h.unified != "" {
		dir := filepath.Join(h.unified, name)
		for _, d := range []string{dir, filepath.Join(dir, string(Shim)), filepath.Join(dir, string(Tree))} {
			if err := os.Mkdir(d, 0o755); err != nil {
				return nil, fmt.Errorf("create cgroup: %w", err)
			}
			// Recorded only once made: what was there before is somebody else's, and must survive the undoing.
			g.rec.Unified = dir
			if d == g.rec.Unified {
				for _, c := range lim.controllers() {
					if slices.Contains(h.ctrls, c) {
						if err := writeFile(d, "cgroup.subtree_control", "+"+c); err != nil {
							return nil, fmt.Errorf("enable cgroup controller %s: %w", c, err)
						}
					}
				}
			}
		}
	}
	v1 := slices.DeleteFunc(lim.controllers(), func(c string) bool { return slices.Contains(h.ctrls, c) })
	if h.unified == "" && h.v1["freezer"] != "" {
		v1 = append(v1, "freezer")
	}
	for _, c := range v1 {
		dir := filepath.Join(h.v1[c], name)
		// memory and cpu may be the same mount as another controller.
		if err := os.Mkdir(dir, 0o755); err != nil && !(errors.Is(err, fs.ErrExist) && slices.Contains(slices.Collect(maps.Values(g.rec.V1)), dir)) {
			return nil, fmt.Errorf("create cgroup: %w", err)
		}
		if g.rec.V1 == nil {
			g.rec.V1 = map[string]string{}
		}
		g.rec.V1[c] = dir
		if c == "freezer" && h.unified == "" {
			for _, l := range []Leaf{Shim, Tree} {
				if err := os.Mkdir(filepath.Join(dir, string(l)), 0o755); err != nil {
					return nil, fmt.Errorf("create cgroup: %w", err)
				}
			}
		}
	}
	if err := g.limit(h, lim); err != nil {
		return nil, err
	}
	return g, nil
}

func (g *Group) leaf(l Leaf) string { return filepath.Join(g.rec.Unified, string(l)) }

func (g *Group) limit(h *Host, lim Limits) error {
	set := func(c, v2name, v2value string, v1 [][2]string) error {
		if slices.Contains(h.ctrls, c) {
			if err := writeFile(g.leaf(Tree), v2name, v2value); err != nil {
				return fmt.Errorf("set %s: %w", v2name, err)
			}
			return nil
		}
		for _, kv := range v1 {
			if err := writeFile(g.rec.V1[c], kv[0], kv[1]); err != nil {
				return fmt.Errorf("set %s: %w", kv[0], err)
			}
		}
		return nil
	}
	if lim.Memory > 0 {
		n := strconv.FormatInt(lim.Memory, 10)
		if err := set("memory", "memory.max", n, [][2]string{{"memory.limit_in_bytes", n}}); err != nil {
			return err
		}
		// Swap would make the limit a suggestion; hosts without swap accounting have no such file.
		if slices.Contains(h.ctrls, "memory") {
			_ = writeFile(g.leaf(Tree), "memory.swap.max", "0")
			// One process of the tree killed alone would leave a box that half works.
			_ = writeFile(g.leaf(Tree), "memory.oom.group", "1")
		} else {
			_ = writeFile(g.rec.V1["memory"], "memory.memsw.limit_in_bytes", n)
		}
	}
	if lim.CPUs > 0 {
		const period = 100000
		quota := strconv.FormatInt(max(1000, int64(lim.CPUs*period)), 10)
		if err := set("cpu", "cpu.max", quota+" "+strconv.Itoa(period),
			[][2]string{{"cpu.cfs_period_us", strconv.Itoa(period)}, {"cpu.cfs_quota_us", quota}}); err != nil {
			return err
		}
	}
	if lim.PIDs > 0 {
		n := strconv.FormatInt(lim.PIDs, 10)
		if err := set("pids", "pids.max", n, [][2]string{{"pids.max", n}}); err != nil {
			return err
		}
	}
	return nil
}

// Open returns the group of a record; [ErrGone] when none of its directories exists any more, [ErrRecord] when one of them cannot
// be a group's. A damaged record that led to a system directory would have somebody else's processes killed.
func Open(r Record) (*Group, error) {
	g := &Group{rec: r}
	if err := r.check(); err != nil {
		return nil, err
	}
	for _, d := range g.dirs() {
		if _, err := os.Stat(d); err == nil {
			return g, nil
		}
	}
	return nil, ErrGone
}

// check refuses every path that is not <hierarchy>/coffer/<name>, with one name for all.
func (r Record) check() error {
	name := r.Name()
	paths := slices.Collect(maps.Values(r.V1))
	if r.Unified != "" {
		paths = append(paths, r.Unified)
	}
	for _, p := range paths {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || filepath.Base(filepath.Dir(p)) != parent || filepath.Base(p) != name ||
			!validName(name) {
			return fmt.Errorf("open cgroup %q: %w", p, ErrRecord)
		}
		if exists(p) && !onCgroupFS(p) {
			return fmt.Errorf("open cgroup %q: on no cgroup file system: %w", p, ErrRecord)
		}
	}
	return nil
}

// validName keeps a name from leading out of its directory.
func validName(name string) bool {
	return name != "" && len(name) <= 200 && name != leaving && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// Record describes the group for [Open].
func (g *Group) Record() Record { return g.rec }

// Empty is true for a group without directories, on a host where none can be made.
func (g *Group) Empty() bool { return len(g.dirs()) == 0 }

// dirs lists every directory, children before parents.
func (g *Group) dirs() []string {
	var out []string
	if g.rec.Unified != "" {
		out = append(append(out, subdirs(g.rec.Unified)...), g.rec.Unified)
	}
	for _, c := range []string{"freezer", "memory", "cpu", "pids"} {
		d := g.rec.V1[c]
		if d == "" {
			continue
		}
		out = append(append(out, subdirs(d)...), d)
	}
	return out
}

// Birthplace opens the leaf's version 2 directory, for a process to be born into: to move one there later has the kernel wait
// for all processors, some ten milliseconds. It is nil where there is no such directory.
func (g *Group) Birthplace(l Leaf) (*os.File, error) {
	if g.rec.Unified == "" {
		return nil, nil
	}
	f, err := os.Open(g.leaf(l))
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return f, nil
}

// Add moves a process into a leaf, where it is not in it already. The process must not run code that could fork yet: it is the
// caller's gated child.
func (g *Group) Add(_ context.Context, l Leaf, pid int) error {
	p := strconv.Itoa(pid)
	if g.rec.Unified != "" {
		in, err := members(g.leaf(l))
		if err != nil {
			return err
		}
		if slices.Contains(in, pid) {
			// born there
		} else if err := writeFile(g.leaf(l), "cgroup.procs", p); err != nil {
			return fmt.Errorf("place process %s into %s: %w", p, g.leaf(l), err)
		}
	}
	for c, d := range g.rec.V1 {
		if c == "freezer" {
			d = filepath.Join(d, string(l))
		} else if l == Shim {
			continue
		}
		if err := writeFile(d, "cgroup.procs", p); err != nil {
			return fmt.Errorf("place process %s into %s: %w", p, d, err)
		}
	}
	return nil
}

// Leave moves the calling process out of the group, to the top of what it may use, so that the group can be removed.
func (g *Group) Leave() error {
	move := func(dir string) error {
		for d := filepath.Dir(dir); strings.Count(d, "/") > 2; d = filepath.Dir(d) {
			if err := writeFile(d, "cgroup.procs", strconv.Itoa(os.Getpid())); err == nil {
				return nil
			}
		}
		// In a delegated subtree no directory above takes processes: those with controllers must not, the rest is not ours.
		// A leaf beside the groups does. It is removed with the next group, when whoever left through it has ended.
		d := filepath.Join(dir, leaving)
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("leave cgroup: %w", err)
		}
		if err := writeFile(d, "cgroup.procs", strconv.Itoa(os.Getpid())); err != nil {
			return fmt.Errorf("leave cgroup: %w", err)
		}
		return nil
	}
	if g.rec.Unified != "" {
		// A group with controllers enabled holds no processes of its own, so go up beyond the shared parent.
		if err := move(filepath.Dir(g.rec.Unified)); err != nil {
			return err
		}
	}
	if d := g.rec.V1["freezer"]; d != "" {
		return move(filepath.Dir(d))
	}
	return nil
}

// Members lists the processes of the group.
func (g *Group) Members() ([]int, error) {
	var out []int
	for _, d := range g.dirs() {
		p, err := members(d)
		if err != nil {
			return nil, err
		}
		out = append(out, p...)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func members(dir string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list cgroup members: %w", err)
	}
	var out []int
	for f := range strings.FieldsSeq(string(b)) {
		if n, err := strconv.Atoi(f); err == nil && n > 0 {
			out = append(out, n)
		}
	}
	return out, nil
}

// Remove removes the group's directories, which must be empty of processes. It is idempotent.
func (g *Group) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for _, d := range g.dirs() {
		var err error
		ok := poll(ctx, 0, func() bool {
			err = unix.Rmdir(d)
			if errors.Is(err, unix.ENOENT) {
				err = nil
			}
			return !errors.Is(err, unix.EBUSY)
		})
		if err != nil || !ok {
			m, _ := members(d)
			return fmt.Errorf("remove cgroup %s: %w; members: %v", d, err, m)
		}
	}
	for _, d := range []string{g.rec.Unified, g.rec.V1["freezer"]} {
		if d != "" {
			_ = unix.Rmdir(filepath.Join(filepath.Dir(d), leaving)) // busy while somebody who left has not ended
		}
	}
	return nil
}

// Freeze stops every process of the tree; Thaw lets it go on.
func (g *Group) Freeze(ctx context.Context) error { return g.freezer(ctx, "1", "FROZEN") }

// Thaw undoes [Group.Freeze].
func (g *Group) Thaw(ctx context.Context) error { return g.freezer(ctx, "0", "THAWED") }

func (g *Group) freezer(_ context.Context, v2, v1 string) error {
	if g.rec.Unified != "" {
		return writeFile(g.leaf(Tree), "cgroup.freeze", v2)
	}
	if d := g.rec.V1["freezer"]; d != "" {
		return writeFile(filepath.Join(d, string(Tree)), "freezer.state", v1)
	}
	return fmt.Errorf("freeze: %w", ErrUnsupported)
}

// Stats is what the tree uses. A field is -1 where the host does not count it.
type Stats struct {
	Memory, MemoryPeak int64 // bytes
	MemoryLimit        int64 // bytes; -1 too where there is no limit
	CPUMicros          int64
	PIDs               int64
}

// Stats reads the tree's use.
func (g *Group) Stats() Stats {
	s := Stats{-1, -1, -1, -1, -1}
	read := func(dst *int64, dir, name string) {
		if dir == "" {
			return
		}
		if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil {
				*dst = n
			}
		}
	}
	if g.rec.Unified != "" {
		t := g.leaf(Tree)
		read(&s.Memory, t, "memory.current")
		read(&s.MemoryPeak, t, "memory.peak")
		read(&s.MemoryLimit, t, "memory.max") // "max" is no number
		read(&s.PIDs, t, "pids.current")
		if b, err := os.ReadFile(filepath.Join(t, "cpu.stat")); err == nil {
			s.CPUMicros = field(string(b), "usage_usec")
		}
	}
	read(&s.Memory, g.rec.V1["memory"], "memory.usage_in_bytes")
	read(&s.MemoryPeak, g.rec.V1["memory"], "memory.max_usage_in_bytes")
	read(&s.MemoryLimit, g.rec.V1["memory"], "memory.limit_in_bytes") // there is such a directory only for a limit
	read(&s.PIDs, g.rec.V1["pids"], "pids.current")
	return s
}

// OOMKilled tells whether the kernel killed a member for the memory limit.
func (g *Group) OOMKilled() bool {
	if g.rec.Unified != "" {
		if b, err := os.ReadFile(filepath.Join(g.leaf(Tree), "memory.events")); err == nil && field(string(b), "oom_kill") > 0 {
			return true
		}
	}
	if d := g.rec.V1["memory"]; d != "" {
		if b, err := os.ReadFile(filepath.Join(d, "memory.oom_control")); err == nil && field(string(b), "oom_kill") > 0 {
			return true
		}
	}
	return false
}

// field finds "name value" among lines; -1 when it is not there.
func field(s, name string) int64 {
	for line := range strings.Lines(s) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		if k == name {
			if n, err := strconv.ParseInt(v, 10, 64); err == nil {
				return n
			}
		}
	}
	return -1
}

// Find lists the groups whose name begins with prefix, wherever this host lets groups be made.
func (h *Host) Find(_ context.Context, prefix string) []Record {
	byName := map[string]*Record{}
	get := func(n string) *Record {
		if byName[n] == nil {
			byName[n] = &Record{Kind: h.kind}
		}
		return byName[n]
	}
	scan := func(base string, add func(name, dir string)) {
		entries, _ := os.ReadDir(base)
		for _, e := range entries {
			if e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
				add(e.Name(), filepath.Join(base, e.Name()))
			}
		}
	}
	if h.unified != "" {
		scan(h.unified, func(n, d string) { get(n).Unified = d })
	}
	for c, base := range h.v1 {
		scan(base, func(n, d string) {
			r := get(n)
			if r.V1 == nil {
				r.V1 = map[string]string{}
			}
			r.V1[c] = d
		})
	}
	var out []Record
	for _, r := range byName {
		out = append(out, *r)
	}
	return out
}

// Name is the group's own name, the last part of its paths.
func (r Record) Name() string {
	if r.Unified != "" {
		return filepath.Base(r.Unified)
	}
	for _, d := range r.V1 {
		return filepath.Base(d)
	}
	return ""
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// poll calls done until it is true, at most for the given time (0: as long as ctx lasts).
func poll(ctx context.Context, most time.Duration, done func() bool) bool {
	if most > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, most)
		defer cancel()
	}
	for wait := 500 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if done() {
			return true
		}
		select {
		case <-ctx.Done():
			return done()
		case <-time.After(wait):
		}
	}
}
