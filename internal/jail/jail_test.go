//go:build linux

package jail_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
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
)

// ordinaryUser is in no user database, and has no subordinate ids.
const ordinaryUser = 48233

// users are those that a test can be: this one, and an ordinary one where this is root.
func users(t *testing.T, test func(t *testing.T, as int)) {
	t.Helper()
	if os.Geteuid() == 0 {
		t.Run("root", func(t *testing.T) { test(t, 0) })
		t.Run("user", func(t *testing.T) { test(t, ordinaryUser) })
		return
	}
	t.Run("user", func(t *testing.T) { test(t, os.Geteuid()) })
}

var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "jailed-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "jailed")
	cmd := exec.Command("go", "build", "-o", path, "./testdata/jailed")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.New(string(out))
	}
	return path, os.Chmod(dir, 0o755)
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := program(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// spawner is a process that spawns a jail.
type spawner struct {
	*exec.Cmd
	report *os.File // the reading end; it ends when nobody in the jail nor the spawner lives
	stdin  io.WriteCloser
	stdout io.Reader
	stderr *bytes.Buffer
}

func start(t *testing.T, as int, args ...string) *spawner {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("needs Go, to build the program that is jailed: ", err)
	}
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	t.Cleanup(func() { r.Close() })
	s := &spawner{Cmd: exec.Command(path, append([]string{"spawn"}, args...)...), report: r, stderr: &bytes.Buffer{}}
	s.Env = []string{"SECRET=of the spawner's", "TMPDIR=/tmp"}
	s.ExtraFiles = []*os.File{w, r, r, r, r, r, r, r, r, r} // more than the jail is given
	s.Stderr = s.stderr
	if as != os.Geteuid() {
		s.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(as), Gid: uint32(as)}}
	}
	if s.stdin, err = s.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if s.stdout, err = s.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Process.Kill()
		_ = s.Wait()
	})
	return s
}

// line reads up to a newline.
func line(t *testing.T, r io.Reader) string {
	t.Helper()
	var out []byte
	for b := make([]byte, 1); ; {
		if _, err := r.Read(b); err != nil {
			t.Fatalf("read a line: %v, after %q", err, out)
		}
		if b[0] == '\n' {
			return string(out)
		}
		out = append(out, b[0])
	}
}

// ends reads what is left of the report: it ends only when the spawner and all of the jail have.
func (s *spawner) ends(t *testing.T) string {
	t.Helper()
	if err := s.report.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(s.report)
	if err != nil {
		t.Fatalf("somebody still lives: %v", err)
	}
	return string(b)
}

// TestGate: with the gate shut the first process is there to be identified and placed, and the program does not run; nor does it
// ever when the spawner ends then, in order or killed.
func TestGate(t *testing.T) {
	users(t, func(t *testing.T, as int) {
		for _, kill := range []bool{false, true} {
			s := start(t, as, "gate", "hold")
			pid, err := strconv.Atoi(line(t, s.stdout))
			if err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
			if err != nil || !strings.HasPrefix(string(b), "coffer-init\x00_init\x00jailed") {
				t.Errorf("first process: %q, %v", b, err)
			}
			if env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ"); err != nil || len(env) != 0 {
				t.Errorf("environment of the first process: %q, %v", env, err)
			}
			if ns := status(t, pid, "NSpid"); !strings.HasSuffix(ns, "\t1") {
				t.Errorf("NSpid of the first process is %q", ns)
			}
			if kids, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/task/" + strconv.Itoa(pid) + "/children"); len(kids) != 0 {
				t.Errorf("the first process has children %s", kids)
			}
			if kill {
				err = s.Process.Kill()
			} else {
				err = s.stdin.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			if out := s.ends(t); out != "" {
				t.Errorf("the program ran with the gate shut: %q", out)
			}
		}
	})
}

