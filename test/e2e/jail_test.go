package e2e

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	signals "os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maskedCall is the first word of the command line of a process that runs another program in a kernel without Landlock.
const maskedCall = "without-landlock"

func TestMain(m *testing.M) {
	if os.Args[0] == maskedCall {
		withoutLandlock(os.Args[1:])
	}
	// In the background of a shell script interrupts are ignored, and stay so in what is started. With somebody who listens they do not.
	if signals.Ignored(os.Interrupt) {
		signals.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	os.Exit(m.Run())
}

// withoutLandlock runs a program that gets the answer of a kernel without Landlock.
func withoutLandlock(args []string) {
	runtime.LockOSThread()
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_LANDLOCK_CREATE_RULESET, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)), 0, 0)
	}
	if err == nil {
		err = syscall.Exec(args[0], args, os.Environ())
	}
	panic(err)
}

type layer struct {
	Name   string
	Active bool
	Detail string
}

func (h *home) layers(box string) map[string]layer {
	h.t.Helper()
	var list []layer
	if err := json.Unmarshal([]byte(h.field(box, "{{json .Layers}}")), &list); err != nil {
		h.t.Fatal(err)
	}
	out := map[string]layer{}
	for _, l := range list {
		out[l.Name] = l
	}
	return out
}

// TestInspectLayers: inspect lists every layer of the jail, and says why one is not active where the kernel lacks it.
func TestInspectLayers(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	have := h.layers("b")
	for _, name := range []string{
		"user namespace", "pid namespace", "mount namespace", "ipc namespace", "uts namespace", "cgroup namespace", "network namespace",
		"own root", "read-only programs and images", "nosuid mounts", "empty environment", "own session", "closed descriptors", "rlimits",
		"unprivileged host uid", "capabilities", "first process closed to tracing", "no new privileges", "seccomp",
	} {
		if !have[name].Active {
			t.Errorf("%s: %+v", name, have[name])
		}
	}
	_, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if l := have["landlock"]; l.Name == "" || l.Active != (e == 0) || !l.Active && l.Detail == "" {
		t.Errorf("landlock: %+v, and the kernel's answer is %v", l, e)
	}
	h.run("rm", "-f", "b")

	c := h.cmd("run", "-d", "--name", "c", "base", "sleep", "1000")
	c.Args = append([]string{maskedCall, c.Path}, c.Args[1:]...)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c.Path = exe
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	have = h.layers("c")
	if l := have["landlock"]; l.Active || !strings.Contains(l.Detail, "no Landlock") {
		t.Errorf("landlock, on a kernel without: %+v", l)
	}
	if !have["seccomp"].Active {
		t.Errorf("seccomp: %+v", have["seccomp"])
	}
	h.run("rm", "-f", "c")
}

// TestForbiddenNamespaces: where the kernel allows no user namespaces, run and doctor say which switch it is and how to set it.
func TestForbiddenNamespaces(t *testing.T) {
	h := newHome(t)
	h.run("ps") // makes the home
	for _, args := range [][]string{{"run", "--rm", "base", "true"}, {"doctor"}} {
		c := h.cmd(args...)
		c.Args = append([]string{"sh", "-c", `echo 0 > /proc/sys/user/max_user_namespaces || exit 77; exec "$0" "$@"`, c.Path}, c.Args[1:]...)
		var err error
		if c.Path, err = exec.LookPath("sh"); err != nil {
			t.Fatal(err)
		}
		// In a user namespace of its own the limit is its own, too.
		c.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		}
		out, err := c.CombinedOutput()
		if c.ProcessState.ExitCode() == 77 {
			t.Skipf("the limit cannot be set here: %s", out)
		}
		if args[0] == "run" && c.ProcessState.ExitCode() != 125 {
			t.Errorf("%v: %v: %s", args, err, out)
		}
		if s := string(out); !strings.Contains(s, "user/max_user_namespaces=0") || !strings.Contains(s, "sysctl -w user.max_user_namespaces=") {
			t.Errorf("%v does not say which switch and how: %s", args, out)
		}
	}
}

// TestInheritedDescriptors: a detached box keeps nothing open that the command which started it had open.
func TestInheritedDescriptors(t *testing.T) {
	h := newHome(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := h.cmd("run", "-d", "--name", "b", "base", "sleep", "1000")
	for range 20 { // above those that every process of the box has of its own
		c.ExtraFiles = append(c.ExtraFiles, w)
	}
	out, err := c.CombinedOutput()
	w.Close()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Ends only if nobody holds the other end.
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadAll(r)
		read <- err
	}()
	until(t, "the pipe of the starting command is closed while the box runs", func() bool {
		select {
		case err := <-read:
			return err == nil
		default:
			return false
		}
	})
	if got := h.field("b", "{{.Status}}"); !strings.Contains(got, "running") {
		t.Errorf("the box is %s", got)
	}
	h.run("rm", "-f", "b")
}
