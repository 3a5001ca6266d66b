package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// screen is a terminal, and what was put out on it.
type screen struct {
	t      *testing.T
	keys   *os.File
	tty    *os.File
	mu     sync.Mutex
	output bytes.Buffer
}

func newScreen(t *testing.T) *screen {
	t.Helper()
	keys, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	s := &screen{t: t, keys: keys, tty: tty}
	t.Cleanup(func() { tty.Close(); keys.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := keys.Read(buf)
			s.mu.Lock()
			s.output.Write(buf[:n])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *screen) mode() unix.Termios {
	s.t.Helper()
	m, err := unix.IoctlGetTermios(int(s.tty.Fd()), unix.TCGETS)
	if err != nil {
		s.t.Fatal(err)
	}
	return *m
}

func (s *screen) start(c *exec.Cmd) {
	s.t.Helper()
	c.Stdin, c.Stdout, c.Stderr = s.tty, s.tty, s.tty
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
}

// types types, and waits until the output has what is expected of that.
func (s *screen) types(text, expect string) {
	s.t.Helper()
	if _, err := s.keys.WriteString(text); err != nil {
		s.t.Fatal(err)
	}
	defer func() {
		if s.t.Failed() {
			s.t.Logf("%q", s.output.String())
		}
	}()
	until(s.t, "output "+expect, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return bytes.Contains(s.output.Bytes(), []byte(expect))
	})
}

// TestDetachKeys: the keys let go of a box, that runs on with its input open, and the terminal is as it was.
func TestDetachKeys(t *testing.T) {
	h := newHome(t)
	s := newScreen(t)
	before := s.mode()
	detach := func(c *exec.Cmd, keys string) {
		t.Helper()
		s.types(keys, "")
		if code := ends(t, c); code != 0 {
			t.Errorf("%v: exit code %d", c.Args[1:], code)
		}
		if got := h.field("b", "{{.Status}}"); got != "running" {
			t.Errorf("after %v the box is %s", c.Args[1:], got)
		}
		if d := cmp.Diff(before, s.mode()); d != "" {
			t.Errorf("after %v the terminal is another: %s", c.Args[1:], d)
		}
	}
	c := h.cmd("run", "-it", "--name", "b", "base", "sh")
	s.start(c)
	s.types("echo on$((1+1))e\n", "on2e")
	s.types("\x10echo t$((1+1))o\n", "t2o") // the first of the keys alone is input like any other
	detach(c, "\x10\x11")
	c = h.cmd("attach", "--detach-keys", "x,ctrl-y", "b")
	s.start(c)
	s.types("echo th$((1+1))ee\n", "th2ee")
	detach(c, "x\x19")
	h.run("stop", "-t", "0", "b")
	c = h.cmd("start", "-ai", "b")
	s.start(c)
	s.types("echo f$((1+1))ur\n", "f2ur")
	detach(c, "\x10\x11")
	h.run("rm", "-f", "b")
}
