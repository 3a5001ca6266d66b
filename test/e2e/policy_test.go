package e2e

import (
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
)

// TestCopiedHome: a copy of a home is another home. What is done in it touches no box of the first. W9.
func TestCopiedHome(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "echo kept > /root/kept; sync")
	dir := h.dir + "-copy"
	if out, err := exec.Command("cp", "-a", h.dir, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := &home{t: t, bin: h.bin, dir: dir}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if got := c.field("b", "{{.Status}} {{.Reason}}"); got != "stopped copied" {
		t.Errorf("in the copy the box is %s", got)
	}
	if c.instance() == h.instance() {
		t.Error("both homes have one identity")
	}
	c.try("doctor", "--fix")
	h.run("exec", "b", "true")
	c.run("start", "b")
	if got := c.run("exec", "b", "cat", "/root/kept"); got != "kept" {
		t.Errorf("the file in the copy: %q", got)
	}
	h.run("exec", "b", "true")
	c.run("stop", "-t", "0", "b")
	c.run("prune")
	h.run("exec", "b", "true")
	h.run("rm", "-f", "b")
	for _, either := range []*home{h, c} {
		either.noneLeft("after rm -f in both")
	}
}

// TestPruneSparesNew: what is created while prune looks and removes is nothing left over.
func TestPruneSparesNew(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "base", "true")
	// Measuring and removing these takes a while.
	for i := range 40 {
		for j := range 250 {
			dir := filepath.Join(h.dir, "boxes", strings.Repeat("0", 30)+string("0123456789"[i/10])+string("0123456789"[i%10]), strconv.Itoa(j))
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { h.run("prune") })
	for i := range 6 {
		name := "b" + strconv.Itoa(i)
		h.run("run", "-d", "--name", name, "-v", "/data", "base", "sleep", "1000")
		h.run("exec", name, "sh", "-c", "echo kept > /data/f")
	}
	wg.Wait()
	h.run("prune")
	for i := range 6 {
		if got := h.run("exec", "b"+strconv.Itoa(i), "cat", "/data/f"); got != "kept" {
			t.Errorf("box %d: %q", i, got)
		}
	}
	if m, _ := filepath.Glob(filepath.Join(h.dir, "boxes", "0000*")); len(m) != 0 {
		t.Errorf("left over: %v", m)
	}
}

// TestCutOffRemove: a removal that was cut off is finished as it was begun: with the anonymous volumes or without. L18, L26.
func TestCutOffRemove(t *testing.T) {
	h := newHome(t)
	for _, with := range []bool{false, true} {
		id := h.run("create", "-v", "/data", "base", "true")
		h.edit(id, func(rec map[string]any) { rec["Phase"], rec["RemoveVolumes"] = "removing", with })
		if with {
			// So far it had come.
			if err := os.RemoveAll(filepath.Join(h.dir, "boxes", id)); err != nil {
				t.Fatal(err)
			}
		}
		if out := h.run("ps", "-aq"); out != "" {
			t.Errorf("with volumes %v: ps -aq: %s", with, out)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "volumes", id)); (err == nil) == with {
			t.Errorf("with volumes %v: %v", with, err)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "boxes", id)); err == nil {
			t.Errorf("with volumes %v: its directory is there again", with)
		}
	}
}

// TestClosedDirectories: a directory that a guest closed even to its owner keeps no box from being removed.
func TestClosedDirectories(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "-v", "/data", "base", "sh", "-c", "mkdir -p /data/a/b; echo x > /data/a/b/f; chmod 0 /data/a/b; chmod 555 /data/a")
	h.noBoxes()
	if m, _ := filepath.Glob(filepath.Join(h.dir, "[tv]*", "*")); len(m) != 0 {
		t.Errorf("files left: %v", m)
	}
}

