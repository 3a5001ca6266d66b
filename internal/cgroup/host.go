// Package cgroup places, bounds, kills and removes the control groups of a box's generations, on hosts with version 2, version 1
// or both. It works on plain files and remembers every directory it made, so that what one process created another can find and
// remove. It knows no box and no database, and it decides nothing about identity.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors that callers tell apart.
var (
	// ErrUnsupported is wrapped by errors about limits that this host cannot enforce.
	ErrUnsupported = errors.New("the host cannot enforce it")
	// ErrGone says that no directory of a group is left.
	ErrGone = errors.New("cgroup is gone")
	// ErrRecord is wrapped by errors about a record that cannot be a group's. Nothing was touched.
	ErrRecord = errors.New("not the record of a group")
)

// parent is the directory, in each hierarchy, under which all groups stand. It is shared by all homes and never removed.
const parent = "coffer"

// leaving is a leaf beside the groups, for processes that left one and are about to end.
const leaving = "leaving"

// Kinds of hosts.
const (
	KindV2     = "v2"     // one hierarchy with controllers
	KindHybrid = "hybrid" // version 1 controllers, and a version 2 hierarchy beside them
	KindV1     = "v1"
	KindNone   = "none" // nothing this process may write
)

// Limits bounds a group's tree. Zero means no limit.
type Limits struct {
	Memory int64   // bytes
	CPUs   float64 // cores
	PIDs   int64   // processes and threads
}

// Host is what this process may do with control groups here.
type Host struct {
	kind    string
	unified string            // writable directory of the version 2 hierarchy that groups are made in, or ""
	v1      map[string]string // controller → the same for version 1
	ctrls   []string          // version 2 controllers that can be enabled for groups
	why     string            // why something is missing
}

// Detect looks at the host. It creates only the shared parent directories.
func Detect(context.Context) (*Host, error) {
	if runtime.GOOS != "linux" {
		return &Host{kind: KindNone, why: "control groups need Linux"}, nil
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	defer f.Close()
	mounts, err := parseMounts(f)
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	own, err := ownGroups()
	if err != nil {
		return nil, err
	}
	return detect(mounts, own), nil
}

// mount is one mounted hierarchy.
type mount struct {
	dir   string
	v2    bool
	ctrls []string // version 1
}

func parseMounts(r io.Reader) ([]mount, error) {
	var out []mount
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		if !ok {
			continue
		}
		pre, post := strings.Fields(before), strings.Fields(after)
		if len(pre) < 5 || len(post) < 3 {
			continue
		}
		// A bind mount of a part of the hierarchy (as in containers) is as good as the whole.
		m := mount{dir: unescape(pre[4])}
		switch post[0] {
		case "cgroup2":
			m.v2 = true
		case "cgroup":
			m.ctrls = strings.Split(post[2], ",")
		default:
			continue
		}
		out = append(out, m)
	}
	return out, sc.Err()
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	for _, r := range [][2]string{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, r[0], r[1])
	}
	return s
}

// ownGroups maps controller ("" for version 2) to this process' path.
func ownGroups() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("find own cgroup: %w", err)
	}
	return parseOwn(string(b)), nil
}

func parseOwn(s string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(s) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			out[c] = parts[2]
		}
	}
	return out
}

func detect(mounts []mount, own map[string]string) *Host {
	h := &Host{kind: KindNone, v1: map[string]string{}}
	var whys []string
	for _, m := range mounts {
		if m.v2 {
			base, err := usableBase(m.dir, own[""])
			if err != nil {
				whys = append(whys, err.Error())
				continue
			}
			h.unified = base
			h.ctrls = enableControllers(m.dir, base)
			continue
		}
		for _, c := range []string{"memory", "cpu", "pids", "freezer"} {
			if !slices.Contains(m.ctrls, c) {
				continue
			}
			if base, err := usableBase(m.dir, own[c]); err == nil {
				h.v1[c] = base
			} else {
				whys = append(whys, err.Error())
			}
		}
	}
	h.why = strings.Join(whys, "; ")
	switch {
	case h.unified != "" && len(h.v1) == 0:
		h.kind = KindV2
	case h.unified != "":
		h.kind = KindHybrid
	case h.v1["freezer"] != "":
		h.kind = KindV1
	}
	if len(mounts) == 0 {
		h.why = "no cgroup file system is mounted"
	}
	return h
}

