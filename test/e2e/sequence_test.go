package e2e

import (
	"bytes"
	"context"
	"database/sql"
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

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/test/observer"
)

// phases follows the record of a home's only box from outside.
type phases struct {
	t  *testing.T
	db *sql.DB
}

func (h *home) phases() *phases {
	h.t.Helper()
	db := h.records("ro")
	h.t.Cleanup(func() { db.Close() })
	return &phases{t: h.t, db: db}
}

// now is the phase on record; empty: there is no box.
func (p *phases) now() string {
	var s string
	if err := p.db.QueryRow("SELECT phase FROM boxes").Scan(&s); err != nil {
		return ""
	}
	return s
}

// converged sees that whatever was cut off, one command later the home is in order: at most one instance lives, and exactly one where
// the box is said to run.
func (h *home) converged(box string) {
	h.t.Helper()
	if _, errs, code := h.all("ps", "-a"); code != 0 {
		h.t.Fatalf("ps -a: exit code %d: %s", code, errs)
	}
	until(h.t, "record and processes agree", func() bool {
		status, _ := h.try("inspect", "-f", "{{.Status}}", box)
		n := len(h.jails())
		if n > 1 {
			h.t.Fatalf("%d instances live: %s", n, pids(h.live()))
		}
		switch strings.TrimSpace(status) {
		case "running":
			return n == 1
		case "created", "stopped", "failed", "":
			return len(h.left()) == 0
		}
		return false
	})
}

// jails lists the first processes of this home's jails: one for each instance.
func (h *home) jails() []observer.Process {
	return slices.DeleteFunc(h.live(), func(p observer.Process) bool { return !isJail(p.PID) })
}

func isJail(pid int) bool {
	cmd, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return err == nil && bytes.HasPrefix(cmd, []byte("coffer-init"))
}

// next runs the command that comes after something was killed, and sees that it does what it says.
func (h *home) next(verb string, kept bool) {
	h.t.Helper()
	args := map[string][]string{
		"ps": {"ps", "-a"}, "start": {"start", "b"}, "stop": {"stop", "-t", "1", "b"}, "rm": {"rm", "-f", "b"}, "exec": {"exec", "b", "true"},
	}[verb]
	_, errs, code := h.all(args...)
	gone := strings.Contains(errs, "no such box")
	if code != 0 && !gone && verb != "exec" {
		h.t.Fatalf("%s: exit code %d: %s", verb, code, errs)
	}
	switch {
	case verb == "start" && !gone:
		if n := len(h.jails()); n != 1 {
			h.t.Fatalf("after start %d instances live: %s", n, pids(h.live()))
		}
		if kept {
			if got := h.run("exec", "b", "cat", "/root/kept"); got != "kept" {
				h.t.Errorf("the file in the box: %q", got)
			}
		}
	case verb == "stop" && !gone, verb == "rm":
		h.noneLeft("after " + verb)
	}
	h.converged("b")
	if verb == "rm" {
		h.noBoxes()
		return
	}
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}

// TestKilledCommandAtEachStep kills the command line with SIGKILL when a given step is on record; whatever command comes next
// converges: it never resets, and never starts a second instance. L26.
func TestKilledCommandAtEachStep(t *testing.T) {
	box := []string{"--name", "b", "--stop-signal", "WINCH", "--stop-timeout", "1", "base", "sleep", "1000"}
	for _, step := range []struct {
		name    string
		begin   string // how far the box is before
		args    []string
		phase   string
		keeping bool // the files that were there must be there afterwards
	}{
		{"create", "", append([]string{"create"}, box...), "creating", false},
		{"run", "", append([]string{"run", "-d"}, box...), "starting", false},
		{"run attached", "", append([]string{"run"}, box...), "starting", false},
		{"start", "stopped", []string{"start", "b"}, "starting", true},
		{"exec", "running", []string{"exec", "b", "sleep", "777"}, "running", true},
		{"stop", "running", []string{"stop", "-t", "1", "b"}, "stopping", true},
		{"restart", "running", []string{"restart", "-t", "1", "b"}, "starting", true},
		{"rm", "running", []string{"rm", "-f", "b"}, "removing", false},
	} {
		t.Run(strings.ReplaceAll(step.name, " ", "-"), func(t *testing.T) {
			h := newHome(t)
			h.run("run", "--rm", "base", "true") // everything is unpacked
			p := h.phases()
			hits := 0
			for _, verb := range []string{"ps", "start", "stop", "rm", "exec"} {
				if step.begin != "" {
					h.run(append([]string{"run", "-d"}, box...)...)
					h.run("exec", "b", "sh", "-c", "echo kept > /root/kept; sync")
				}
				if step.begin == "stopped" {
					h.run("stop", "-t", "0", "b")
				}
				c := h.cmd(step.args...)
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				ended := make(chan struct{})
				go func() { _ = c.Wait(); close(ended) }()
				if step.name == "exec" {
					until(t, "the command runs in the box", func() bool { out, _ := h.try("top", "b"); return strings.Contains(out, "777") })
				}
				for over := false; !over && p.now() != step.phase; {
					select {
					case <-ended:
						over = true
					default:
					}
				}
				_ = c.Process.Kill()
				<-ended
				if !c.ProcessState.Exited() {
					hits++
				}
				h.next(verb, step.keeping)
			}
			t.Logf("killed at that step %d times of 5", hits)
			if hits == 0 {
				t.Skip("the command was always faster than its record could be seen on this host")
			}
		})
	}
}

