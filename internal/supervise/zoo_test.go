//go:build linux

package supervise

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/cgroup"
)

// The test program plays the processes of a box too: its first argument says which.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && strings.HasPrefix(os.Args[1], "role=") {
		if err := play(strings.TrimPrefix(os.Args[1], "role="), os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "zoo:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func play(role string, args []string) error {
	switch role {
	case "shim":
		return playShim(args[0])
	case "init":
		return playInit(args[0])
	case "outsider":
		return playOutsider(args[0], args[1])
	}
	return fmt.Errorf("no role %q", role)
}

// order is what a test tells its shim; answer is what comes back once the zoo is complete.
type order struct {
	Token  string         `json:"token"` // in the command line of every process of the zoo
	Dir    string         `json:"dir"`
	Cgroup *cgroup.Record `json:"cgroup"`
}

type answer struct {
	Shim, Init Handle
}

// zooSize is the shim, the init and the six that playInit starts.
const zooSize = 8

// playShim spawns an init without pdeathsig, so that nothing but the reaper ends it.
func playShim(arg string) error {
	var o order
	if err := json.Unmarshal([]byte(arg), &o); err != nil {
		return err
	}
	me := map[string]int{"pid": os.Getpid()}
	if _, err := TryLock(filepath.Join(o.Dir, "shim.lock"), me); err != nil {
		return err
	}
	lock, err := TryLock(filepath.Join(o.Dir, "init.lock"), me)
	if err != nil {
		return err
	}
	gate, open, err := os.Pipe()
	if err != nil {
		return err
	}
	done, ready, err := os.Pipe()
	if err != nil {
		return err
	}
	init := exec.Command("/proc/self/exe", "role=init", o.Token)
	init.ExtraFiles = []*os.File{gate, lock.File(), ready}
	init.Stderr = os.Stderr
	init.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}}
	if err := init.Start(); err != nil {
		return err
	}
	gate.Close()
	ready.Close()
	lock.Unlock()
	if o.Cgroup != nil {
		g, err := cgroup.Open(*o.Cgroup)
		if err != nil {
			return err
		}
		if err := g.Add(context.Background(), cgroup.Shim, os.Getpid()); err != nil {
			return err
		}
		if err := g.Add(context.Background(), cgroup.Tree, init.Process.Pid); err != nil {
			return err
		}
	}
	var a answer
	if a.Shim, err = Capture(os.Getpid()); err != nil {
		return err
	}
	if a.Init, err = Capture(init.Process.Pid); err != nil {
		return err
	}
	if _, err := open.Write([]byte{1}); err != nil {
		return err
	}
	if n, _ := done.Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("init failed")
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		return err
	}
	return forever()
}

// playInit starts processes that are hard to find or to kill.
func playInit(token string) error {
	if n, _ := os.NewFile(3, "gate").Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("gate closed")
	}
	for fd := 3; fd <= 5; fd++ {
		unix.CloseOnExec(fd)
	}
	runtime.LockOSThread() // a tracer is a thread
	for _, c := range []*exec.Cmd{
		exec.Command("sleep", token),
		{Path: "/bin/sleep", Args: []string{"sleep", token}, Env: []string{}},
		exec.Command("sh", "-c", "kill -STOP $$; : "+token),
		exec.Command("setsid", "sh", "-c", `(trap "" TERM HUP INT; exec sleep `+token+`) &`),
		{Path: "/bin/sleep", Args: []string{"sleep", token}, SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID}},
		{Path: "/bin/sleep", Args: []string{"sleep", token}, SysProcAttr: &syscall.SysProcAttr{Ptrace: true}},
	} {
		if err := c.Start(); err != nil {
			return fmt.Errorf("%v: %w", c.Args, err)
		}
	}
	if _, err := os.NewFile(5, "ready").Write([]byte{1}); err != nil {
		return err
	}
	return forever()
}

