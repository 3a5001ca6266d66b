package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// TestSignalsToFirst: root of a box cannot end it by a signal to its first process, as on Linux, and other processes are not shielded.
// (Of SIGKILL gVisor shields no process; nothing in a box can.)
func TestSignalsToFirst(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	for n := 1; n <= 64; n++ {
		if n == int(syscall.SIGKILL) || n == int(syscall.SIGSTOP) || n >= 32 && n <= 34 {
			continue // the last three are the C library's own, which Go's runtime leaves alone
		}
		// A stopped agent would not answer the second one.
		_, errs, code := h.all("exec", "b", "sh", "-c", fmt.Sprintf("kill -%d 1 && exec sleep 0.01", n))
		if got := h.field("b", "{{.Status}}"); code != 0 || got != "running" {
			t.Fatalf("after signal %d to process 1 (code %d: %s) the box is %s", n, code, errs, got)
		}
	}
	for _, sig := range []string{"TERM", "HUP"} {
		if _, code := h.try("exec", "b", "sh", "-c", "kill -"+sig+" $$; sleep 1000"); code < 128 {
			t.Errorf("a process that sends itself SIG%s has code %d", sig, code)
		}
	}
	h.run("rm", "-f", "b")
}

// TestTimeoutWithoutProc: a process ends with its time though the box has no /proc to find it in.
func TestTimeoutWithoutProc(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "umount", "/proc")
	if _, errs, code := h.all("exec", "--timeout", "1s", "b", "sh", "-c", "sleep 1001 & (sleep 1002; :) & sleep 1003"); code == 0 {
		t.Errorf("code %d: %s", code, errs)
	}
	if top := h.run("top", "b"); !strings.Contains(top, "sleep 1000") || strings.Contains(top, "1003") ||
		strings.Contains(top, "1002") || strings.Contains(top, "1001") {
		t.Errorf("runs:\n%s", top)
	}
	h.run("rm", "-f", "b")
}

// TestMainNumber: the main process has the same number after every start. A program that was killed finds its own in the file that it
// left, and not that of another process.
func TestMainNumber(t *testing.T) {
	h := newHome(t)
	h.run("create", "--name", "b", "base", "sh", "-c", "echo $$")
	want := h.run("start", "-a", "b")
	for range 9 {
		if got := h.run("start", "-a", "b"); got != want {
			t.Errorf("its number was %s and is %s", want, got)
		}
	}
}
