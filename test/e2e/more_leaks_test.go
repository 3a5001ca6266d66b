package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestFailedStart: a box that cannot start leaves nothing but a record that can be removed. L13.
func TestFailedStart(t *testing.T) {
	h := newHome(t)
	_, errs, code := h.all("run", "--name", "b", "base", "no-such-program")
	if code != 127 || !strings.Contains(errs, "no-such-program") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	h.noneLeft("after the failed start")
	if got := h.field("b", "{{.Status}}"); got != "failed" {
		t.Errorf("status %s", got)
	}
	h.run("rm", "b")
	if _, _, code := h.all("run", "--rm", "base", "/etc/passwd"); code != 126 {
		t.Errorf("a file that is no program: exit code %d", code)
	}
	h.noneLeft("after the failed start with --rm")
	h.noBoxes()
}

// TestAbsent: nothing to kill is not a failed kill. F4.
func TestAbsent(t *testing.T) {
	h := newHome(t)
	h.run("create", "--name", "b", "base", "true")
	h.run("stop", "b")
	h.run("rm", "-f", "b")
	h.run("rm", "-f", "b") // gone already
	if _, errs, code := h.all("rm", "b"); code != 125 || !strings.Contains(errs, "no such box") {
		t.Errorf("rm of nothing: exit code %d: %s", code, errs)
	}
	if _, errs, code := h.all("stop", "b", "c"); code != 125 || strings.Count(errs, "no such box") != 2 {
		t.Errorf("stop of nothing: exit code %d: %s", code, errs)
	}
}

// TestDamagedDatabase: a damaged database is named, recovered from with one command, and what still ran is ended. L16.
func TestDamagedDatabase(t *testing.T) {
	for name, damage := range map[string]func(string) error{
		"garbage":   func(p string) error { return os.WriteFile(p, []byte(strings.Repeat("not a database ", 500)), 0o600) },
		"truncated": func(p string) error { return os.Truncate(p, 3000) },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHome(t)
			h.run("run", "-d", "base", "sleep", "1000")
			db := filepath.Join(h.dir, "state.db")
			for _, s := range []string{"-wal", "-shm"} {
				_ = os.Remove(db + s)
			}
			if err := damage(db); err != nil {
				t.Fatal(err)
			}
			_, errs, code := h.all("ps")
			if code != 125 || !strings.Contains(errs, "doctor --fix") {
				t.Errorf("ps: exit code %d: %s", code, errs)
			}
			h.try("doctor", "--fix")
			h.noneLeft("after doctor --fix")
			h.run("ps", "-a")
			if m, _ := filepath.Glob(db + ".damaged-*"); len(m) == 0 {
				t.Error("the damaged database was not kept")
			}
			h.run("prune")
		})
	}
}