// playOutsider puts a child into a pid namespace and does not collect it: trap 2 of the facts.
func playOutsider(pid, token string) error {
	runtime.LockOSThread()
	ns, err := os.Open("/proc/" + pid + "/ns/pid")
	if err != nil {
		return err
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWPID); err != nil {
		return err
	}
	if err := exec.Command("sleep", token).Start(); err != nil {
		return err
	}
	fmt.Println("ready")
	return forever()
}

// forever waits for a kill; signals of the Go runtime's own end pause(2) again and again.
func forever() error {
	for {
		_ = unix.Pause()
	}
}

// observe counts the living processes with a token in their command line. It shares no code with the package.
func observe(token string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		b, err := os.ReadFile(d + "/cmdline")
		if err != nil || !bytes.Contains(b, []byte(token)) {
			continue
		}
		s, err := os.ReadFile(d + "/stat")
		if err != nil || bytes.Contains(s, []byte(") Z ")) || bytes.Contains(s, []byte(") X ")) {
			continue
		}
		if pid, _ := strconv.Atoi(filepath.Base(d)); pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

type zoo struct {
	answer
	order
	shim  *exec.Cmd
	group *cgroup.Group
	name  string
}

func (z *zoo) target() Target {
	t := Target{Name: z.name, BootID: z.Init.BootID, Shim: &z.answer.Shim, Init: &z.answer.Init,
		ShimLock: filepath.Join(z.Dir, "shim.lock"), InitLock: filepath.Join(z.Dir, "init.lock")}
	t.Cgroup = z.Cgroup
	return t
}

// startZoo starts a complete tree and sees that it lives.
func startZoo(t *testing.T, grouped bool) *zoo {
	t.Helper()
	z := &zoo{}
	// sleep takes the token for a number of seconds.
	z.Token = fmt.Sprintf("%d%09d", 1000000+os.Getpid(), time.Now().UnixNano()%1e9)
	z.name = "coffer-test" + z.Token + "-box-1"
	z.Dir = t.TempDir()
	if grouped {
		h, err := cgroup.Detect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if h.Kind() == cgroup.KindNone {
			t.Skip("no cgroup is writable here: " + h.Describe())
		}
		if z.group, err = h.Create(t.Context(), z.name, cgroup.Limits{}); err != nil {
			t.Fatal(err)
		}
		rec := z.group.Record()
		z.Cgroup = &rec
	}
	t.Cleanup(func() { z.clean(t) })
	arg, err := json.Marshal(z.order)
	if err != nil {
		t.Fatal(err)
	}
	z.shim = exec.Command("/proc/self/exe", "role=shim", string(arg))
	z.shim.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	z.shim.Stderr = os.Stderr
	out, err := z.shim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := z.shim.Start(); err != nil {
		t.Fatal(err)
	}
	if err := json.NewDecoder(out).Decode(&z.answer); err != nil {
		t.Fatalf("the zoo did not start: %v", err)
	}
	soon(t, "the whole zoo lives", func() bool {
		pids := observe(z.Token)
		return len(pids) >= zooSize && !slices.ContainsFunc(pids, passing)
	})
	return z
}

// passing tells a process of the zoo that ends by itself: a shell that has not stopped itself is on its way to start another.
func passing(pid int) bool {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return bytes.Contains(b, []byte("(setsid)")) || bytes.Contains(b, []byte("(sh)")) && !bytes.Contains(b, []byte("(sh) T "))
}

// clean ends what a failed test left, in its own way: by the observer's list, each held before it is looked at again.
func (z *zoo) clean(t *testing.T) {
	soon(t, "the zoo is cleaned up", func() bool {
		left := observe(z.Token)
		for _, pid := range left {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.Contains(b, []byte(z.Token)) {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			unix.Close(fd)
		}
		if z.group != nil {
			_ = z.group.Thaw(context.Background())
		}
		return len(left) == 0
	})
	if z.shim != nil && z.shim.Process != nil {
		_ = z.shim.Wait()
	}
	if z.group != nil {
		if err := z.group.Remove(context.Background()); err != nil {
			t.Errorf("clean up: %v", err)
		}
	}
}

func soon(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
