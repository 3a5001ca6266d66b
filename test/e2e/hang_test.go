package e2e

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ends waits for a command, and fails where it never ends.
func ends(t *testing.T, c *exec.Cmd) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	select {
	case err := <-done:
		var ee *exec.ExitError
		if err != nil && !errors.As(err, &ee) {
			t.Fatal(err)
		}
		return c.ProcessState.ExitCode()
	case <-time.After(30 * time.Second):
		_ = c.Process.Kill()
		<-done
		t.Fatalf("%v never ended", c.Args[1:])
		return 0
	}
}

// insist interrupts a command twice, and again while it does not end: on a busy host it may see two signals as one.
func insist(t *testing.T, c *exec.Cmd) int {
	t.Helper()
	signal(t, c, syscall.SIGINT, syscall.SIGINT)
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(2 * time.Second):
				_ = c.Process.Signal(syscall.SIGINT)
			}
		}
	}()
	return ends(t, c)
}

// started starts a command and returns when it has printed its first line.
func (h *home) started(args ...string) *exec.Cmd {
	h.t.Helper()
	c := h.cmd(args...)
	out, err := c.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		h.t.Fatal(line, err)
	}
	return c
}

func signal(t *testing.T, c *exec.Cmd, sigs ...syscall.Signal) {
	t.Helper()
	for _, s := range sigs {
		if err := c.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond) // two at once may arrive as one
	}
}

// TestStoppedAgent: a box that stops its own agent holds nobody: a command's time limit is kept, and what waits for it can be interrupted.
func TestStoppedAgent(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	running := h.started("exec", "b", "sh", "-c", "echo on; sleep 1000")
	limited := h.started("exec", "--timeout", "3s", "b", "sh", "-c", "echo on; sleep 1000")
	stopper := h.started("exec", "b", "sh", "-c", "echo on; sleep 1; kill -STOP 1")
	until(t, "the agent answers no more", func() bool {
		c := h.cmd("top", "b")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		late := time.AfterFunc(5*time.Second, func() { _ = c.Process.Kill() })
		defer late.Stop()
		return c.Wait() != nil
	})
	if _, code := h.try("exec", "--timeout", "100ms", "b", "true"); code != 124 {
		t.Errorf("a command with a time limit: exit code %d", code)
	}
	if code := ends(t, limited); code != 124 {
		t.Errorf("one that ran before: exit code %d", code)
	}
	for what, c := range map[string]*exec.Cmd{"running": running, "stopping": stopper} {
		if code := insist(t, c); code != 130 {
			t.Errorf("%s, interrupted twice: exit code %d", what, code)
		}
	}
	waits := h.cmd("exec", "b", "true")
	if err := waits.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // at whatever moment this is
	signal(t, waits, syscall.SIGTERM)
	if code := ends(t, waits); code != 130 {
		t.Errorf("waiting for the start, interrupted: exit code %d", code)
	}
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}

// TestForegroundRestart: a box that runs again and again does not keep the command that started it.
func TestForegroundRestart(t *testing.T) {
	h := newHome(t)
	c := h.cmd("run", "--name", "b", "--restart", "always", "base", "sh", "-c", "exit 3")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if code := ends(t, c); code != 3 {
		t.Errorf("exit code %d", code)
	}
	until(t, "it runs again", func() bool { return h.field("b", "{{.RestartCount}}") != "0" })
	h.run("rm", "-f", "b")
}

// TestInterruptedStart: an interrupted run leaves no box half started.
func TestInterruptedStart(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "base", "true") // everything is unpacked
	for i := range 8 {
		c := h.cmd("run", "--rm", "base", "sleep", "1000")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(20+i*30) * time.Millisecond) // a different moment each time, none of them judged
		signal(t, c, syscall.SIGTERM)
		ends(t, c)
		until(t, "nothing is left", func() bool { return len(h.left()) == 0 && h.run("ps", "-aq") == "" })
	}
}

// TestInterruptedWait: a start that is interrupted while another command works on the box ends nothing that it has not started.
func TestInterruptedWait(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	lock := filepath.Join(h.dir, "boxes", id, "op.lock")
	f, err := os.OpenFile(lock, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		t.Fatal(err)
	}
	c := h.cmd("start", "-a", "b")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // it has come to the lock; where not, this proves less
	signal(t, c, syscall.SIGTERM)
	time.Sleep(300 * time.Millisecond) // where it waits for the lock to end the box, it gets it now
	f.Close()
	ends(t, c)
	if got := h.run("exec", "b", "echo", "alive"); got != "alive" {
		t.Errorf("exec: %q", got)
	}
	h.run("rm", "-f", "b")
	h.noneLeft("after rm -f")
}

// TestSecondSignal: a command that is busy with what does not end, a pipe that nobody writes here, is ended by a second signal.
func TestSecondSignal(t *testing.T) {
	h := newHome(t)
	h.run("ps")
	never := filepath.Join(h.dir, "pipe")
	if err := syscall.Mkfifo(never, 0o600); err != nil {
		t.Fatal(err)
	}
	c := h.cmd("create", "--env-file", never, "base")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var pipe *os.File
	until(t, "it reads the pipe", func() bool {
		var err error
		pipe, err = os.OpenFile(never, os.O_WRONLY|syscall.O_NONBLOCK, 0)
		return err == nil
	})
	defer pipe.Close()
	insist(t, c)
}