// TestSpawnerKilled: the jail does not outlive its spawner.
func TestSpawnerKilled(t *testing.T) {
	users(t, func(t *testing.T, as int) {
		s := start(t, as, "release", "hold")
		if got := line(t, s.report); got != "runs" {
			t.Fatalf("%q %s", got, s.stderr)
		}
		if err := s.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		s.ends(t)
	})
}

// TestKilledBehindGate: a release of a jail that died is an error, and leaves nothing to be reaped.
func TestKilledBehindGate(t *testing.T) {
	users(t, func(t *testing.T, as int) {
		s := start(t, as, "killed", "hold")
		if err := s.Wait(); err != nil {
			t.Fatalf("%v: %s", err, s.stderr)
		}
	})
}

func TestExitCode(t *testing.T) {
	for _, c := range []struct{ until, args, code string }{{"release", "exit", "7"}, {"release", "signal", "137"}, {"kill", "hold", "137"}} {
		users(t, func(t *testing.T, as int) {
			s := start(t, as, c.until, c.args)
			if got := line(t, s.stdout); got != c.code {
				t.Errorf("%s %s: exit code %s, not %s: %s", c.until, c.args, got, c.code, s.stderr)
			}
		})
	}
}

// TestProgram looks at what the program has been given and what was taken from it.
func TestProgram(t *testing.T) {
	users(t, func(t *testing.T, as int) {
		s := start(t, as, "limits", "facts")
		b, err := io.ReadAll(s.report)
		if err != nil || len(b) == 0 {
			t.Fatalf("%v: %s", err, s.stderr)
		}
		var f struct {
			Env     []string
			FDs     []int
			Dir     string
			PID     int
			Session int
			Umask   int
			Core    unix.Rlimit
			Files   unix.Rlimit
			Status  map[string]string
		}
		if err := json.Unmarshal(b, &f); err != nil {
			t.Fatal(err)
		}
		if len(f.Env) != 0 {
			t.Errorf("environment %q", f.Env)
		}
		if !slices.Equal(f.FDs, []int{0, 1, 2, 3, 4}) {
			t.Errorf("descriptors %v, not the standard ones, the one given and the one opened", f.FDs)
		}
		if f.Dir != "/" || f.Umask != 0 {
			t.Errorf("directory %s, umask %o", f.Dir, f.Umask)
		}
		if f.Session != 1 || f.PID == 1 {
			t.Errorf("process %d in session %d, not in the first process' own", f.PID, f.Session)
		}
		if f.Core.Max != 0 {
			t.Errorf("core limit %v", f.Core)
		}
		// Nobody in a user namespace may raise a hard limit, whatever the spawner is: the soft one goes up to it, and no further.
		if f.Files.Cur != 128 || f.Files.Max != 128 {
			t.Errorf("file limits %v, not the spawner's hard limit", f.Files)
		}
		for k, want := range map[string]string{"CapEff": zero, "CapPrm": zero, "CapInh": zero, "CapBnd": zero, "CapAmb": zero,
			"NoNewPrivs": "1", "Seccomp": "2", "Seccomp_filters": "1"} {
			if f.Status[k] != want {
				t.Errorf("%s is %s, not %s", k, f.Status[k], want)
			}
		}
	})
}

const zero = "0000000000000000"

// TestForbidden: where the kernel allows no user namespaces, the error says which switch it is, and how to set it.
func TestForbidden(t *testing.T) {
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "without-namespaces", path, "spawn", "release", "exit")
	id := []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
	gid := []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: id, GidMappings: gid}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd.ExtraFiles = []*os.File{null}
	out, err := cmd.CombinedOutput()
	if strings.HasPrefix(string(out), "cannot:") {
		t.Skipf("the limit cannot be set here: %s", out)
	}
	if err == nil || !strings.Contains(string(out), "user/max_user_namespaces=0") || !strings.Contains(string(out), "sysctl -w user.max_user_namespaces=") {
		t.Errorf("%v: %s", err, out)
	}
}

func status(t *testing.T, pid int, field string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, field+":"); ok {
			return strings.TrimRight(v, "\n")
		}
	}
	return ""
}
