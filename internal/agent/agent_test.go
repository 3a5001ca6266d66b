package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/wire"
)

const (
	childEnv  = "COFFER_TEST_AGENT" // makes the test program an agent on descriptor 3
	rootfsEnv = "COFFER_TEST_ROOTFS"
)

func TestMain(m *testing.M) {
	RunHelper(os.Args)
	if os.Getenv(childEnv) != "" {
		os.Exit(agentMain())
	}
	goleak.VerifyTestMain(m)
}

func agentMain() int {
	// Orphans come to us, as to a box's first process.
	unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	unix.CloseOnExec(3)
	unix.SetNonblock(3, true)
	cfg := Config{Conn: os.NewFile(3, "shim")}
	if at := os.Getenv(rootfsEnv); at != "" {
		cfg.Rootfs = NewRootfsAt(at)
	}
	if err := Run(context.Background(), cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// startAgent runs an agent as a process of its own, as it collects every child there is.
func startAgent(t testing.TB, prepare func(*exec.Cmd)) *wire.Client {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=1", "GORACE=halt_on_error=1 exitcode=66 atexit_sleep_ms=0")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if prepare != nil {
		prepare(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	s, err := wire.NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	c := wire.NewClientOf(s)
	t.Cleanup(func() {
		c.Close()
		// The agent ends with its connection, always, and by itself.
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer timer.Stop()
		if err := cmd.Wait(); err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	return c
}

type result struct {
	wire.ExitStatus
	out, err string
}

func run(t *testing.T, c *wire.Client, p spec.Process, stdin string) result {
	t.Helper()
	var out, errOut strings.Builder
	stdio := wire.IO{Stdout: &out, Stderr: &errOut}
	if stdin != "" {
		stdio.Stdin = strings.NewReader(stdin)
	}
	pr, err := c.Start(t.Context(), wire.ExecRequest{Process: p}, stdio)
	if err != nil {
		t.Fatalf("start %v: %v", p.Args, err)
	}
	st, err := pr.Wait(t.Context())
	if err != nil {
		t.Fatalf("wait for %v: %v", p.Args, err)
	}
	return result{st, out.String(), errOut.String()}
}

func sh(script string) spec.Process {
	return spec.Process{Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/bin:/bin"}}
}

// eventually polls, as what it waits for happens in other processes.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("in vain: %s", what)
}

func alive(pid int) bool {
	st, err := new(procfs).stat(pid)
	return err == nil && !st.dead()
}

func pidIn(t *testing.T, file string) (pid int) {
	t.Helper()
	eventually(t, "a number in "+file, func() bool {
		b, _ := os.ReadFile(file)
		_, err := fmt.Sscanf(string(b), "%d\n", &pid)
		return err == nil && strings.HasSuffix(string(b), "\n")
	})
	return pid
}

func TestExec(t *testing.T) {
	c := startAgent(t, nil)
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		p     spec.Process
		stdin string
		code  int
		sig   int
		out   string
		err   string
	}{
		"both outputs":     {p: sh("echo out; echo err >&2; exit 3"), code: 3, out: "out\n", err: "err\n"},
		"stdin":            {p: sh("cat"), stdin: "hello", out: "hello"},
		"no stdin":         {p: sh("cat"), out: ""},
		"signal":           {p: sh("kill -9 $$"), code: 137, sig: 9},
		"stdin not read":   {p: sh("exit 0"), stdin: strings.Repeat("x", 4<<20)},
		"last duplicate":   {p: spec.Process{Args: []string{"sh", "-c", "echo $A"}, Env: []string{"A=1", "PATH=/bin:/usr/bin", "A=2"}}, out: "2\n"},
		"defaults":         {p: spec.Process{Args: []string{"sh", "-c", "echo $PATH $HOME $TERM"}}, out: defaultPath + " /root\n"},
		"directory":        {p: spec.Process{Args: []string{"/bin/pwd"}, Dir: dir}, out: dir + "\n"},
		"relative command": {p: spec.Process{Args: []string{"./sh", "-c", "echo x"}, Dir: "/bin"}, out: "x\n"},
		"number as user":   {p: spec.Process{Args: []string{"/bin/sh", "-c", "id -u; id -g; echo ok >/dev/stdout"}, User: "1234:77"}, out: "1234\n77\nok\n"},
		"limits":           {p: spec.Process{Args: []string{"/bin/sh", "-c", "ulimit -n; ulimit -Hn; id -u"}, User: "5", Rlimits: []spec.Rlimit{{Name: "nofile", Soft: 77, Hard: 99}}}, out: "77\n99\n5\n"},
		"limits of root":   {p: spec.Process{Args: []string{"/bin/sh", "-c", "ulimit -Hn"}, Rlimits: []spec.Rlimit{{Name: "nofile", Soft: 77, Hard: 99}}}, out: "99\n"},
		"own session":      {p: sh(`set -- $(cut -d')' -f2 /proc/$$/stat); [ $4 = $$ ] && echo leader`), out: "leader\n"},
		"no descriptors":   {p: sh("ls /proc/self/fd | wc -l"), out: "4\n"},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t, c, tc.p, tc.stdin)
			if got.Code != tc.code || got.Signal != tc.sig || got.out != tc.out || got.err != tc.err || got.Truncated {
				t.Fatalf("got %+v, want %+v", got, tc)
			}
		})
	}
}

func TestStartErrors(t *testing.T) {
	c := startAgent(t, nil)
	dir := t.TempDir()
	os.WriteFile(dir+"/plain", []byte("x"), 0o644)
	os.WriteFile(dir+"/garbage", []byte("\x01\x02\x03"), 0o755)
	os.WriteFile(dir+"/orphan", []byte("#!/no/such/interpreter\n"), 0o755)
	limits := []spec.Rlimit{{Name: "core"}}
	for name, tc := range map[string]struct {
		p    spec.Process
		want *wire.Error
		code int
	}{
		"not in PATH":         {spec.Process{Args: []string{"no-such-thing"}}, wire.ErrCommandNotFound, 127},
		"no such file":        {spec.Process{Args: []string{"/no/such"}}, wire.ErrCommandNotFound, 127},
		"no interpreter":      {spec.Process{Args: []string{dir + "/orphan"}}, wire.ErrCommandNotFound, 127},
		"not executable":      {spec.Process{Args: []string{dir + "/plain"}}, wire.ErrNotExecutable, 126},
		"directory":           {spec.Process{Args: []string{dir}}, wire.ErrNotExecutable, 126},
		"not a program":       {spec.Process{Args: []string{dir + "/garbage"}}, wire.ErrNotExecutable, 126},
		"same with limits":    {spec.Process{Args: []string{dir + "/garbage"}, Rlimits: limits}, wire.ErrNotExecutable, 126},
		"orphan with limits":  {spec.Process{Args: []string{dir + "/orphan"}, Rlimits: limits}, wire.ErrCommandNotFound, 127},
		"unknown limit":       {spec.Process{Args: []string{"sh"}, Rlimits: []spec.Rlimit{{Name: "x"}}}, wire.ErrInvalid, 125},
		"user":                {spec.Process{Args: []string{"sh"}, User: "nobody-here"}, wire.ErrNoUser, 125},
		"group":               {spec.Process{Args: []string{"sh"}, User: "0:nobody-here"}, wire.ErrNoUser, 125},
		"directory is a file": {spec.Process{Args: []string{"sh"}, Dir: dir + "/plain"}, wire.ErrBadDir, 126},
		"no directory":        {spec.Process{Args: []string{"sh"}, Dir: dir + "/none"}, wire.ErrBadDir, 126},
		"below a file":        {spec.Process{Args: []string{"sh"}, Dir: dir + "/plain/x"}, wire.ErrBadDir, 126},
		"nothing":             {spec.Process{}, wire.ErrInvalid, 125},
		"NUL":                 {spec.Process{Args: []string{"sh", "a\x00b"}}, wire.ErrInvalid, 125},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Start(t.Context(), wire.ExecRequest{Process: tc.p}, wire.IO{Stdout: io.Discard})
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if e, _ := errors.AsType[*wire.Error](err); e.ExitCode() != tc.code {
				t.Fatalf("exit code %d, want %d", e.ExitCode(), tc.code)
			}
		})
	}
}