// TestRemovePolicyWhileBusy: --rm is carried out by whoever looks next also where the shim lived and could not, and until then the box is
// not started again. L22, L23.
func TestRemovePolicyWhileBusy(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "--rm", "base", "sleep", "1000")
	f, err := os.OpenFile(filepath.Join(h.dir, "boxes", id, "op.lock"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	shim := h.role(id, "shim")
	h.run("kill", id)
	until(t, "its supervisor gives up", func() bool { return !h.lives(shim) })
	if out := h.run("ps", "-aq"); out == "" {
		t.Fatal("the box was removed under somebody's lock")
	}
	f.Close()
	if _, errs, code := h.all("start", id); code != 125 || !strings.Contains(errs, "no such box") {
		t.Errorf("start: exit code %d: %s", code, errs)
	}
	h.noneLeft("after a look")
	h.noBoxes()
}

// TestRestarting: a box between two runs is not taken for one that has ended.
func TestRestarting(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--restart", "always", "base", "sh", "-c", "echo run; exit 3")
	until(t, "it waits for a later restart", func() bool { return h.field("b", "{{.Status}} {{ge .RestartCount 3}}") == "restarting true" })
	if out := h.run("ps", "--format", "{{.Name}} {{.Status}}"); out != "b restarting" && out != "b starting" && out != "b running" {
		t.Errorf("ps: %q", out)
	}
	if _, errs, code := h.all("rm", "b"); code != 125 || !strings.Contains(errs, "running") {
		t.Errorf("rm: exit code %d: %s", code, errs)
	}
	h.run("prune")
	// A run that ends before files have been read from it does not end that.
	for range 2 {
		h.run("cp", "b:/etc/hostname", filepath.Join(h.dir, "name"))
	}
	runs := strings.Count(h.run("logs", "b"), "run")
	until(t, "it is restarted after prune and cp", func() bool { return strings.Count(h.run("logs", "b"), "run") > runs })
	h.run("stop", "b")
	h.noneLeft("after stop")
	h.run("rm", "b")
}

// TestImpatience: what another command waits for can be hurried: kill reaches a box that is being stopped, and rm -f does not wait for the
// end of a stop's patience.
func TestImpatience(t *testing.T) {
	h := newHome(t)
	for _, verb := range []string{"kill", "rm"} {
		h.run("run", "-d", "--name", "b", "--stop-signal", "WINCH", "base", "sleep", "1000")
		stop := h.cmd("stop", "-t", "100000", "b")
		if err := stop.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, "it is being stopped", func() bool { return h.field("b", "{{.Status}}") == "stopping" })
		if verb == "kill" {
			h.run("kill", "b")
			if err := stop.Wait(); err != nil {
				t.Errorf("stop: %v", err)
			}
			h.noneLeft("after stop")
		}
		h.run("rm", "-f", "b")
		h.noneLeft("after rm -f")
		if verb == "rm" {
			_ = stop.Wait()
		}
	}
}

// TestKilledLauncher: between the start of a supervisor and its first word there is no moment at which the box looks free: whoever comes
// when the launcher was killed ends the supervisor too. L7, L26.
func TestKilledLauncher(t *testing.T) {
	h := newHome(t)
	h.run("create", "--name", "b", "base", "sleep", "1000")
	for i := range 10 {
		c := h.cmd("start", "b")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Duration(20+5*i) * time.Millisecond); time.Now().Before(end) && h.find("_shim") == 0; {
			continue // a moment each time, none of them judged
		}
		_ = syscall.Kill(c.Process.Pid, syscall.SIGKILL)
		_ = c.Wait()
		h.run("stop", "-t", "0", "b")
		h.noneLeft("after stop")
	}
	h.run("rm", "b")
}

// TestPoisonedLauncher: boxes start also from within a control group that was once killed. Some kernels (6.18 is one) kill whatever a
// member of such a group clones into another. L4.
func TestPoisonedLauncher(t *testing.T) {
	var top string
	for _, dir := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil && top == "" {
			top = dir
		}
	}
	group := filepath.Join(top, "coffer-test-poisoned-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(group, 0o755); top == "" || err != nil {
		t.Skipf("a control group of version 2 is needed: %v", err)
	}
	t.Cleanup(func() { until(t, "its group is removed", func() bool { return os.Remove(group) == nil }) })
	if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
		t.Skipf("the kernel cannot kill control groups: %v", err)
	}
	h := newHome(t)
	for _, args := range [][]string{{"run", "--rm", "base", "true"}, {"run", "-d", "--name", "b", "base", "sleep", "1000"}} {
		c := exec.Command("sh", append([]string{"-c", `echo $$ > "$0" && exec "$@"`, filepath.Join(group, "cgroup.procs"), h.bin}, args...)...)
		c.Env = append(os.Environ(), "COFFER_HOME="+h.dir)
		if out, err := c.CombinedOutput(); err != nil {
			t.Errorf("coffer %v: %v: %s", args, err, out)
		}
	}
	h.run("exec", "b", "true")
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}
