package inside

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coffer-box/coffer/test/guest/plan"
	"github.com/coffer-box/coffer/test/observer"
)

// guest is the kind of guest that this runs in; empty on a host.
func guest() plan.Cgroups { return plan.Cgroups(os.Getenv("COFFER_TEST_GUEST")) }

type home struct {
	t        *testing.T
	bin, dir string
}

func newHome(t *testing.T) *home {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("limits need control groups that can be written to; this runs as root")
	}
	bin := os.Getenv("COFFER_BIN")
	if bin == "" {
		bin = "../../../bin/coffer"
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("%v: build it with `make build`, or name it in COFFER_BIN", err)
	}
	dir, err := os.MkdirTemp("", "climits-")
	if err != nil {
		t.Fatal(err)
	}
	h := &home{t: t, bin: bin, dir: dir}
	t.Cleanup(func() {
		_, _ = h.try("rm", "-f", "b")
		h.noneLeft("after the test")
		_ = os.RemoveAll(dir)
	})
	return h
}

// limited is a home on a host that enforces limits.
func limited(t *testing.T) *home {
	t.Helper()
	if guest() == plan.None {
		t.Skip("no limits can be enforced in this guest: TestRefused")
	}
	h := newHome(t)
	if out, err := h.try("create", "--name", "b", "--memory", "64m", "--cpus", "1", "--pids-limit", "100", "base", "true"); err != nil {
		if guest() == "" && strings.Contains(out, "cannot enforce") {
			t.Skip(out)
		}
		t.Fatal(out)
	}
	h.run("rm", "b")
	return h
}

func (h *home) noneLeft(when string) {
	h.t.Helper()
	if left := observer.Left(h.marks()...); len(left) > 0 {
		h.t.Errorf("left %s:\n%s", when, strings.Join(left, "\n"))
	}
}

func (h *home) marks() []string {
	b, err := os.ReadFile(filepath.Join(h.dir, "instance"))
	if err != nil {
		return []string{h.dir}
	}
	return []string{h.dir, "coffer-" + strings.TrimSpace(string(b))}
}

// try returns what a command printed, or after a failure what it said of that.
func (h *home) try(args ...string) (string, error) {
	c := exec.Command(h.bin, args...)
	c.Env = append(os.Environ(), "COFFER_HOME="+h.dir)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		return strings.TrimSpace(errs.String()), err
	}
	return strings.TrimSpace(out.String()), nil
}

func (h *home) run(args ...string) string {
	h.t.Helper()
	out, err := h.try(args...)
	if err != nil {
		h.t.Fatalf("coffer %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return out
}

// file reads a control file of the one among the box's groups where it sets a limit.
func (h *home) file(names ...string) string {
	for _, dir := range observer.Cgroups(h.marks()...) {
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(dir, name))
			s := strings.TrimSpace(string(b))
			if err == nil && s != "max" && !strings.HasPrefix(s, "max ") && s != "-1" && len(s) < 19 { // version 1 says 2^63 less a page
				return s
			}
		}
	}
	return ""
}

// count adds up a counter over the box's groups.
func (h *home) count(key, name string) int {
	sum := 0
	for _, dir := range observer.Cgroups(h.marks()...) {
		b, _ := os.ReadFile(filepath.Join(dir, name))
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == key {
				n, _ := strconv.Atoi(f[1])
				sum += n
			}
		}
	}
	return sum
}

func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("never came about: %s", what)
}

// TestHost: a guest is the host that it is meant to be, and the doctor sees it so.
func TestHost(t *testing.T) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	v1, v2 := strings.Contains(string(b), " - cgroup "), strings.Contains(string(b), " - cgroup2 ")
	doctor := map[plan.Cgroups]string{plan.V2: "v2; limits: memory, cpu, pids", plan.V1: "v1; limits: memory, cpu, pids", plan.None: "none; no limits can be set"}
	switch guest() {
	case "":
		t.Skip("what control groups a host has is known only of the guests")
	case plan.V2, plan.None:
		if v1 || !v2 {
			t.Fatalf("not version 2 only:\n%s", b)
		}
	case plan.V1:
		if !v1 || v2 {
			t.Fatalf("not version 1 only:\n%s", b)
		}
	}
	if out := newHome(t).run("doctor"); !strings.Contains(out, doctor[guest()]) {
		t.Errorf("the doctor says nothing of %q:\n%s", doctor[guest()], out)
	}
}

// TestRefused: a limit is an error where it cannot be enforced, unless the user wants the box all the same.
func TestRefused(t *testing.T) {
	if guest() != plan.None {
		t.Skip("only in one guest are there certainly no limits")
	}
	h := newHome(t)
	if out, err := h.try("run", "--rm", "--memory", "256m", "base", "true"); err == nil || !strings.Contains(out, "cannot enforce") {
		t.Errorf("run with a limit: %v: %s", err, out)
	}
	h.noneLeft("after the refusal")
	if got := h.run("run", "--rm", "--memory", "256m", "--limits-best-effort", "base", "echo", "hi"); got != "hi" {
		t.Errorf("best effort: %q", got)
	}
}

// TestLimits: each limit is set, and the box is held to it.
func TestLimits(t *testing.T) {
	h := limited(t)
	for name, limit := range map[string]struct {
		args   []string
		files  []string
		values []string
		held   func() bool
	}{
		"cpu": {[]string{"--cpus", "0.5", "base", "sh", "-c", "while :; do :; done"}, []string{"cpu.max", "cpu.cfs_quota_us"},
			[]string{"50000 100000", "50000"}, func() bool { return h.count("nr_throttled", "cpu.stat") > 0 }},
		// The box's kernel may end of what it is refused.
		"pids": {[]string{"--pids-limit", "90", "base", "sh", "-c", "while :; do sleep 1000 & done"}, []string{"pids.max"},
			[]string{"90"}, func() bool { return h.count("max", "pids.events") > 0 || h.status() != "running" }},
		// That it kills, and that inspect says so, is tested end to end.
		"memory": {[]string{"--memory", "256m", "base", "sleep", "1000"}, []string{"memory.max", "memory.limit_in_bytes"},
			[]string{"268435456"}, func() bool { return true }},
	} {
		t.Run(name, func(t *testing.T) {
			h.t = t
			h.run(append([]string{"run", "-d", "--name", "b"}, limit.args...)...)
			if got := h.file(limit.files...); !slices.Contains(limit.values, got) {
				t.Errorf("the limit set is %q", got)
			}
			until(t, "the box is held to it", limit.held)
			h.run("rm", "-f", "b")
			h.noneLeft("after rm -f")
		})
	}
}

func (h *home) status() string {
	out, err := h.try("inspect", "-f", "{{.Status}}", "b")
	if err != nil {
		h.t.Fatal(out)
	}
	return out
}
