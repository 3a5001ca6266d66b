package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/test/observer"
)

// minTree is the least that a running box is made of: shim, first process of the jail, kernel.
const minTree = 3

// TestSeedRemove is the case that Coffer began with: a detached box removed by force. L1.
func TestSeedRemove(t *testing.T) {
	h := newHome(t)
	for range 5 {
		id := h.run("run", "-d", "base", "sleep", "1000")
		if ps := h.live(); len(ps) < minTree {
			t.Fatalf("only %d processes of a running box: %s", len(ps), pids(ps))
		}
		h.run("rm", "-f", id)
		h.noneLeft("after rm -f")
	}
}

// TestSeedStop is the same for stop, which keeps the box. L1.
func TestSeedStop(t *testing.T) {
	h := newHome(t)
	h.run("create", "--name", "b", "base", "sleep", "1000")
	for range 5 {
		h.run("start", "b")
		h.run("exec", "b", "sh", "-c", "echo x >> /root/kept")
		if ps := h.live(); len(ps) < minTree {
			t.Fatalf("only %d processes of a running box: %s", len(ps), pids(ps))
		}
		h.run("stop", "-t", "5", "b")
		h.noneLeft("after stop")
	}
	h.run("start", "b")
	if got := h.run("exec", "b", "wc", "-l", "/root/kept"); !strings.HasPrefix(strings.TrimSpace(got), "5") {
		t.Errorf("files of the box after five starts: %q", got)
	}
	h.run("rm", "-f", "b")
}

// TestForegroundRemove: run --rm prints, exits with the command's code and leaves nothing. L23.
func TestForegroundRemove(t *testing.T) {
	h := newHome(t)
	out, _, code := h.all("run", "--rm", "base", "sh", "-c", "echo out; exit 7")
	if out != "out\n" || code != 7 {
		t.Errorf("printed %q, exit code %d", out, code)
	}
	h.noneLeft("after run --rm")
	if got := h.run("ps", "-aq"); got != "" {
		t.Errorf("boxes left: %s", got)
	}
}

// TestDetachedRemove: a detached --rm box is gone when its main process has ended. L22, L23.
func TestDetachedRemove(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--rm", "base", "true")
	until(t, "the box is removed", func() bool { out, _ := h.try("ps", "-aq"); return out == "" })
	until(t, "its supervisor ends", func() bool { return len(h.left()) == 0 })
}

// role finds a process of the box by what it is.
func (h *home) role(box, name string) int {
	h.t.Helper()
	switch name {
	case "shim":
		return h.number(box, "{{.ShimPID}}")
	case "init":
		return h.number(box, "{{.InitPID}}")
	}
	init := h.number(box, "{{.InitPID}}")
	for _, p := range h.live() {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/stat")
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 2 {
			continue
		}
		cmd, _ := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/cmdline")
		isSentry := strings.HasPrefix(string(cmd), "coffer-sentry")
		if name == "sentry" && isSentry && f[1] == strconv.Itoa(init) || name == "stub" && p.Why == "pid namespace" && len(cmd) == 0 {
			return p.PID
		}
	}
	h.t.Fatalf("no %s among %s", name, pids(h.live()))
	return 0
}

func (h *home) number(box, tmpl string) int {
	h.t.Helper()
	n, err := strconv.Atoi(h.field(box, tmpl))
	if err != nil || n <= 0 {
		h.t.Fatalf("%s of %s: %d, %v", tmpl, box, n, err)
	}
	return n
}

// TestKilledMember kills each kind of process of a running box; whatever command comes next converges. L3, L26, F2.
func TestKilledMember(t *testing.T) {
	for _, role := range []string{"shim", "init", "sentry"} {
		for _, next := range []string{"ps", "rm", "stop", "start"} {
			t.Run(role+"/"+next, func(t *testing.T) {
				h := newHome(t)
				h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
				h.run("exec", "b", "sh", "-c", "echo kept > /root/f; sync")
				if err := syscall.Kill(h.role("b", role), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				switch next {
				case "ps":
					until(t, "ps says that it ended", func() bool { return strings.Contains(h.run("ps", "-a"), "Exited") })
					until(t, "nothing is left", func() bool { return len(h.left()) == 0 })
				case "rm":
					h.run("rm", "-f", "b")
					h.noneLeft("after rm -f")
				case "stop":
					h.run("stop", "b")
					h.noneLeft("after stop")
				case "start":
					until(t, "it is known to have ended", func() bool { return h.field("b", "{{.Status}}") == "stopped" })
					h.run("start", "b")
					if got := h.run("exec", "b", "cat", "/root/f"); got != "kept" {
						t.Errorf("file after the kill: %q", got)
					}
					h.run("rm", "-f", "b")
				}
			})
		}
	}
}

// TestLostRecord: rm -f ends the box by its identity though nothing of it is recorded any more. L2, L8, W2.
func TestLostRecord(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "base", "sleep", "1000")
	h.edit(id, func(rec map[string]any) { rec["Handles"], rec["Phase"] = nil, "stopped" })
	if ps := h.live(); len(ps) < minTree {
		t.Fatalf("the box does not live: %s", pids(ps))
	}
	h.run("rm", "-f", id)
	h.noneLeft("after rm -f of a box without handles")
}

