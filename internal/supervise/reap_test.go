//go:build linux

package supervise

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/cgroup"
)

func none(t *testing.T, token string) {
	t.Helper()
	if left := observe(token); len(left) > 0 {
		t.Errorf("%d processes live after the reap: %v", len(left), left)
	}
}

func TestReap(t *testing.T) {
	for _, c := range []struct {
		name    string
		grouped bool
		before  func(t *testing.T, z *zoo)
		target  func(*Target)
	}{
		{name: "everything recorded", grouped: true},
		{name: "handles only", target: func(t *Target) { t.Name = "" }},
		{name: "init handle only", target: func(t *Target) { t.Name, t.Shim, t.ShimLock = "", nil, "" },
			before: func(t *testing.T, z *zoo) { kill(t, z.shim) }},
		{name: "group record only", grouped: true, target: func(t *Target) { t.Shim, t.Init, t.ShimLock, t.InitLock = nil, nil, "", "" }},
		{name: "derived name only", grouped: true,
			target: func(t *Target) {
				t.Cgroup, t.Shim, t.Init, t.ShimLock, t.InitLock, t.BootID = nil, nil, nil, "", "", ""
			}},
		{name: "record of a removed group", grouped: true, target: func(t *Target) {
			t.Cgroup = &cgroup.Record{Kind: cgroup.KindHybrid, Unified: "/sys/fs/cgroup/nowhere/coffer/" + t.Name}
			t.Shim, t.Init, t.ShimLock, t.InitLock = nil, nil, "", ""
		}},
		{name: "damaged record", grouped: true, target: func(t *Target) {
			t.Cgroup = &cgroup.Record{Unified: "/sys/fs/cgroup/unified"}
			t.Shim, t.Init, t.ShimLock, t.InitLock = nil, nil, "", ""
		}},
		{name: "locks only", target: func(t *Target) { t.Shim, t.Init, t.BootID = nil, nil, "" }},
		{name: "locks only, shim dead", target: func(t *Target) { t.Shim, t.Init = nil, nil },
			before: func(t *testing.T, z *zoo) { kill(t, z.shim) }},
		{name: "locks with unreadable contents", target: func(t *Target) { t.Shim, t.Init = nil, nil },
			before: func(t *testing.T, z *zoo) {
				for _, f := range []string{"shim.lock", "init.lock"} {
					if err := os.WriteFile(filepath.Join(z.Dir, f), []byte("{\"pid\": 1"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}},
		{name: "handles that a reader cannot prove", target: func(t *Target) {
			// As on a kernel without pidfs: the shim shares pid namespace and cgroup with half the host.
			s, i := *t.Shim, *t.Init
			s.PidfsIno, s.FileHandle, i.PidfsIno, i.FileHandle = 0, nil, 0, nil
			t.Shim, t.Init = &s, &i
		}},
		{name: "init's handle is a stranger's", target: func(t *Target) {
			i := *t.Init
			i.PidfsIno, i.FileHandle = i.PidfsIno+1, nil
			t.Init = &i
		}},
		{name: "stopped shim", before: func(t *testing.T, z *zoo) { _ = z.shim.Process.Signal(unix.SIGSTOP) }},
		{name: "frozen", grouped: true, before: func(t *testing.T, z *zoo) {
			if err := z.group.Freeze(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			z := startZoo(t, c.grouped)
			if c.before != nil {
				c.before(t, z)
			}
			target := z.target()
			if c.target != nil {
				c.target(&target)
			}
			r, err := Reap(t.Context(), target, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !r.Found {
				t.Error("Found = false")
			}
			none(t, z.Token)
			if z.group != nil {
				if _, err := cgroup.Open(z.group.Record()); !errors.Is(err, cgroup.ErrGone) {
					t.Errorf("the control group is still there: %v", err)
				}
			}
			r, err = Reap(t.Context(), target, nil)
			if err != nil || r.Found {
				t.Errorf("second reap: Found = %v, %v; want nothing found", r.Found, err)
			}
		})
	}
}

// TestReapLateGroup: a shim that has recorded nothing may make its control group between the look for it and the kill.
func TestReapLateGroup(t *testing.T) {
	h, err := cgroup.Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if h.Kind() == cgroup.KindNone {
		t.Skip("no cgroup is writable here: " + h.Describe())
	}
	z := startZoo(t, false)
	target := z.target()
	target.Init = nil
	r := reaper{t: target, log: slog.New(slog.DiscardHandler)}
	defer r.close()
	if err := r.find(t.Context()); err != nil {
		t.Fatal(err)
	}
	if z.group, err = h.Create(t.Context(), z.name, cgroup.Limits{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.finish(t.Context()); err != nil {
		t.Error(err)
	}
	none(t, z.Token)
	if left := h.Find(t.Context(), z.name); len(left) > 0 {
		t.Errorf("a group is left: %+v", left)
	}
}

func kill(t *testing.T, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait()
}

func TestReapRepeatedly(t *testing.T) {
	for round := range 5 {
		z := startZoo(t, round%2 == 0 && os.Geteuid() == 0)
		if _, err := Reap(t.Context(), z.target(), nil); err != nil {
			t.Fatal(err)
		}
		none(t, z.Token)
	}
}

// A record of another boot is never a reason to signal, and never a reason to say that nothing lives.
func TestReapOtherBoot(t *testing.T) {
	z := startZoo(t, os.Geteuid() == 0)
	target := z.target()
	target.BootID = "00000000-0000-0000-0000-000000000000"
	before := observe(z.Token)
	_, err := Reap(t.Context(), target, nil)
	var left *LeftError
	if !errors.As(err, &left) {
		t.Errorf("Reap = %v, want a LeftError: the generation lives", err)
	}
	// A process that is just being replaced by its program has no command line; one that was signalled never has one again.
	soon(t, "all live that lived before: a generation of another boot was signalled", func() bool {
		after := observe(z.Token)
		return !slices.ContainsFunc(before, func(pid int) bool { return !slices.Contains(after, pid) })
	})
	quiet := Target{Name: "coffer-none-none-1", BootID: target.BootID, ShimLock: filepath.Join(t.TempDir(), "no.lock")}
	if r, err := Reap(t.Context(), quiet, nil); err != nil || r.Found {
		t.Errorf("Reap of a dead generation of another boot = %+v, %v", r, err)
	}
}

// Whoever has a lock file open without holding the lock is a bystander: somebody's grep, or a look at the lock from a container.
func TestReapSparesBystanders(t *testing.T) {
	z := startZoo(t, false)
	var seen []*exec.Cmd
	for _, flags := range []uintptr{0, syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID} {
		for _, name := range []string{"shim.lock", "init.lock"} {
			f, err := os.OpenFile(filepath.Join(z.Dir, name), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c := exec.Command("sh", "-c", "sleep 1000 & wait", ShimArg)
			c.ExtraFiles = []*os.File{f}
			c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Setpgid: true}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = unix.Kill(-c.Process.Pid, unix.SIGKILL); _ = c.Wait() })
			seen = append(seen, c)
		}
	}
	target := z.target()
	target.Shim, target.Init = nil, nil
	if _, err := Reap(t.Context(), target, nil); err != nil {
		t.Fatal(err)
	}
	none(t, z.Token)
	for _, c := range seen {
		var ws syscall.WaitStatus
		if pid, err := syscall.Wait4(c.Process.Pid, &ws, syscall.WNOHANG, nil); pid != 0 || err != nil {
			t.Errorf("bystander %d was signalled: %v %v", c.Process.Pid, ws, err)
		}
	}
}

// An outsider can keep a pid namespace from ending after its cgroup is empty. It is named, not killed, and the reap fails.
func TestReapNamesOutsider(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can enter the namespace from outside")
	}
	z := startZoo(t, true)
	out := exec.Command("/proc/self/exe", "role=outsider", fmt.Sprint(z.Init.PID), z.Token)
	pipe, err := out.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := out.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(pipe, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	_, err = Reap(t.Context(), z.target(), nil)
	var left *LeftError
	if !errors.As(err, &left) {
		t.Fatalf("Reap = %v, want a LeftError", err)
	}
	if !strings.Contains(err.Error(), fmt.Sprintf("process %d ", out.Process.Pid)) {
		t.Errorf("the error does not name the outsider %d: %v", out.Process.Pid, err)
	}
	var ws syscall.WaitStatus
	if pid, err := syscall.Wait4(out.Process.Pid, &ws, syscall.WNOHANG, nil); pid != 0 || err != nil {
		t.Errorf("the outsider was killed: %v, %v", ws, err)
	}
	kill(t, out)
	if _, err := Reap(t.Context(), z.target(), nil); err != nil {
		t.Errorf("Reap after the outsider's end = %v", err)
	}
	none(t, z.Token)
}

// TestOrdinaryUser runs the whole file again without root's rights.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("is one already")
	}
	dir, err := os.MkdirTemp("", "supervise")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	const uid = 64123 // nobody's
	exe := filepath.Join(dir, "supervise.test")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(exe, self, 0o755), os.Chmod(dir, 0o755), os.Mkdir(filepath.Join(dir, "tmp"), 0o700),
		os.Chown(filepath.Join(dir, "tmp"), uid, uid)); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), exe, "-test.run=^Test(Reap|Handle|Lock)", "-test.v", "-test.timeout=120s")
	c.Dir = dir
	c.Env = append(os.Environ(), "TMPDIR="+filepath.Join(dir, "tmp"), "HOME="+dir)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	b, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	if !strings.Contains(string(b), "--- PASS: TestReap/locks_only") {
		t.Errorf("nothing ran:\n%s", b)
	}
}

