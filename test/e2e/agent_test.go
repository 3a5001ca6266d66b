package e2e

import (
	"strings"
	"testing"
)

// TestSignalsToFirst: root of a box cannot end it by a signal to its first process, as on Linux, and other processes are not shielded.
// (Of SIGKILL gVisor shields no process; nothing in a box can.)
func TestSignalsToFirst(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	for _, sig := range []string{"TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "ABRT", "ALRM", "SEGV"} {
		h.try("exec", "b", "kill", "-"+sig, "1")
		if got := h.field("b", "{{.Status}}"); got != "running" {
			t.Fatalf("after SIG%s to process 1 the box is %s", sig, got)
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