// edit changes a record behind the product's back.
func (h *home) edit(id string, fn func(map[string]any)) {
	h.t.Helper()
	db := filepath.Join(h.dir, "state.db")
	out, err := exec.Command("sqlite3", "-cmd", ".timeout 5000", db, "SELECT data FROM boxes WHERE id='"+id+"'").Output()
	if err != nil {
		h.t.Skipf("sqlite3 is needed to damage a record: %v", err)
	}
	var rec map[string]any
	if err := json.Unmarshal(out, &rec); err != nil {
		h.t.Fatal(err)
	}
	fn(rec)
	b, err := json.Marshal(rec)
	if err != nil {
		h.t.Fatal(err)
	}
	q := "UPDATE boxes SET data='" + strings.ReplaceAll(string(b), "'", "''") + "', phase='" + rec["Phase"].(string) + "' WHERE id='" + id + "'"
	if out, err := exec.Command("sqlite3", "-cmd", ".timeout 5000", db, q).CombinedOutput(); err != nil {
		h.t.Fatalf("%v: %s", err, out)
	}
}

// TestStartOnLive: a box whose record says stopped and that lives is never started a second time beside itself. L7, L10.
func TestStartOnLive(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "base", "sleep", "1000")
	first := h.number(id, "{{.InitPID}}")
	h.edit(id, func(rec map[string]any) { rec["Handles"], rec["Phase"] = nil, "stopped" })
	h.run("start", id)
	for _, p := range h.live() {
		if p.PID == first {
			t.Error("the first instance lives beside the second")
		}
	}
	shims := 0
	for _, p := range h.live() {
		if cmd, _ := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/cmdline"); strings.Contains(string(cmd), "_shim") {
			shims++
		}
	}
	if shims != 1 {
		t.Errorf("%d supervisors", shims)
	}
	h.run("rm", "-f", id)
}

// TestStoppedTree: a tree stopped with SIGSTOP ends all the same. L14, L20.
func TestStoppedTree(t *testing.T) {
	h := newHome(t)
	for _, verb := range []string{"stop", "rm"} {
		id := h.run("run", "-d", "base", "sleep", "1000")
		for _, p := range h.live() {
			_ = syscall.Kill(p.PID, syscall.SIGSTOP)
		}
		if verb == "stop" {
			h.run("stop", "-t", "1", id)
			h.noneLeft("after stop of a stopped tree")
		}
		h.run("rm", "-f", id)
		h.noneLeft("after rm -f of a stopped tree")
	}
}

// TestForkBomb: a fork bomb inside the box dies with it. L14.
func TestForkBomb(t *testing.T) {
	h := newHome(t)
	args := []string{"run", "-d", "--name", "b"}
	if os.Geteuid() == 0 {
		args = append(args, "--pids-limit", "200", "--limits-best-effort") // not every host of root's can
	}
	h.run(append(args, "base", "sh", "-c", "i=0; while [ $i -lt 60 ]; do sleep 500 & i=$((i+1)); done; wait")...)
	until(t, "there are many processes", func() bool { out, _ := h.try("top", "b"); return strings.Count(out, "sleep") > 20 })
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f of a fork bomb")
}

// TestIgnoresStop: a main process to which the stop signal means nothing is killed after the timeout. W8.
func TestIgnoresStop(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--stop-signal", "WINCH", "base", "sleep", "1000")
	h.run("stop", "-t", "1", "b")
	h.noneLeft("after stop")
	if got := h.field("b", "{{.ExitCode}} {{.Reason}}"); got != "137 stopped" {
		t.Errorf("ended with %s", got)
	}
}

// TestDetachedSurvives: a detached box outlives the command that started it, its session and its terminal's hangup. W6.
func TestDetachedSurvives(t *testing.T) {
	h := newHome(t)
	c := h.cmd("run", "-d", "--name", "b", "base", "sleep", "1000")
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Everything that still was in that session would get this.
	_ = syscall.Kill(-c.Process.Pid, syscall.SIGHUP)
	if got := h.run("exec", "b", "echo", "alive"); got != "alive" {
		t.Errorf("exec: %q", got)
	}
	h.run("rm", "-f", "b")
}

