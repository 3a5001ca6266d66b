package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

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
	h.noBoxes()
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
		if name == "sentry" && isSentry && f[1] == strconv.Itoa(init) || name == "stub" && p.Comm == "sentry" && len(cmd) == 0 {
			return p.PID
		}
	}
	h.t.Fatalf("no %s among %s", name, pids(h.live()))
	return 0
}

// lives tells whether a process of this home's is there and no zombie.
func (h *home) lives(pid int) bool {
	return slices.ContainsFunc(h.live(), func(p observer.Process) bool { return p.PID == pid })
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
	for _, role := range []string{"shim", "init", "sentry", "stub"} {
		nexts := []string{"ps", "rm", "stop", "start"}
		if role == "stub" {
			nexts = []string{"rm", "stop"} // the kernel lives on without one of these, and so does the box
		}
		for _, next := range nexts {
			t.Run(role+"/"+next, func(t *testing.T) {
				h := newHome(t)
				h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
				h.run("exec", "b", "sh", "-c", "echo kept > /root/f; sync")
				pid := h.role("b", role)
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				switch next {
				case "ps":
					if role == "shim" {
						// Nobody but whoever looks can know: once it is dead, the first look must say so, and leave nothing.
						until(t, "the shim is dead", func() bool { return !h.lives(pid) })
						if out := h.run("ps", "-a"); !strings.Contains(out, "Exited (137)") {
							t.Errorf("ps -a: %s", out)
						}
						h.noneLeft("after ps")
						return
					}
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

// TestForkBomb: a fork bomb inside the box dies with it. Where the host can limit processes it is let go on until it meets the limit;
// elsewhere it is kept small. L14.
func TestForkBomb(t *testing.T) {
	h := newHome(t)
	bomb := "while true; do sleep 500 & done"
	args := []string{"run", "-d", "--name", "b", "--pids-limit", "80", "base", "sh", "-c", bomb}
	if _, errs, code := h.all(args...); code == 0 {
		until(t, "the bomb meets its limit", func() bool {
			return h.field("b", "{{.Status}}") != "running" || slices.ContainsFunc(observer.Cgroups(h.marks()...), metLimit)
		})
	} else if strings.Contains(errs, "cannot enforce") {
		h.run("run", "-d", "--name", "small", "base", "sh", "-c", "i=0; while [ $i -lt 60 ]; do sleep 500 & i=$((i+1)); done; wait")
		until(t, "there are many processes", func() bool { out, _ := h.try("top", "small"); return strings.Count(out, "sleep") > 20 })
	} else {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	for id := range strings.FieldsSeq(h.run("ps", "-aq")) {
		h.run("rm", "-f", id)
	}
	h.noneLeft("after rm -f of a fork bomb")
}

// metLimit tells whether a control group has refused a process.
func metLimit(cgroup string) bool {
	b, err := os.ReadFile(filepath.Join(cgroup, "pids.events"))
	return err == nil && strings.HasPrefix(string(b), "max ") && !strings.HasPrefix(string(b), "max 0")
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
			// They come one after the other, and whatever the box is when one's turn comes, it can be done.
			if _, errs, code := h.all(verb...); code != 0 {
				t.Errorf("%v: exit code %d: %s", verb, code, errs)
			}
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

// bystander is a process that is nothing of Coffer's. Whether it was killed is asked of its parent: a signal still reaches a child that
// is dead and not collected.
func bystander(t *testing.T) (pid int, dead func() bool) {
	t.Helper()
	by := exec.Command("sleep", "1000")
	if err := by.Start(); err != nil {
		t.Fatal(err)
	}
	pid = by.Process.Pid
	collected := false
	t.Cleanup(func() {
		if !collected {
			_ = by.Process.Kill()
			_ = by.Wait()
		}
	})
	return pid, func() bool {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(pid, &ws, syscall.WNOHANG, nil)
		collected = got == pid
		return collected || err != nil
	}
}

// TestBystander: a process that has taken a pid out of the record is not signalled. W1, W3, W4.
func TestBystander(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "base", "sleep", "1000")
	pid, dead := bystander(t)
	h.edit(id, func(rec map[string]any) {
		hs := rec["Handles"].(map[string]any)
		for _, k := range []string{"init", "shim"} {
			hs[k].(map[string]any)["pid"] = pid
			// Without this the process itself would be found again, whatever its number.
			delete(hs[k].(map[string]any), "file_handle")
		}
	})
	h.run("rm", "-f", id)
	h.noneLeft("after rm -f")
	if dead() {
		t.Fatal("the bystander was killed")
	}
}

// TestAnotherBoot: what is on record as of an earlier boot is never signalled, be it a stranger that has the number now or, with a
// record that was restored or is wrong, the box itself: then rm -f fails, says what lives, and keeps everything. W7, F1, L8.
func TestAnotherBoot(t *testing.T) {
	const other = "00000000-0000-0000-0000-000000000000"
	h := newHome(t)
	pid, dead := bystander(t)
	id := h.run("create", "base", "sleep", "1000")
	h.edit(id, func(rec map[string]any) {
		rec["Phase"], rec["Generation"] = "running", 1
		rec["Handles"] = map[string]any{"boot_id": other, "init": map[string]any{"pid": pid, "boot_id": other}}
	})
	if got := h.field(id, "{{.Status}}"); got != "stopped" {
		t.Errorf("status %s", got)
	}
	if dead() {
		t.Fatal("the bystander was killed")
	}
	h.run("rm", id)

	id = h.run("run", "-d", "base", "sleep", "1000")
	shim, init := h.role(id, "shim"), h.role(id, "init")
	boot := ""
	restamp := func(with string) {
		h.edit(id, func(rec map[string]any) {
			hs := rec["Handles"].(map[string]any)
			boot = hs["boot_id"].(string)
			hs["boot_id"] = with
			for _, k := range []string{"init", "shim"} {
				hs[k].(map[string]any)["boot_id"] = with
			}
		})
	}
	restamp(other)
	real := boot
	_, errs, code := h.all("rm", "-f", id)
	if code != 125 || !strings.Contains(errs, "earlier boot") {
		t.Errorf("rm -f: exit code %d: %s", code, errs)
	}
	if !h.lives(shim) || !h.lives(init) {
		t.Errorf("after rm -f live only %s", pids(h.live()))
	}
	restamp(real)
	h.run("rm", "-f", id)
	h.noneLeft("after rm -f")
}

// TestOutsider: a process of the host's that has a child of its own in the box's pid namespace and does not collect it keeps the
// namespace from ending. stop and rm say so and keep everything; other boxes are as usable as ever. L8, L24, F1, F4.
func TestOutsider(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("entering a box's pid namespace from outside needs root")
	}
	h := newHome(t)
	h.run("run", "-d", "--name", "good", "base", "sleep", "1000")
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	out := exec.Command("nsenter", "-t", strconv.Itoa(h.number("b", "{{.InitPID}}")), "-p", "sleep", "1000")
	if err := out.Start(); err != nil {
		t.Skipf("nsenter is needed to enter the namespace: %v", err)
	}
	defer func() { _ = out.Process.Kill(); _ = out.Wait() }()
	until(t, "its child is in the namespace", func() bool {
		return slices.ContainsFunc(h.live(), func(p observer.Process) bool { return p.Comm == "sleep" && p.Why == "pid namespace" })
	})
	if err := out.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"stop", "rm"} {
		args := map[string][]string{"stop": {"stop", "-t", "1", "b"}, "rm": {"rm", "-f", "b"}}[verb]
		_, errs, code := h.all(args...)
		if code != 125 || !strings.Contains(errs, fmt.Sprintf("process %d (nsenter", out.Process.Pid)) {
			t.Errorf("%s: exit code %d: %s", verb, code, errs)
		}
	}
	if ps, errs, code := h.all("ps", "-a", "--format", "{{.Name}}"); code != 125 || ps != "b\ngood\n" || !strings.Contains(errs, "nsenter") {
		t.Errorf("ps -a: exit code %d: %q, %s", code, ps, errs)
	}
	h.run("exec", "good", "true")
	if _, err := os.Stat(filepath.Join(h.dir, "boxes", h.field("good", "{{.ID}}"))); err != nil {
		t.Error(err)
	}
	if err := out.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	_ = out.Wait()
	h.run("rm", "-f", "b", "good")
	h.noneLeft("after rm -f")
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