// TestKilledTreeAtEachStep kills each process of the tree while the box starts and while it stops. The command that is at it must
// not hang and must not claim what is not so; the next one converges. L26.
func TestKilledTreeAtEachStep(t *testing.T) {
	marks := map[string]string{"shim": "_shim", "init": "coffer-init", "sentry": "coffer-sentry"}
	for _, phase := range []string{"starting", "stopping", "removing"} {
		for role, mark := range marks {
			t.Run(phase+"/"+role, func(t *testing.T) {
				h := newHome(t)
				h.run("run", "--rm", "base", "true")
				p := h.phases()
				hits := 0
				for _, verb := range []string{"ps", "start", "rm"} {
					h.run("create", "--name", "b", "--stop-signal", "WINCH", "--stop-timeout", "1", "base", "sleep", "1000")
					args := []string{"start", "b"}
					switch phase {
					case "stopping":
						h.run("start", "b")
						args = []string{"stop", "-t", "1", "b"}
					case "removing":
						h.run("start", "b")
						args = []string{"rm", "-f", "b"}
					}
					pid := 0
					if phase != "starting" {
						pid = h.role("b", role) // what follows is over before it could be looked for
					}
					c := h.cmd(args...)
					if err := c.Start(); err != nil {
						t.Fatal(err)
					}
					ended := make(chan struct{})
					go func() { _ = c.Wait(); close(ended) }()
					for over := false; !over; {
						select {
						case <-ended:
							over = true
						default:
						}
						if p.now() != phase {
							continue
						}
						if pid == 0 {
							pid = h.find(mark)
						}
						if pid != 0 && syscall.Kill(pid, syscall.SIGKILL) == nil {
							hits++
							break
						}
					}
					<-ended // a command that hangs is ended by the test's time limit, and fails it
					if code := c.ProcessState.ExitCode(); code == 0 && phase != "starting" {
						h.noneLeft("after the command said so")
					}
					h.next(verb, false)
				}
				t.Logf("killed at that step %d times of 3", hits)
				if hits == 0 {
					t.Skip("the step was always over before the process could be found on this host")
				}
			})
		}
	}
}