// TestKilledClient: a foreground client killed at any moment leaves a box that the next command can deal with. L26.
func TestKilledClient(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "base", "true") // everything is unpacked
	for i := range 12 {
		c := h.cmd("run", "--name", "b"+strconv.Itoa(i), "base", "sleep", "1000")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i*15) * time.Millisecond) // a different moment each time, none of them judged
		_ = c.Process.Kill()
		_ = c.Wait()
		out, _ := h.try("ps", "-aq")
		for id := range strings.FieldsSeq(out) {
			h.run("rm", "-f", id)
		}
		until(t, "nothing is left", func() bool { return len(h.left()) == 0 })
	}
}

// TestConcurrent: start, stop and rm of one box from many processes at once never leave two instances or a live orphan. L7, F3.
func TestConcurrent(t *testing.T) {
	h := newHome(t)
	h.run("create", "--name", "b", "base", "sleep", "1000")
	var wg sync.WaitGroup
	for i := range 9 {
		wg.Go(func() {
			verb := [][]string{{"start", "b"}, {"stop", "-t", "1", "b"}, {"restart", "-t", "1", "b"}}[i%3]
			h.try(verb...)
		})
	}
	wg.Wait()
	inits := 0
	for _, p := range h.live() {
		if cmd, _ := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/cmdline"); strings.HasPrefix(string(cmd), "coffer-init") {
			inits++
		}
	}
	running := h.field("b", "{{.Status}}") == "running"
	if running && inits != 1 || !running && inits != 0 {
		t.Errorf("running: %v, with %d jails: %s", running, inits, pids(h.live()))
	}
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}

// TestOtherHome: nothing that is done in one home touches another's boxes. W9.
func TestOtherHome(t *testing.T) {
	a, b := newHome(t), newHome(t)
	a.run("run", "-d", "--name", "x", "base", "sleep", "1000")
	b.run("run", "-d", "--name", "x", "base", "sleep", "1000")
	b.run("rm", "-f", "x")
	b.run("prune")
	b.try("doctor", "--fix")
	if got := a.run("exec", "x", "echo", "alive"); got != "alive" {
		t.Errorf("box of the other home: %q", got)
	}
	a.run("rm", "-f", "x")
}

// TestBystander: a process that has taken a pid out of the record is not signalled. W1, W3, W4.
func TestBystander(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "base", "sleep", "1000")
	by := exec.Command("sleep", "1000")
	if err := by.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = by.Process.Kill(); _ = by.Wait() }()
	h.edit(id, func(rec map[string]any) {
		hs := rec["Handles"].(map[string]any)
		for _, k := range []string{"init", "shim"} {
			hs[k].(map[string]any)["pid"] = by.Process.Pid
		}
	})
	h.run("rm", "-f", id)
	h.noneLeft("after rm -f")
	if err := by.Process.Signal(unix.Signal(0)); err != nil {
		t.Fatalf("the bystander is gone: %v", err)
	}
	if st := observer.Processes("/proc/" + strconv.Itoa(by.Process.Pid)); len(st) != 0 {
		t.Log(st)
	}
}

// TestAnotherBoot: handles of an earlier boot are never signalled; the record is put right. W7.
func TestAnotherBoot(t *testing.T) {
	h := newHome(t)
	id := h.run("create", "base", "sleep", "1000")
	by := exec.Command("sleep", "1000")
	if err := by.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = by.Process.Kill(); _ = by.Wait() }()
	h.edit(id, func(rec map[string]any) {
		rec["Phase"], rec["Generation"] = "running", 1
		rec["Handles"] = map[string]any{"boot_id": "00000000-0000-0000-0000-000000000000",
			"init": map[string]any{"pid": by.Process.Pid, "boot_id": "00000000-0000-0000-0000-000000000000"}}
	})
	if got := h.field(id, "{{.Status}}"); got != "stopped" {
		t.Errorf("status %s", got)
	}
	if err := by.Process.Signal(unix.Signal(0)); err != nil {
		t.Fatalf("the bystander is gone: %v", err)
	}
}

// TestExecEnds: an exec'd command ends with its timeout and with its client, all of its session with it. L21.
func TestExecEnds(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	if _, _, code := h.all("exec", "--timeout", "300ms", "b", "sh", "-c", "sleep 777 & sleep 777"); code != 124 {
		t.Errorf("exit code after the timeout: %d", code)
	}
	c := h.cmd("exec", "b", "sh", "-c", "sleep 777 & sleep 777")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the command runs", func() bool { return strings.Contains(h.run("top", "b"), "777") })
	_ = c.Process.Kill()
	_ = c.Wait()
	until(t, "it is gone", func() bool { return !strings.Contains(h.run("top", "b"), "777") })
	h.run("exec", "-d", "b", "sleep", "778")
	if !strings.Contains(h.run("top", "b"), "778") {
		t.Error("the detached command is gone with its client")
	}
	h.run("rm", "-f", "b")
}