// TestOrphans: files and half-removed boxes without a record are found and freed. L17.
func TestOrphans(t *testing.T) {
	h := newHome(t)
	h.run("ps")
	id := strings.Repeat("ab", 16)
	for _, d := range []string{"boxes/" + id + "/state", "trash/" + id + "-0", "volumes/" + id} {
		if err := os.MkdirAll(filepath.Join(h.dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	out, _ := h.try("doctor")
	if !strings.Contains(out, "leftover") {
		t.Errorf("doctor says nothing of it:\n%s", out)
	}
	h.run("prune")
	for _, d := range []string{"boxes/" + id, "trash/" + id + "-0", "volumes/" + id} {
		if _, err := os.Stat(filepath.Join(h.dir, d)); err == nil {
			t.Errorf("%s is still there", d)
		}
	}
}

// TestAnonymousVolumes: kept by rm, removed by rm -v and --rm. L18.
func TestAnonymousVolumes(t *testing.T) {
	h := newHome(t)
	volumes := func() int {
		m, _ := filepath.Glob(filepath.Join(h.dir, "volumes", "*", "*"))
		return len(m)
	}
	h.run("run", "--name", "b", "-v", "/data", "base", "sh", "-c", "echo x > /data/f")
	if volumes() != 1 {
		t.Fatalf("%d volumes", volumes())
	}
	h.run("rm", "b")
	if volumes() != 1 {
		t.Error("rm without -v removed the volume")
	}
	h.run("prune")
	h.run("run", "--rm", "-v", "/data", "base", "true")
	h.run("create", "--name", "c", "-v", "/data", "base", "true")
	h.run("rm", "-v", "c")
	if volumes() != 0 {
		t.Errorf("%d volumes left", volumes())
	}
}

// TestLongHome: a state directory whose path is longer than a socket's may be works. L19.
func TestLongHome(t *testing.T) {
	h := newHome(t)
	deep := filepath.Join(h.dir, strings.Repeat("d", 120))
	long := &home{t: t, bin: h.bin, dir: deep}
	t.Cleanup(func() { long.try("rm", "-f", "b") })
	long.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	if got := long.run("exec", "b", "echo", "hi"); got != "hi" {
		t.Errorf("exec: %q", got)
	}
	long.run("rm", "-f", "b")
	long.noneLeft("after rm -f")
}

// TestRemovePolicyOfKilledShim: --rm is on record; whoever looks next carries it out when the supervisor was killed. L22.
func TestRemovePolicyOfKilledShim(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--rm", "--name", "b", "base", "sleep", "1000")
	if err := syscall.Kill(h.role("b", "shim"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "the box is removed", func() bool { return h.run("ps", "-aq") == "" })
	h.noneLeft("after ps")
}

// TestRestartPolicy: on-failure restarts so often and no more, and a stop ends it.
func TestRestartPolicy(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "f", "--restart", "on-failure:2", "base", "sh", "-c", "echo run; exit 3")
	until(t, "it has given up", func() bool { return h.field("f", "{{.Status}} {{.RestartCount}}") == "stopped 2" })
	if got := strings.Count(h.run("logs", "f"), "run"); got != 3 {
		t.Errorf("%d runs", got)
	}
	h.run("run", "-d", "--name", "a", "--restart", "always", "base", "sleep", "0.2")
	until(t, "it was restarted", func() bool { return h.number("a", "{{.Generation}}") > 1 })
	h.run("stop", "a")
	h.noneLeft("after stop")
	if got := h.field("a", "{{.Status}}"); got != "stopped" {
		t.Errorf("status %s", got)
	}
}

// TestTimeout: --timeout ends the box and says so.
func TestTimeout(t *testing.T) {
	h := newHome(t)
	if _, _, code := h.all("run", "--name", "b", "--timeout", "500ms", "base", "sleep", "1000"); code == 0 {
		t.Error("exit code 0")
	}
	if got := h.field("b", "{{.Reason}} {{.ExitCode}}"); got != "timeout 124" {
		t.Errorf("ended with %s", got)
	}
	h.noneLeft("after the timeout")
}

// TestOOM: a box killed for its memory limit says so.
func TestOOM(t *testing.T) {
	h := newHome(t)
	_, errs, code := h.all("run", "--name", "b", "--memory", "64m", "base", "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=400")
	if code == 125 && strings.Contains(errs, "cannot enforce") {
		t.Skipf("this host gives no memory limits: %s", strings.TrimSpace(errs))
	}
	if got := h.field("b", "{{.OOMKilled}} {{.Reason}}"); got != "true oom" {
		t.Errorf("%s (exit code %d: %s)", got, code, errs)
	}
	h.noneLeft("after the kill")
}

// TestReadOnlyHome: a home that cannot be written to is named with the next step.
func TestReadOnlyHome(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root writes everywhere; this runs as an ordinary user")
	}
	h := newHome(t)
	ro := filepath.Join(h.dir, "ro")
	if err := os.Mkdir(ro, 0o500); err != nil {
		t.Fatal(err)
	}
	long := &home{t: t, bin: h.bin, dir: filepath.Join(ro, "home")}
	if _, errs, code := long.all("ps"); code != 125 || !strings.Contains(errs, "COFFER_HOME") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}
