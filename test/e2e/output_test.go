package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// leftBut is what the observer sees of this home, but for a command that the test itself still has.
func (h *home) leftBut(c *exec.Cmd) []string {
	return slices.DeleteFunc(h.left(), func(s string) bool { return strings.HasPrefix(s, fmt.Sprintf("process %d ", c.Process.Pid)) })
}

func numbers(n int) []byte {
	var b bytes.Buffer
	for i := range n {
		fmt.Fprintln(&b, i+1)
	}
	return b.Bytes()
}

// TestSlowReader: a reader that comes later than the box's end gets all of its output and the exit code, and neither the end nor what
// is to follow it waits for that reader.
func TestSlowReader(t *testing.T) {
	h := newHome(t)
	for name, c := range map[string]struct {
		args []string
		code int
		want []byte // nil: as much as there is room for
	}{
		"exited":  {[]string{"run", "--rm", "--name", "b", "base", "sh", "-c", "seq 1 200000; exit 3"}, 3, numbers(200_000)},
		"timeout": {[]string{"run", "--rm", "--name", "b", "--timeout", "2s", "--stop-timeout", "1", "base", "yes"}, 124, nil},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := h.cmd(c.args...)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			first := make([]byte, 1)
			if _, err := io.ReadFull(out, first); err != nil {
				t.Fatal(err)
			}
			until(t, "the box is removed", func() bool { return h.run("ps", "-aq") == "" })
			until(t, "nothing of it is left", func() bool { return len(h.leftBut(cmd)) == 0 })
			got, err := io.ReadAll(out)
			if err != nil {
				t.Fatal(err)
			}
			got = append(first, got...)
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != c.code || c.want != nil && !bytes.Equal(got, c.want) {
				t.Errorf("exit code %d, %d bytes of %d", code, len(got), len(c.want))
			}
		})
	}
}

// TestStoppedClient: a client that does not even take its output keeps what ended a process of its own, and nobody from stopping or
// removing the box: that leaves nothing. Once it goes on without that, it has everything.
func TestStoppedClient(t *testing.T) {
	h := newHome(t)
	for _, verb := range []string{"stop", "rm -f", ""} {
		t.Run(verb, func(t *testing.T) {
			cmd := h.cmd("run", "--name", "b", "base", "sh", "-c", "echo ready; while [ ! -e /go ]; do sleep 0.1; done; seq 1 300000")
			pipe, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			out := bufio.NewReader(pipe)
			if line, err := out.ReadString('\n'); line != "ready\n" {
				t.Fatal(line, err)
			}
			h.run("start", "b") // it has let go of the box's lock
			if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			h.run("exec", "b", "touch", "/go")
			until(t, "the box has ended", func() bool { return h.run("ps", "-q") == "" })
			if verb != "" {
				h.run(append(strings.Fields(verb), "b")...)
				if left := h.leftBut(cmd); len(left) > 0 {
					t.Errorf("after %s: %s", verb, strings.Join(left, "\n"))
				}
			}
			if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(out)
			if err != nil {
				t.Fatal(err)
			}
			err = cmd.Wait()
			if verb == "" && (err != nil || !bytes.Equal(got, numbers(300_000))) {
				t.Errorf("%v, %d bytes", err, len(got))
			}
			h.try("rm", "-f", "b")
		})
	}
}

// TestGuestWritesNoLog: root in a box cannot write to a file of the host through the agent's descriptors.
func TestGuestWritesNoLog(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	for fd := range 3 {
		h.try("exec", "b", "sh", "-c", fmt.Sprintf("echo from the guest >/proc/1/fd/%d", fd))
	}
	b, err := os.ReadFile(h.field("b", "{{.ShimLog}}"))
	if err != nil || bytes.Contains(b, []byte("from the guest")) {
		t.Errorf("%q, %v", b, err)
	}
	h.run("rm", "-f", "b")
}