// TestKilledTreeDuringExec kills each process of the tree under a command in the box and under a copy of files: neither hangs, and
// neither claims success. L21, L26.
func TestKilledTreeDuringExec(t *testing.T) {
	for _, role := range []string{"shim", "init", "sentry"} {
		for name, args := range map[string][]string{"exec": {"exec", "b", "sleep", "777"}, "cp": {"cp", "b:/dev/zero", "-"}} {
			t.Run(role+"/"+name, func(t *testing.T) {
				h := newHome(t)
				h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
				if name == "cp" {
					h.run("exec", "b", "dd", "if=/dev/zero", "of=/root/big", "bs=1048576", "count=0", "seek=1000000")
					args = []string{"cp", "b:/root/big", "-"} // sparse, and a terabyte for whoever reads it
				}
				c := h.cmd(args...)
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				if name == "exec" {
					until(t, "the command runs in the box", func() bool { return strings.Contains(h.run("top", "b"), "777") })
				}
				if err := syscall.Kill(h.role("b", role), syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if err := c.Wait(); err == nil {
					t.Error("it claims to have succeeded")
				}
				h.next("start", false)
			})
		}
	}
}

// TestKilledVisit kills the command that copies a file of a box that does not run, and each process that it starts for that. The box
// stays what it was, and the next command finds nothing left or ends it. L26.
func TestKilledVisit(t *testing.T) {
	h := newHome(t)
	h.run("run", "--name", "b", "base", "dd", "if=/dev/zero", "of=/root/big", "bs=1048576", "count=0", "seek=1000000")
	for role, mark := range map[string]string{"command": "", "shim": "_shim", "init": "coffer-init", "sentry": "coffer-sentry"} {
		for _, next := range [][]string{{"ps", "-a"}, {"start", "-a", "b"}, {"stop", "b"}} {
			t.Run(role+"/"+next[0], func(t *testing.T) {
				c := h.cmd("cp", "b:/root/big", "-")
				if err := c.Start(); err != nil {
					t.Fatal(err)
				}
				until(t, "the box's kernel runs", func() bool { return h.find("coffer-sentry") != 0 })
				if out := h.run("ps", "-a", "--format", "{{.Status}}"); out != "stopped" {
					t.Errorf("meanwhile ps says %s", out)
				}
				pid := c.Process.Pid
				if mark != "" {
					pid = h.find(mark)
				}
				_ = syscall.Kill(pid, syscall.SIGKILL)
				if err := c.Wait(); err == nil {
					t.Error("it claims to have succeeded")
				}
				h.run(next...)
				if next[0] == "ps" {
					until(t, "what was opened is gone", func() bool { h.run("ps"); return len(h.left()) == 0 })
				}
				h.noneLeft("after " + next[0])
				if got := h.field("b", "{{.Status}} {{.ExitCode}}"); got != "stopped 0" {
					t.Errorf("the box is %s", got)
				}
			})
		}
	}
	h.run("rm", "b")
}

// find is a process of this home by a word of its command line; 0: none.
func (h *home) find(mark string) int {
	instance := h.instance()
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmd, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || !bytes.Contains(cmd, []byte(mark)) || !bytes.Contains(cmd, []byte(instance)) && !bytes.Contains(cmd, []byte(h.dir)) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(d))
		return pid
	}
	return 0
}

// TestKilledEverything: what the guest had synced survives SIGKILL of every process at once, and the box starts again.
func TestKilledEverything(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	for i := range 3 {
		h.run("exec", "b", "sh", "-c", fmt.Sprintf("mkdir -p /root/d%d && seq 20000 > /root/d%d/f && sync", i, i))
		for _, p := range h.live() {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		h.converged("b")
		h.run("start", "b")
		for n := range i + 1 {
			if got := h.run("exec", "b", "sh", "-c", fmt.Sprintf("seq 20000 | cmp - /root/d%d/f && echo same", n)); got != "same" {
				t.Errorf("after kill %d, file %d: %s", i, n, got)
			}
		}
	}
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}

// TestRestartPolicyOfKilledShim: --restart is on record; whoever looks next carries it out when the shim was killed. A box that a user
// stopped stays stopped, and the bound on restarts holds.
func TestRestartPolicyOfKilledShim(t *testing.T) {
	h := newHome(t)
	kill := func() {
		t.Helper()
		if err := syscall.Kill(h.role("b", "shim"), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		until(t, "its tree is gone", func() bool { return len(h.live()) == 0 })
	}
	h.run("run", "-d", "--name", "b", "--restart", "on-failure:1", "base", "sleep", "1000")
	kill()
	if out := h.run("ps", "--format", "{{.Name}} {{.Generation}} {{.RestartCount}}"); out != "b 2 1" {
		t.Errorf("after the kill ps says %q", out)
	}
	h.run("exec", "b", "true")
	kill()
	if got := h.field("b", "{{.Status}} {{.Reason}} {{.RestartCount}}"); got != "stopped lost 1" {
		t.Errorf("after the second kill: %s", got)
	}
	h.noneLeft("after the last restart")
	h.run("rm", "b")

	h.run("run", "-d", "--name", "b", "--restart", "always", "base", "sleep", "1000")
	kill()
	h.run("exec", "b", "true") // looks, and so restarts
	kill()
	h.run("stop", "b")
	h.noneLeft("after stop")
	if got := h.field("b", "{{.Status}}"); got != "stopped" {
		t.Errorf("after stop: %s", got)
	}
}

// TestTimeoutOfKilledShim: the box ends with its shim, so a timeout has nothing left to bound, and the record says what was lost.
func TestTimeoutOfKilledShim(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--timeout", "10m", "base", "sleep", "1000")
	if err := syscall.Kill(h.role("b", "shim"), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	until(t, "its tree is gone", func() bool { return len(h.live()) == 0 })
	if got := h.field("b", "{{.Status}} {{.Reason}} {{.ExitCode}}"); got != "stopped lost 137" {
		t.Errorf("ended with %s", got)
	}
	h.noneLeft("after a look")
}

// TestConcurrentRemove: several processes create, start, stop and remove one name at once; there never are two instances, and at the
// end nothing.
func TestConcurrentRemove(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "base", "true")
	stop := make(chan struct{})
	var watch, wg sync.WaitGroup
	worst := 0
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			// One after the other is no sight of both: those count that are there when all have been seen.
			seen := h.jails()
			seen = slices.DeleteFunc(seen, func(p observer.Process) bool { return !isJail(p.PID) })
			worst = max(worst, len(seen))
		}
	})
	ran := make([]bool, 12)
	for i := range ran {
		wg.Go(func() {
			verb := [][]string{{"run", "-d", "--name", "b", "base", "sleep", "1000"}, {"start", "b"}, {"stop", "-t", "0", "b"}, {"rm", "-f", "b"}}[i%4]
			_, errs, code := h.all(verb...)
			ran[i] = i%4 == 0 && code == 0
			// Somebody else may have the name, or have removed the box; nothing else may go wrong.
			if code != 0 && !strings.Contains(errs, "no such box") && !strings.Contains(errs, "already exists") {
				t.Errorf("%v: exit code %d: %s", verb, code, errs)
			}
		})
	}
	wg.Wait()
	if !slices.Contains(ran, true) {
		t.Error("no box ever ran")
	}
	close(stop)
	watch.Wait()
	if worst > 1 {
		t.Errorf("%d instances lived at once", worst)
	}
	h.converged("b")
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
	h.run("doctor")
}