// A process that starts others and leaves them holding its output must not hold up Wait, and must not lose a byte of its own.
func TestWaitDoesNotHangOnAHeldPipe(t *testing.T) {
	c := startAgent(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	got := run(t, c, sh("sleep 1000 & echo $! >"+file+"; head -c 60000 /dev/zero; exit 4"), "")
	if got.Code != 4 || len(got.out) != 60000 || !got.Truncated {
		t.Fatalf("code %d, %d bytes, truncated %v", got.Code, len(got.out), got.Truncated)
	}
	// It goes on: a server in the background is what people start this way.
	if pid := pidIn(t, file); !alive(pid) {
		t.Fatal("background process died with its parent")
	} else {
		unix.Kill(pid, unix.SIGKILL)
	}
	// A grandchild that never stops writing is no reason either.
	got = run(t, c, sh("yes & echo $! >"+file+"2; exit 0"), "")
	if pid := pidIn(t, file+"2"); true {
		unix.Kill(pid, unix.SIGKILL)
	}
	if got.Code != 0 {
		t.Fatal(got.Code)
	}
}

// treeScript starts processes that ignore what they can and keep making new ones, all in one session.
func treeScript(file string) string {
	return `trap "" TERM HUP INT; (trap "" TERM HUP; while :; do sleep 1000 & wait $!; done) & echo $! >` + file + `; wait`
}

// Killing the leader alone is not enough: with that, this test and the two on a client's death and main's end fail.
func TestTimeoutKillsTheSession(t *testing.T) {
	c := startAgent(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	p := sh(treeScript(file))
	p.Timeout = 300 * time.Millisecond
	got := run(t, c, p, "")
	if !got.TimedOut || got.Signal != 9 || got.Code != 137 {
		t.Fatalf("%+v", got)
	}
	if pid := pidIn(t, file); alive(pid) {
		t.Fatal("a process of the session is left")
	}
}

func TestClientDeathKillsTheSession(t *testing.T) {
	for _, tty := range []bool{false, true} {
		t.Run(fmt.Sprintf("tty=%v", tty), func(t *testing.T) {
			c := startAgent(t, nil)
			file := filepath.Join(t.TempDir(), "pid")
			p := sh(treeScript(file))
			p.TTY = tty
			pr, err := c.Start(t.Context(), wire.ExecRequest{Process: p}, wire.IO{Stdout: io.Discard})
			if err != nil {
				t.Fatal(err)
			}
			pid := pidIn(t, file)
			pr.Close()
			eventually(t, "end of the session", func() bool { return !alive(pid) && !alive(pr.PID()) })
		})
	}
}

func TestDetachOutlivesItsClient(t *testing.T) {
	c := startAgent(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	go_ := filepath.Join(t.TempDir(), "go")
	pr, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("echo $$ >" + file + "; while [ ! -e " + go_ + " ]; do echo noise; sleep 0.01; done; echo done >" + go_ + "; sleep 1000"), Detach: true}, wire.IO{Stdout: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	pid := pidIn(t, file)
	pr.Close()
	os.WriteFile(go_, nil, 0o644)
	eventually(t, "life after the client", func() bool { b, _ := os.ReadFile(go_); return string(b) == "done\n" })
	if !alive(pid) {
		t.Fatal("it died")
	}
}

// Who no longer reads an output is to the process a closed pipe.
func TestClosedPipeReachesTheProcess(t *testing.T) {
	c := startAgent(t, nil)
	pr, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("yes")}, wire.IO{Stdout: failingWriter{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pr.Wait(t.Context()); err == nil {
		t.Fatal("no error of the writer")
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("full") }

func TestTerminal(t *testing.T) {
	c := startAgent(t, nil)
	p := sh(`stty size; tty >/dev/null && echo terminal; echo $TERM; trap "stty size; exit 5" WINCH; echo ready; read x; echo got $x; while :; do sleep 0.01; done`)
	p.TTY, p.WinSize = true, spec.WinSize{Rows: 11, Cols: 22}
	in, inW := io.Pipe()
	defer inW.Close()
	out := &lockedBuffer{}
	pr, err := c.Start(t.Context(), wire.ExecRequest{Process: p}, wire.IO{Stdin: in, Stdout: out, Stderr: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the prompt", func() bool { return strings.Contains(out.String(), "ready") })
	inW.Write([]byte("line\n"))
	eventually(t, "the line", func() bool { return strings.Contains(out.String(), "got line") })
	if err := pr.Resize(t.Context(), 33, 44); err != nil {
		t.Fatal(err)
	}
	st, err := pr.Wait(t.Context())
	if err != nil || st.Code != 5 {
		t.Fatal(st, err)
	}
	want := "11 22\r\nterminal\r\nxterm\r\nready\r\nline\r\ngot line\r\n33 44\r\n"
	if out.String() != want {
		t.Fatalf("got %q, want %q", out.String(), want)
	}
}

func TestTerminalEndOfFile(t *testing.T) {
	c := startAgent(t, nil)
	p := sh("cat")
	p.TTY = true
	if got := run(t, c, p, "x\n"); got.Code != 0 || got.out != "x\r\nx\r\n" {
		t.Fatalf("%+v", got)
	}
}

func TestSignal(t *testing.T) {
	c := startAgent(t, nil)
	out := &lockedBuffer{}
	pr, err := c.Start(t.Context(), wire.ExecRequest{Process: sh(`trap "exit 9" USR1; echo ready; while :; do sleep 0.01; done`)}, wire.IO{Stdout: out})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "ready", func() bool { return out.String() == "ready\n" })
	pr.Signal(t.Context(), int(unix.SIGUSR1))
	if st, err := pr.Wait(t.Context()); err != nil || st.Code != 9 {
		t.Fatal(st, err)
	}
}

// The exit of main comes after its last byte, and ends everything else.
func TestMainEndsTheBox(t *testing.T) {
	c := startAgent(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	other, err := c.Start(t.Context(), wire.ExecRequest{Process: sh(treeScript(file)), Detach: true}, wire.IO{})
	if err != nil {
		t.Fatal(err)
	}
	pid := pidIn(t, file)
	var out lockedBuffer
	p, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("head -c 3000000 /dev/zero; exit 6"), Main: true}, wire.IO{Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("true"), Main: true}, wire.IO{}); !errors.Is(err, wire.ErrInvalid) && !errors.Is(err, wire.ErrStopping) {
		t.Fatal("second main process:", err)
	}
	st, err := p.Wait(t.Context())
	if err != nil || st.Code != 6 || len(out.String()) != 3000000 {
		t.Fatal(st, err, len(out.String()))
	}
	if alive(pid) || alive(other.PID()) {
		t.Fatal("something outlived main")
	}
	if _, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("true")}, wire.IO{}); !errors.Is(err, wire.ErrStopping) {
		t.Fatal("exec after main's end:", err)
	}
}

func TestShutdown(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		forced bool
		code   int
	}{
		"graceful": {`trap "exit 7" TERM; echo ready; while :; do sleep 0.01; done`, false, 7},
		"forced":   {`trap "" TERM; echo ready; while :; do sleep 0.01; done`, true, 137},
	} {
		t.Run(name, func(t *testing.T) {
			c := startAgent(t, nil)
			var out lockedBuffer
			p, err := c.Start(t.Context(), wire.ExecRequest{Process: sh(tc.script), Main: true}, wire.IO{Stdout: &out})
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "ready", func() bool { return out.String() == "ready\n" })
			timeout := 200 * time.Millisecond
			if !tc.forced {
				timeout = 20 * time.Second
			}
			r, err := c.Shutdown(t.Context(), 0, timeout)
			if err != nil || r.Forced != tc.forced || r.Exit == nil || r.Exit.Code != tc.code {
				t.Fatalf("%+v %v", r, err)
			}
			if st, err := p.Wait(t.Context()); err != nil || st.Code != tc.code {
				t.Fatal(st, err)
			}
			<-c.Session().Done() // the agent ends after its answer
		})
	}
}

func TestMainSignalAndInfo(t *testing.T) {
	c := startAgent(t, nil)
	if err := c.Signal(t.Context(), 15); !errors.Is(err, wire.ErrInvalid) {
		t.Fatal("signal without a main process:", err)
	}
	p, err := c.Start(t.Context(), wire.ExecRequest{Process: spec.Process{Args: []string{"sleep", "1000"}}, Main: true}, wire.IO{})
	if err != nil {
		t.Fatal(err)
	}
	ps, err := c.Processes(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, i := range ps {
		found = found || i.PID == p.PID() && strings.Join(i.Command, " ") == "sleep 1000" && i.Session == p.PID()
	}
	if !found {
		t.Fatalf("main is not in %+v", ps)
	}
	if st, err := c.Stats(t.Context()); err != nil || st.MemTotal == 0 || st.Processes == 0 || st.DiskTotal == 0 {
		t.Fatal(st, err)
	}
	if i, err := c.Ping(t.Context()); err != nil || i.Version != wire.Version {
		t.Fatal(i, err)
	}
	if err := c.Call(t.Context(), "no-such-op", nil, nil); !errors.Is(err, wire.ErrUnknownOp) {
		t.Fatal(err)
	}
	c.Signal(t.Context(), 9)
	if st, err := p.Wait(t.Context()); err != nil || st.Signal != 9 {
		t.Fatal(st, err)
	}
}

// Many at once: no status may be taken for another's, none may be lost.
func TestManyAtOnce(t *testing.T) {
	c := startAgent(t, nil)
	errs := make(chan error)
	const n = 40
	for i := range n {
		go func() {
			var out strings.Builder
			p, err := c.Start(t.Context(), wire.ExecRequest{Process: sh(fmt.Sprintf("(sleep 0.01 & ) ; echo %d; exit %d", i, i))}, wire.IO{Stdout: &out})
			if err != nil {
				errs <- err
				return
			}
			st, err := p.Wait(t.Context())
			if err == nil && (st.Code != i || out.String() != fmt.Sprintln(i)) {
				err = fmt.Errorf("%d: code %d output %q", i, st.Code, out.String())
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	// Orphans were collected too.
	eventually(t, "no dead processes", func() bool {
		ps, err := c.Processes(t.Context())
		info, _ := c.Ping(t.Context())
		for _, p := range ps {
			if p.PPID == info.PID && p.State == "Z" {
				return false
			}
		}
		return err == nil
	})
}

func BenchmarkExec(b *testing.B) {
	c := startAgent(b, nil)
	path := staticTrue(b)
	for b.Loop() {
		p, err := c.Start(b.Context(), wire.ExecRequest{Process: spec.Process{Args: []string{path}}}, wire.IO{Stdout: io.Discard, Stderr: io.Discard})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCopy moves bytes through cat, in and out.
func BenchmarkCopy(b *testing.B) {
	c := startAgent(b, nil)
	const size = 256 << 20
	b.SetBytes(size)
	for b.Loop() {
		p, err := c.Start(b.Context(), wire.ExecRequest{Process: spec.Process{Args: []string{"cat"}}},
			wire.IO{Stdin: io.LimitReader(zeros{}, size), Stdout: io.Discard})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := p.Wait(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// staticTrue is the smallest program: it exits.
func staticTrue(tb testing.TB) string {
	if runtime.GOARCH != "amd64" {
		return "/bin/true"
	}
	code := []byte{0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05}
	elf := make([]byte, 120, 129)
	copy(elf, "\x7fELF\x02\x01\x01")
	for at, v := range map[int]byte{16: 2, 18: 62, 20: 1, 24: 0x78, 26: 0x40, 32: 64, 52: 64, 54: 56, 56: 1, 64: 1, 68: 5, 82: 0x40, 90: 0x40, 96: 129, 104: 129, 113: 0x10} {
		elf[at] = v
	}
	path := filepath.Join(tb.TempDir(), "true")
	if err := os.WriteFile(path, append(elf, code...), 0o755); err != nil {
		tb.Fatal(err)
	}
	return path
}
