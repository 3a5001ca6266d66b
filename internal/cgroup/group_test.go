//go:build linux

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// real returns the host, or skips where this process may make no groups.
func real(t *testing.T, kinds ...string) *Host {
	t.Helper()
	h, err := Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.kind == KindNone {
		t.Skip("no cgroup is writable here: " + h.Describe())
	}
	return h
}

// v1Only is the host as it would be without version 2.
func v1Only(t *testing.T) *Host {
	h := real(t)
	if h.v1["freezer"] == "" {
		t.Skip("no writable v1 freezer here")
	}
	return &Host{kind: KindV1, v1: h.v1}
}

func hosts(t *testing.T, f func(t *testing.T, h *Host)) {
	t.Run("this host", func(t *testing.T) { f(t, real(t)) })
	t.Run("v1", func(t *testing.T) { f(t, v1Only(t)) })
}

var serial int

func testName(t *testing.T) string {
	t.Helper()
	serial++
	return fmt.Sprintf("coffer-test%d-%d-%d", os.Getpid(), time.Now().UnixNano(), serial)
}

func create(t *testing.T, h *Host, lim Limits) *Group {
	t.Helper()
	g, err := h.Create(t.Context(), testName(t), lim)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = g.Kill(ctx)
		_ = g.WaitEmpty(ctx)
		if err := g.Remove(ctx); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return g
}

// gated starts a shell that waits for its gate before it runs the script, and adds it to the tree.
func gated(t *testing.T, g *Group, script string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sh", "-c", "read go || exit 42; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if err := g.Add(t.Context(), Tree, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "go\n"); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func soon(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func memberCount(t *testing.T, g *Group) int {
	t.Helper()
	m, err := g.Members()
	if err != nil {
		t.Fatal(err)
	}
	return len(m)
}

const crowd = `for i in 1 2 3 4 5; do sleep 1000 & done; (setsid sleep 1000 &); sh -c 'kill -STOP $$' & wait`

func TestKillEndsEverything(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		for _, frozen := range []bool{false, true} {
			t.Run(fmt.Sprintf("frozen=%v", frozen), func(t *testing.T) {
				g := create(t, h, Limits{})
				gated(t, g, crowd)
				soon(t, "the crowd is there", func() bool { return memberCount(t, g) == 8 })
				if frozen {
					if err := g.Freeze(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if busy, err := g.Populated(); err != nil || !busy {
					t.Fatalf("Populated() = %v, %v before the kill", busy, err)
				}
				if err := g.Kill(t.Context()); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				if err := g.WaitEmpty(ctx); err != nil {
					t.Fatalf("%v; members %v", err, memberCount(t, g))
				}
				if err := g.Remove(t.Context()); err != nil {
					t.Fatal(err)
				}
				if _, err := Open(g.Record()); !errors.Is(err, ErrGone) {
					t.Errorf("Open after Remove: %v, want ErrGone", err)
				}
			})
		}
	})
}

func TestKillReachesNestedGroups(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		g := create(t, h, Limits{})
		cmd := gated(t, g, "sleep 1000")
		base := g.rec.Unified
		if base == "" {
			base = g.rec.V1["freezer"]
		}
		nested := filepath.Join(base, string(Tree), "a", "b")
		if err := os.MkdirAll(nested, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := writeFile(nested, "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		}
		if err := g.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := g.WaitEmpty(ctx); err != nil {
			t.Fatal(err)
		}
		if err := g.Remove(t.Context()); err != nil {
			t.Fatalf("nested directories stay: %v", err)
		}
	})
}

func TestForkBomb(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		lim := Limits{PIDs: 100}
		if err := h.Supports(lim); err != nil {
			t.Skip(err)
		}
		// A shell that cannot fork ends, and its bomb burns out; this one goes on at the limit.
		if _, err := exec.LookPath("perl"); err != nil {
			t.Skip("a bomb that survives its limit needs perl")
		}
		g := create(t, h, lim)
		gated(t, g, `exec perl -e 'fork while 1'`)
		soon(t, "the bomb is at work", func() bool { return memberCount(t, g) > 30 })
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := g.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		if err := g.WaitEmpty(ctx); err != nil {
			t.Fatal(err)
		}
	})
}

func TestKillSparesTheShim(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		g := create(t, h, Limits{})
		shim := exec.Command("sleep", "1000")
		if err := shim.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = shim.Process.Kill(); _ = shim.Wait() })
		if err := g.Add(t.Context(), Shim, shim.Process.Pid); err != nil {
			t.Fatal(err)
		}
		gated(t, g, "sleep 1000")
		if err := g.Kill(t.Context(), Tree); err != nil {
			t.Fatal(err)
		}
		soon(t, "only the shim is left", func() bool { m, _ := g.Members(); return cmp.Equal(m, []int{shim.Process.Pid}) })
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := g.WaitEmpty(ctx, Tree); err != nil {
			t.Errorf("the tree is empty, and waiting for that ended with: %v", err)
		}
	})
}