// usableBase returns the directory for groups under a hierarchy: at its top for who may write there, else under the process'
// own group where that was delegated to its user.
func usableBase(top, own string) (string, error) {
	var first error
	for _, dir := range []string{top, filepath.Join(top, own)} {
		base := filepath.Join(dir, parent)
		err := os.Mkdir(base, 0o755)
		if err != nil && !errors.Is(err, os.ErrExist) {
			if first == nil {
				first = err
			}
			continue
		}
		if err := unix.Access(base, unix.W_OK); err != nil {
			if first == nil {
				first = fmt.Errorf("%s: %w", base, err)
			}
			continue
		}
		return base, nil
	}
	return "", first
}

// enableControllers turns the limiting controllers on from the top down to base, and says which reached it.
func enableControllers(top, base string) []string {
	want := []string{"memory", "cpu", "pids"}
	rel, err := filepath.Rel(top, base)
	if err != nil {
		return nil
	}
	dir := top
	steps := append([]string{""}, strings.Split(rel, string(filepath.Separator))...)
	for _, s := range steps {
		dir = filepath.Join(dir, s)
		enabled, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
		have := strings.Fields(string(enabled))
		for _, c := range want {
			if !slices.Contains(have, c) {
				// One at a time: a missing controller must not cost the others.
				_ = writeFile(dir, "cgroup.subtree_control", "+"+c)
			}
		}
	}
	enabled, _ := os.ReadFile(filepath.Join(base, "cgroup.subtree_control"))
	have := strings.Fields(string(enabled))
	return slices.DeleteFunc(want, func(c string) bool { return !slices.Contains(have, c) })
}

// Kind is one of the Kind constants.
func (h *Host) Kind() string { return h.kind }

// Describe says in words what was found.
func (h *Host) Describe() string {
	var can []string
	for _, c := range []string{"memory", "cpu", "pids"} {
		if h.controls(c) {
			can = append(can, c)
		}
	}
	s := h.kind + "; limits: " + strings.Join(can, ", ")
	if len(can) == 0 {
		s = h.kind + "; no limits can be set"
	}
	if h.why != "" {
		s += " (" + h.why + ")"
	}
	return s
}

func (h *Host) controls(c string) bool { return slices.Contains(h.ctrls, c) || h.v1[c] != "" }

// Supports says whether every limit that is asked for can be enforced.
func (h *Host) Supports(l Limits) error {
	if l.Memory < 0 || l.PIDs < 0 || !(l.CPUs >= 0 && l.CPUs <= 1<<20) { // the latter refuses NaN too
		return fmt.Errorf("limits of %d bytes, %v cpus, %d processes: none may be negative or absurd", l.Memory, l.CPUs, l.PIDs)
	}
	var missing []string
	for _, c := range l.controllers() {
		if !h.controls(c) {
			missing = append(missing, c)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	why := h.why
	if why == "" {
		why = "the controller is not available"
	}
	return fmt.Errorf("limit of %s: %w: %s; run as root or in a session with delegated cgroups (systemd-run --user --scope -p Delegate=yes), "+
		"or ask for best-effort limits (--limits-best-effort)", strings.Join(missing, ", "), ErrUnsupported, why)
}

// Enforceable is what of the limits this host can enforce.
func (h *Host) Enforceable(l Limits) Limits {
	if !h.controls("memory") {
		l.Memory = 0
	}
	if !h.controls("cpu") {
		l.CPUs = 0
	}
	if !h.controls("pids") {
		l.PIDs = 0
	}
	return l
}

func (l Limits) controllers() []string {
	var out []string
	if l.Memory > 0 {
		out = append(out, "memory")
	}
	if l.CPUs > 0 {
		out = append(out, "cpu")
	}
	if l.PIDs > 0 {
		out = append(out, "pids")
	}
	return out
}

func writeFile(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