// sleeper starts a process and takes its identity.
func sleeper(t *testing.T, flags uintptr) (*exec.Cmd, Handle) {
	t.Helper()
	c := exec.Command("sleep", "1000")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	h, err := Capture(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return c, h
}

func TestHandleOpen(t *testing.T) {
	// In a pid namespace of its own, as the first process of a jail: without pidfs this is what tells it from others.
	c, h := sleeper(t, syscall.CLONE_NEWUSER|syscall.CLONE_NEWPID)
	_, plain := sleeper(t, 0)
	other, err := Capture(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		edit func(*Handle)
		want error
	}{
		{"as captured", func(*Handle) {}, nil},
		{"without a file handle", func(h *Handle) { h.FileHandle = nil }, nil},
		{"damaged file handle", func(h *Handle) { h.FileHandle = []byte{1, 2, 3, 4, 5, 6, 7, 8} }, nil},
		{"another boot", func(h *Handle) { h.BootID = "x" }, ErrGone},
		{"no pid", func(h *Handle) { h.PID = 0 }, ErrGone},
		{"reused pid", func(h *Handle) { h.PID, h.FileHandle = other.PID, nil }, ErrStranger},
		{"without pidfs", func(h *Handle) { h.PidfsIno, h.FileHandle = 0, nil }, nil},
		// Start time and pid alone, and with a namespace that half the host is in, prove nothing.
		{"start time alone", func(h *Handle) { h.PidfsIno, h.FileHandle, h.PIDNS, h.Cgroup = 0, nil, 0, "" }, ErrStranger},
		{"start time and a common namespace", func(h *Handle) { *h = plain; h.PidfsIno, h.FileHandle = 0, nil }, ErrStranger},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := h
			tc.edit(&h)
			p, err := h.Open()
			if err == nil {
				p.Close()
			}
			if !errors.Is(err, tc.want) || (tc.want == nil) != (err == nil) {
				t.Errorf("Open() = %v, want %v", err, tc.want)
			}
		})
	}
	p, err := h.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	kill(t, c)
	if err := p.Wait(t.Context()); err != nil || !p.Ended() {
		t.Errorf("Wait after the end: %v, Ended() = %v", err, p.Ended())
	}
	if err := p.Signal(unix.SIGKILL); !errors.Is(err, ErrGone) {
		t.Errorf("Signal after the end = %v, want ErrGone", err)
	}
	if _, err := h.Open(); !errors.Is(err, ErrGone) {
		t.Errorf("Open after the end = %v, want ErrGone", err)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.lock")
	if held, err := Held(path); held || err != nil {
		t.Fatalf("Held of no file = %v, %v", held, err)
	}
	l, err := TryLock(path, map[string]int{"pid": 7})
	if err != nil {
		t.Fatal(err)
	}
	if held, err := Held(path); !held || err != nil {
		t.Errorf("Held = %v, %v", held, err)
	}
	if _, err := TryLock(path, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("second TryLock = %v, want ErrLocked", err)
	}
	if got := Holder(path); got != `{"pid":7}` {
		t.Errorf("Holder = %q", got)
	}
	// A child that inherits the file holds the lock alone after Unlock, and its death frees it.
	c := exec.Command("sleep", "1000")
	c.ExtraFiles = []*os.File{l.File()}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	l.Unlock()
	if held, err := Held(path); !held || err != nil {
		t.Errorf("Held after handing on = %v, %v", held, err)
	}
	kill(t, c)
	if err := WaitFree(t.Context(), path); err != nil {
		t.Errorf("WaitFree after the holder's death = %v", err)
	}
	if err := os.Symlink(path, path+".link"); err != nil {
		t.Fatal(err)
	}
	if l, err := TryLock(path+".link", nil); err == nil {
		l.Unlock()
		t.Error("TryLock follows a symbolic link")
	}
	l, err = WaitLock(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Unlock()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	again, err := TryLock(path, nil)
	if err != nil {
		t.Fatalf("lock on a file made anew: %v", err)
	}
	again.Unlock()
}

func FuzzParsers(f *testing.F) {
	f.Add("1 (a) b) S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23")
	f.Add("NSpid:\t12\t1\nTracerPid:\t4\n")
	f.Add("lock:\t1: OFDLCK  ADVISORY  WRITE -1 fe:00:12 0 EOF\n")
	f.Add("0::/coffer/coffer-a\n")
	f.Fuzz(func(t *testing.T, s string) {
		if st, err := parseStat(s); err == nil && !strings.Contains(s, "("+st.comm+")") {
			t.Errorf("name %q is not in %q", st.comm, s)
		}
		if hasWriteLock(s) && !strings.Contains(s, "WRITE") {
			t.Errorf("a lock out of nothing in %q", s)
		}
		parseStatus(s)
		if p := parseCgroup2(s); p != "" && p[0] != '/' {
			t.Errorf("relative path %q", p)
		}
	})
}

func FuzzLockFile(f *testing.F) {
	f.Add([]byte(`{"pid":7}` + "\n"))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "l")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if Holder(path) == "" && len(b) > 1 && strings.TrimSpace(string(b)) != "" {
			t.Errorf("Holder of %q says nothing", b)
		}
	})
}