func TestMemoryLimitKills(t *testing.T) {
	h := real(t)
	lim := Limits{Memory: 32 << 20, CPUs: 0.5, PIDs: 50}
	if err := h.Supports(lim); err != nil {
		t.Skip(err)
	}
	g := create(t, h, lim)
	if g.OOMKilled() {
		t.Fatal("OOMKilled before anything ran")
	}
	cmd := gated(t, g, "head -c 200000000 /dev/zero | tail >/dev/null")
	_ = cmd.Wait()
	if !g.OOMKilled() {
		t.Error("OOMKilled() = false after the limit was passed")
	}
	if s := g.Stats(); s.MemoryPeak <= 0 || s.MemoryPeak > 32<<20 {
		t.Errorf("MemoryPeak = %d, want at most the limit", s.MemoryPeak)
	}
}

func TestCreateTwiceKeepsTheFirst(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		g := create(t, h, Limits{})
		if _, err := h.Create(t.Context(), g.rec.Name(), Limits{}); err == nil {
			t.Fatal("a generation's directory was made twice")
		}
		if _, err := Open(g.Record()); err != nil {
			t.Errorf("the failed second creation took the first group away: %v", err)
		}
		for _, d := range g.dirs() {
			if !exists(d) {
				t.Errorf("%s was removed", d)
			}
		}
	})
}

func TestCreateRefuses(t *testing.T) {
	h := real(t)
	for _, name := range []string{"", "..", "a/b", "../coffer-x", "A", "leaving"} {
		if _, err := h.Create(t.Context(), name, Limits{}); err == nil {
			t.Errorf("Create(%q) succeeded", name)
		}
	}
	zero := 0.0
	for _, lim := range []Limits{{Memory: -1}, {PIDs: -1}, {CPUs: -1}, {CPUs: zero / zero}, {CPUs: 1 / zero}} {
		if _, err := h.Create(t.Context(), testName(t), lim); err == nil {
			t.Errorf("Create with %+v succeeded", lim)
		}
	}
	if err := (&Host{kind: KindNone, why: "nothing here"}).Supports(Limits{Memory: 1}); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "nothing here") {
		t.Errorf("limit on a host without cgroups: %v", err)
	}
}

// A damaged record must not lead to somebody else's processes.
func TestOpenRefusesForeignPaths(t *testing.T) {
	for _, r := range []Record{
		{Unified: "/sys/fs/cgroup/unified/system.slice"},
		{Unified: "/sys/fs/cgroup/unified"},
		{Unified: "/sys/fs/cgroup/unified/coffer/../system.slice"},
		{Unified: "relative/coffer/x"},
		{Unified: "/sys/fs/cgroup/unified/coffer/"},
		{V1: map[string]string{"memory": "/sys/fs/cgroup/memory/docker/x"}},
		{Unified: "/sys/fs/cgroup/unified/coffer/a", V1: map[string]string{"memory": "/sys/fs/cgroup/memory/coffer/b"}},
	} {
		if _, err := Open(r); !errors.Is(err, ErrRecord) {
			t.Errorf("Open(%+v) = %v, want ErrRecord", r, err)
		}
	}
	dir := filepath.Join(t.TempDir(), parent, "coffer-x")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Record{Unified: dir}); !errors.Is(err, ErrRecord) {
		t.Errorf("Open of a plain directory = %v, want ErrRecord", err)
	}
}

func TestFind(t *testing.T) {
	h := real(t)
	g := create(t, h, Limits{})
	var names []string
	for _, r := range h.Find(t.Context(), g.rec.Name()) {
		names = append(names, r.Name())
		if diff := cmp.Diff(g.Record(), r); diff != "" {
			t.Errorf("found record (-made +found):\n%s", diff)
		}
	}
	if diff := cmp.Diff([]string{g.rec.Name()}, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if r := h.Find(t.Context(), "coffer-nobody-"); len(r) != 0 {
		t.Errorf("Find of another instance = %v", r)
	}
}

func TestWaitEmptyEndsWithContext(t *testing.T) {
	hosts(t, func(t *testing.T, h *Host) {
		g := create(t, h, Limits{})
		gated(t, g, "sleep 1000")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := g.WaitEmpty(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitEmpty of a busy group = %v", err)
		}
	})
}

// BenchmarkGroup is the price of a group in the life of a box.
func BenchmarkGroup(b *testing.B) {
	h, err := Detect(b.Context())
	if err != nil || h.kind == KindNone {
		b.Skip("no cgroup is writable here")
	}
	for _, c := range []struct {
		name string
		lim  Limits
	}{{"bare", Limits{}}, {"limited", Limits{Memory: 64 << 20, CPUs: 1, PIDs: 100}}} {
		b.Run(c.name, func(b *testing.B) {
			var spent [4]time.Duration
			for i := range b.N {
				b.StopTimer()
				cmd := exec.Command("sleep", "1000")
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				at := time.Now()
				lap := func(k int) { spent[k] += time.Since(at); at = time.Now() }
				g, err := h.Create(b.Context(), fmt.Sprintf("coffer-bench%d-%d", os.Getpid(), i), c.lim)
				if err != nil {
					b.Fatal(err)
				}
				lap(0)
				err = g.Add(b.Context(), Tree, cmd.Process.Pid)
				lap(1)
				err = errors.Join(err, g.Kill(b.Context()), g.WaitEmpty(b.Context()))
				lap(2)
				err = errors.Join(err, g.Remove(b.Context()))
				lap(3)
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				_ = cmd.Wait()
				b.StartTimer()
			}
			for k, n := range []string{"create", "add", "kill+wait", "remove"} {
				b.ReportMetric(float64(spent[k].Microseconds())/float64(b.N), n+"-µs")
			}
		})
	}
}