// TestTwenty: twenty boxes started at once all come up, and one command removes them all.
func TestTwenty(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "base", "true")
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if _, errs, code := h.all("run", "-d", "--name", fmt.Sprintf("b%d", i), "base", "sleep", "1000"); code != 0 {
				t.Errorf("box %d: exit code %d: %s", i, code, errs)
			}
		})
	}
	wg.Wait()
	ids := strings.Fields(h.run("ps", "-q"))
	if len(ids) != 20 || len(h.jails()) != 20 {
		t.Errorf("%d boxes run by record, %d by their processes", len(ids), len(h.jails()))
	}
	h.run("exec", "b7", "true")
	h.run(append([]string{"rm", "-f"}, ids...)...)
	h.noneLeft("after rm -f")
}

// TestDamagedRecord: one bad record hides no other box, and its own box can be ended and removed.
func TestDamagedRecord(t *testing.T) {
	for name, damage := range map[string]string{
		"no JSON":       "data = 'garbage'",
		"cut off":       "data = substr(data, 1, 40)",
		"empty":         "data = ''",
		"unknown phase": `data = replace(data, '"Phase":"running"', '"Phase":"levitating"'), phase = 'levitating'`,
		"another's":     `data = replace(data, '"ID":"', '"ID":"0')`,
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			h := newHome(t)
			h.run("run", "-d", "--name", "good", "base", "sleep", "1000")
			h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
			h.change("UPDATE boxes SET " + damage + " WHERE name = 'b'")
			if out := h.run("ps", "-a", "--format", "{{.Name}}"); out != "b\ngood" && out != "good\nb" {
				t.Errorf("ps -a: %q", out)
			}
			h.run("stop", "-t", "1", "b")
			if n := len(h.jails()); n != 1 {
				t.Errorf("%d instances after stop, want the good one: %s", n, pids(h.live()))
			}
			if _, errs, code := h.all("start", "b"); code != 125 || !strings.Contains(errs, "record is damaged") {
				t.Errorf("start: exit code %d: %s", code, errs)
			}
			h.run("rm", "-f", "b")
			h.run("exec", "good", "true")
			h.run("rm", "-f", "good")
			h.noneLeft("after rm -f")
		})
	}
}

// inDisk names, in a test program that was started by [onOwnDisk], the directory of the small disk.
const inDisk = "COFFER_TEST_DISK"

// onOwnDisk runs the calling test once more in a mount namespace of its own, where a small file system in memory is mounted, and
// returns its directory in that second run. In the first it returns "".
func onOwnDisk(t *testing.T, size string) string {
	t.Helper()
	if dir := os.Getenv(inDisk); dir != "" {
		return dir
	}
	if os.Geteuid() != 0 {
		t.Skip("mounting a small disk needs root")
	}
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	script := `mount -t tmpfs -o size=` + size + `,mode=755 tmpfs "$1" && shift && exec "$@"`
	c := exec.CommandContext(ctx, "sh", "-c", script, "sh", dir, "/proc/self/exe", "-test.v", "-test.run", "^"+t.Name()+"$")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Args[5] = self
	c.Env = append(os.Environ(), inDisk+"="+dir, "COFFER_BIN="+binary(t))
	// Unshareflags, unlike Cloneflags, also keeps the mount from spreading to the host's namespace.
	c.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	out, err := c.CombinedOutput()
	if bytes.Contains(out, []byte("mount:")) {
		t.Skipf("no disk can be mounted here: %s", out)
	}
	if err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
	return ""
}

// homeOn makes a home below a directory.
func homeOn(t *testing.T, dir string) *home {
	t.Helper()
	h := newHome(t)
	h.dir = filepath.Join(dir, "home")
	t.Cleanup(func() {
		h.try("rm", "-f", "-v", "b")
		h.noneLeft("at the end")
	})
	return h
}

// TestFullDisk: on a full disk nothing is lost, what fails says why, and boxes can still be stopped and removed.
func TestFullDisk(t *testing.T) {
	dir := onOwnDisk(t, "160m")
	if dir == "" {
		return
	}
	h := homeOn(t, dir)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "echo kept > /root/kept; sync")
	rootfs := t.TempDir()
	for _, name := range []string{"one", "two", "three"} {
		if err := os.WriteFile(filepath.Join(rootfs, "name"), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		h.run("import", rootfs, name)
	}
	fill := filepath.Join(dir, "fill")
	full := func() {
		t.Helper()
		f, err := os.OpenFile(fill, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for size := 1 << 20; size > 0; {
			if _, err := f.Write(make([]byte, size)); err != nil {
				size /= 16
			}
		}
	}
	full()
	_, errs, code := h.all("run", "-d", "--name", "c", "base", "sleep", "1000")
	if code != 125 || !strings.Contains(errs, "no space left") {
		t.Errorf("run on a full disk: exit code %d: %s", code, errs)
	}
	if n := len(h.jails()); n != 1 {
		t.Errorf("%d instances after the failed run: %s", n, pids(h.live()))
	}
	if out, _, code := h.all("exec", "b", "cat", "/root/kept"); code != 0 || out != "kept\n" {
		t.Errorf("exec on a full disk: exit code %d: %q", code, out)
	}
	if _, errs, code := h.all("exec", "b", "dd", "if=/dev/zero", "of=/root/big", "bs=65536", "count=10"); code == 0 || !strings.Contains(errs, "no space left") {
		t.Errorf("writing in the box: exit code %d: %s", code, errs)
	}
	h.run("ps", "-a")
	full()
	h.run("rmi", "one")
	full()
	h.run("rmi", "two")
	full()
	h.run("stop", "-t", "1", "b")
	h.noneLeft("after stop on a full disk")
	full()
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	h.run("start", "b")
	if got := h.run("exec", "b", "cat", "/root/kept"); got != "kept" {
		t.Errorf("the file in the box: %q", got)
	}
	full()
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f on a full disk")
	h.try("rm", "-f", "c")
	full()
	h.run("prune", "-a", "-f")
	if out := h.run("images", "-q"); out != "" {
		t.Errorf("images left: %s", out)
	}
	h.noBoxes()
}

// TestReadOnlyDisk: while the home's disk is read-only every command that would write says so, and nothing is lost.
func TestReadOnlyDisk(t *testing.T) {
	dir := onOwnDisk(t, "160m")
	if dir == "" {
		return
	}
	h := homeOn(t, dir)
	h.run("run", "--name", "b", "base", "sh", "-c", "echo kept > /root/kept; sync")
	remount := func(flags uintptr) {
		t.Helper()
		// A process that is over for everybody else may not have given back its last file.
		until(t, "the disk can be remounted", func() bool {
			err := unix.Mount("", dir, "", unix.MS_REMOUNT|flags, "size=160m")
			if err != nil && err != unix.EBUSY {
				t.Fatal(err)
			}
			return err == nil
		})
	}
	remount(unix.MS_RDONLY)
	for _, args := range [][]string{{"start", "b"}, {"rm", "-f", "b"}, {"run", "--rm", "base", "true"}} {
		_, errs, code := h.all(args...)
		if code != 125 || !strings.Contains(errs, "COFFER_HOME") || strings.Count(errs, "\n") != 1 {
			t.Errorf("coffer %v: exit code %d: %s", args, code, errs)
		}
	}
	h.noneLeft("on a read-only disk")
	remount(0)
	h.run("start", "-a", "b")
	if out := h.run("ps", "-a", "--format", "{{.Name}} {{.Generation}}"); out != "b 2" {
		t.Errorf("after the disk is writable again: %s", out)
	}
	h.run("rm", "b")
}
