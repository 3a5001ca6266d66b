//go:build linux

package escape

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Layers that the build for this test can leave out, by the names that `inspect` gives them.
const (
	user        = "user namespace"
	pid         = "pid namespace"
	ipc         = "ipc namespace"
	uts         = "uts namespace"
	cgroup      = "cgroup namespace"
	network     = "network namespace"
	root        = "own root"
	readOnly    = "read-only programs and images"
	nosuid      = "nosuid mounts"
	descriptors = "closed descriptors"
	hidden      = "files with a quota only through their server"
	rlimits     = "rlimits"
	caps        = "capabilities"
	uid         = "unprivileged host uid"
	tracing     = "first process closed to tracing"
	noNewPrivs  = "no new privileges"
	landlock    = "landlock"
	seccomp     = "seccomp"
)

// pastServer is stopped in boxes with a quota only.
const pastServer = "write to the box's files past their server"

// layers is a set of layers that must all be left out for an attempt to get through: each of them stops it by itself.
type layers []string

// ways are the sets with any of which an attempt gets through. Without any it never does.
type ways []layers

// stopped says what stops each attempt: first for boxes of root's, then for those of an ordinary user, whose jail has the user's own
// uid, and cannot be made without a user namespace.
func stopped() map[string][2]ways {
	same := func(l ...string) [2]ways { return [2]ways{{l}, {l}} }
	return map[string][2]ways{
		// The files of root's boxes belong each to uids of that box, so that not even root's uid opens them without a capability over
		// all of the host's uids.
		"read another box's file":                {{{root, landlock, uid, caps, user}}, {{root, landlock}}},
		"read the state database":                {{{root, landlock, uid}}, {{root, landlock}}},
		"open a device":                          same(root, landlock),
		"open a control group for writing":       {{{root, landlock, uid}}, nil}, // root's, whatever the jail
		"open a setting of the host for writing": {{{landlock, uid}}, nil},       // the same
		"make a device node":                     {{{user, caps, uid, seccomp}}, nil},
		"change the engine's program":            {{{readOnly, uid}}, {{readOnly}}},
		"change the image's mode":                {{{readOnly, uid}}, {{readOnly}}},
		"open the image for writing":             {{{readOnly, uid, landlock}}, {{readOnly, landlock}}},
		// A /proc that shows all processes can be mounted only by who rules over the host's pid namespace.
		"see a process of the host":    {{{root, landlock}, {pid, user}}, {{root, landlock}}},
		"signal a process of the host": {{{pid, uid}}, {{pid}}},
		// From inside a user namespace nothing outside of it can be traced.
		"trace a process of the host": {{{pid, user, uid, caps, landlock}}, nil},
		// A change of uid closes a process to tracing, too; the capability to trace opens every process of the namespace.
		"trace the jail's first process":                {{{tracing, uid}, {caps, uid}}, {{tracing}, {caps}}},
		"take a descriptor of the jail's first process": {{{tracing, uid, seccomp}, {caps, uid, seccomp}}, {{tracing, seccomp}, {caps, seccomp}}},
		"have a descriptor that was not given":          same(descriptors),
		"have a descriptor of the starting command":     same(descriptors),
		// The filter and Landlock set no_new_privs themselves. Root is nobody in an ordinary user's namespace, nor are its programs.
		"run a setuid program as another user":      {{{nosuid, noNewPrivs, landlock, seccomp}}, nil},
		"raise a limit":                             same(rlimits),
		pastServer:                                  same(hidden),
		"mount":                                     {{{caps, uid, landlock, seccomp}}, {{caps, landlock, seccomp}}},
		"make a user namespace by unshare":          same(seccomp),
		"make a user namespace by clone":            same(seccomp),
		"make a user namespace by clone3":           same(seccomp),
		"connect to the host's loopback":            same(network, seccomp),
		"connect to an abstract socket of the host": same(network),
		"open a packet socket":                      {{{caps, uid, seccomp}}, {{caps, seccomp}}},
		"open a vsock":                              same(seccomp),
		"open a netlink socket":                     same(seccomp),
		"attach a shared segment of the host":       same(ipc),
		"call keyctl":                               same(seccomp),
		"call add_key":                              same(seccomp),
		"call userfaultfd":                          same(seccomp),
		"call io_uring_setup":                       same(seccomp),
		"call perf_event_open":                      same(seccomp),
		"call bpf":                                  same(seccomp),
		"call name_to_handle_at":                    same(seccomp),
		"call process_vm_readv":                     same(seccomp),
		"call kcmp":                                 same(seccomp),
		"call setns":                                same(seccomp),
		"call fsopen":                               {{{seccomp, caps, uid}}, {{seccomp, caps}}},
		"call finit_module":                         {{{seccomp, caps, uid, user}}, nil}, // needs a capability over the host
		"call keyctl by the 32-bit entrance":        same(seccomp),
		"share the host's user namespace":           {{{user}}, nil},
		"share the host's ipc namespace":            same(ipc),
		"share the host's uts namespace":            same(uts),
		"share the host's cgroup namespace":         same(cgroup),
		"share the host's net namespace":            same(network),
		"share the host's mnt namespace":            {nil, nil}, // cannot be left out: its mounts would become the host's
	}
}

// TestEscape lets the prisoner try everything in the jail as it is, and then with each layer, and each set of layers that together
// stop an attempt, left out: exactly the attempts that nothing else stops must then get through.
func TestEscape(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and starts boxes")
	}
	dir := tempDir(t)
	programs := build(t, dir)
	if os.Geteuid() != 0 {
		t.Run("user", func(t *testing.T) { escapeAs(t, programs, os.Geteuid(), 1) })
		return
	}
	t.Run("root", func(t *testing.T) { escapeAs(t, programs, 0, 0) })
	t.Run("user", func(t *testing.T) { escapeAs(t, programs, ordinaryUser, 1) })
}

// ordinaryUser is in no user database, and has no subordinate ids.
const ordinaryUser = 48232

func escapeAs(t *testing.T, programs programs, as, column int) {
	c := newCell(t, programs, as)
	needed := map[string]ways{}
	sets := map[string]layers{}
	for name, both := range stopped() {
		if name == pastServer {
			continue
		}
		needed[name] = both[column]
		for _, l := range needed[name] {
			sets[key(l)] = l
			for _, one := range l {
				sets[one] = layers{one}
			}
		}
	}
	t.Run("as it is", func(t *testing.T) {
		c.judge(t, c.attempt(t, programs.real), needed, nil)
	})
	// For a writable volume the first process of root's jail keeps capabilities, of which the kernel must have none.
	t.Run("as it is, with a volume", func(t *testing.T) {
		with := *c
		with.name, with.box = "volume", c.volumeBox
		with.judge(t, with.attempt(t, programs.real), needed, nil)
	})
	bounded := *c
	bounded.name, bounded.box = "quota", c.quotaBox
	withQuota := maps.Clone(needed)
	withQuota[pastServer] = stopped()[pastServer][column]
	t.Run("as it is, with a quota", func(t *testing.T) {
		bounded.judge(t, bounded.attempt(t, programs.real), withQuota, nil)
	})
	t.Run("without "+hidden+", with a quota", func(t *testing.T) {
		if err := os.WriteFile(programs.test+".without", []byte(hidden), 0o644); err != nil {
			t.Fatal(err)
		}
		bounded.judge(t, bounded.attempt(t, programs.test), withQuota, layers{hidden})
	})
	for _, k := range slices.Sorted(maps.Keys(sets)) {
		t.Run("without "+k, func(t *testing.T) {
			left := sets[k]
			if err := os.WriteFile(programs.test+".without", []byte(strings.Join(left, "\n")), 0o644); err != nil {
				t.Fatal(err)
			}
			c.judge(t, c.attempt(t, programs.test), needed, left)
		})
	}
}

func key(l layers) string { return strings.Join(slices.Sorted(slices.Values(l)), ", ") }

// judge holds the outcomes against what stops each attempt.
func (c *cell) judge(t *testing.T, got map[string]Outcome, needed map[string]ways, left layers) {
	for name, by := range needed {
		o, tried := got[name]
		if !tried {
			t.Errorf("%s: not tried", name)
			continue
		}
		expect := slices.ContainsFunc(by, func(l layers) bool {
			return !slices.ContainsFunc(l, func(one string) bool { return !slices.Contains(left, one) })
		})
		switch {
		case o.Through && !expect:
			t.Errorf("%s: got through (%s), which only these should bring about: %v", name, o.Detail, by)
		case o.Unknown != "" && expect:
			t.Run(name, func(t *testing.T) { t.Skip(o.Unknown) })
		case !o.Through && expect:
			t.Errorf("%s: was stopped (%s), though each of these should let it through: %v", name, o.Detail, by)
		}
	}
	for name := range got {
		if _, ok := needed[name]; !ok {
			t.Errorf("%s: tried, and nothing is said of what stops it", name)
		}
	}
}

// programs are what the test runs.
type programs struct {
	real     string // the product
	test     string // the same, able to leave layers out
	prisoner string
}

func build(t *testing.T, dir string) programs {
	t.Helper()
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs Go, to build the prisoner: ", err)
	}
	p := programs{real: filepath.Join(dir, "coffer"), test: filepath.Join(dir, "coffer-test"), prisoner: filepath.Join(dir, "prisoner")}
	compile := func(out string, args ...string) {
		cmd := exec.Command(goTool, append([]string{"build", "-o", out}, args...)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", out, err, b)
		}
	}
	compile(p.prisoner, "./prisoner")
	compile(p.test, "-tags", "jailtest_without", "../../cmd/coffer")
	compile(p.real, "../../cmd/coffer")
	return p
}

// cell is a home with a box whose kernel is the prisoner.
type cell struct {
	home      string
	as        int
	name      string
	box       string // directory
	volumeBox string // another box', which has a writable volume
	quotaBox  string // and one with a quota
	plan      Plan
	leaked    *os.File
	setuid    []byte
}

func newCell(t *testing.T, programs programs, as int) *cell {
	t.Helper()
	c := &cell{home: tempDir(t), as: as, name: "prisoner"}
	if err := os.Chown(c.home, as, as); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, name := range []string{"prisoner", "volume", "quota", "other"} {
			if out, err := c.coffer(programs.real, "rm", "-f", "-v", name); err != nil {
				t.Errorf("remove %s: %v: %s", name, err, out)
			}
		}
	})
	must := func(args ...string) string {
		out, err := c.coffer(programs.real, args...)
		if err != nil {
			t.Fatalf("coffer %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(out)
	}
	must("run", "--name", "other", "base", "sh", "-c", "echo secret > /root/secret")
	must("create", "--name", "prisoner", "base", "true")
	must("create", "--name", "volume", "-v", c.volume(t)+":/data", "base", "true")
	must("create", "--name", "quota", "--disk-size", "20m", "base", "true")
	dir := func(name string) string {
		return filepath.Join(c.home, "boxes", must("inspect", "-f", "{{.ID}}", name))
	}
	c.box, c.volumeBox, c.quotaBox = dir("prisoner"), dir("volume"), dir("quota")
	c.plan = Plan{
		OtherFile: filepath.Join(dir("other"), "state/upper/root/secret"), Database: filepath.Join(c.home, "state.db"),
		Mark: "bystander-of-" + filepath.Base(c.home), Namespaces: map[string]string{},
	}
	for _, path := range []string{c.plan.OtherFile, c.plan.Database} {
		if _, err := os.Stat(path); err != nil {
			t.Fatal(err)
		}
	}
	c.bystander(t)
	c.sockets(t)
	c.segment(t)
	for _, ns := range []string{"user", "pid", "ipc", "uts", "cgroup", "net", "mnt"} {
		link, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		c.plan.Namespaces[ns] = link
	}
	leaked, err := os.Create(filepath.Join(c.home, "open-in-the-starting-command"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { leaked.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(leaked.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	c.leaked, c.plan.LeakDev, c.plan.LeakIno = leaked, uint64(st.Dev), st.Ino
	c.replaceKernel(t, programs.prisoner)
	return c
}

// coffer runs a command as the home's user. It has a file open at descriptors that no process down to the kernel uses otherwise.
func (c *cell) coffer(program string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	cmd.Env = []string{"COFFER_HOME=" + c.home, "PATH=" + os.Getenv("PATH"), "HOME=" + c.home}
	if c.leaked != nil {
		for range 30 {
			cmd.ExtraFiles = append(cmd.ExtraFiles, c.leaked)
		}
	}
	cmd.SysProcAttr = c.credential()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (c *cell) credential() *syscall.SysProcAttr {
	if c.as == os.Geteuid() {
		return nil
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.as), Gid: uint32(c.as)}}
}

// replaceKernel puts the prisoner in the place of the installed kernel. Its size must stay, by which Coffer knows a whole file.
func (c *cell) replaceKernel(t *testing.T, prisoner string) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(c.home, "assets/*/coffer-sentry"))
	if err != nil || len(found) != 1 {
		t.Fatalf("installed kernels: %v, %v", found, err)
	}
	st, err := os.Stat(found[0])
	if err != nil {
		t.Fatal(err)
	}
	if c.setuid, err = os.ReadFile(prisoner); err != nil {
		t.Fatal(err)
	}
	plan, err := json.Marshal(c.plan)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.setuid)+PlanSize > int(st.Size()) || len(plan) > PlanSize {
		t.Fatalf("the prisoner is larger than the kernel, or its plan too long")
	}
	program := make([]byte, st.Size())
	copy(program, c.setuid)
	copy(program[len(program)-PlanSize:], append(plan, bytes.Repeat([]byte{' '}, PlanSize-len(plan))...))
	tmp := found[0] + ".new"
	if err := os.WriteFile(tmp, program, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(tmp, c.as, c.as); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, found[0]); err != nil {
		t.Fatal(err)
	}
}

// attempt starts the box, and returns what the prisoner reports.
func (c *cell) attempt(t *testing.T, program string) map[string]Outcome {
	t.Helper()
	setuid := filepath.Join(c.box, strings.TrimPrefix(SetuidPath, "/"))
	if err := os.WriteFile(setuid, c.setuid, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(setuid, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	logPath := filepath.Join(c.box, "shim.log")
	if err := os.Truncate(logPath, 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	out, err := c.coffer(program, "start", c.name)
	log, lerr := os.ReadFile(logPath)
	if err == nil || lerr != nil || !strings.Contains(out, "the escape attempts are over") {
		t.Fatalf("start: %v: %s\n%s", err, out, log)
	}
	_, report, _ := strings.Cut(string(log), ReportMark)
	report, _, _ = strings.Cut(report, "\n")
	var got map[string]Outcome
	if err := json.Unmarshal([]byte(report), &got); err != nil {
		t.Fatalf("the prisoner's report: %v\n%s", err, log)
	}
	if c.name != "quota" {
		delete(got, pastServer) // there is nothing to be had that the server does not give
	}
	return got
}

// volume makes a directory of the user's.
func (c *cell) volume(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(c.home, "volume")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, c.as, c.as); err != nil {
		t.Fatal(err)
	}
	return dir
}

// bystander is a process of the user's.
func (c *cell) bystander(t *testing.T) {
	t.Helper()
	cmd := exec.Command("sleep", "100000")
	cmd.Args[0] = c.plan.Mark
	cmd.SysProcAttr = c.credential()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c.plan.PID = cmd.Process.Pid
}

// sockets listen on the loopback interface and under an abstract name.
func (c *cell) sockets(t *testing.T) {
	t.Helper()
	accept := func(network, addr string) net.Addr {
		l, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.Close()
			}
		})
		t.Cleanup(func() { l.Close(); wg.Wait() })
		return l.Addr()
	}
	c.plan.Abstract = "@" + filepath.Base(c.home)
	accept("unix", c.plan.Abstract)
	c.plan.Port = accept("tcp", "127.0.0.1:0").(*net.TCPAddr).Port
}

// segment is memory that everybody on the host may attach.
func (c *cell) segment(t *testing.T) {
	t.Helper()
	c.plan.ShmKey = 0x0c0ffe00 + os.Getpid()<<4&0xff0 + c.as&1
	id, err := unix.SysvShmGet(c.plan.ShmKey, 4096, unix.IPC_CREAT|unix.IPC_EXCL|0o666)
	if err != nil {
		t.Fatal(fmt.Errorf("shared segment %#x: %w", c.plan.ShmKey, err))
	}
	t.Cleanup(func() { _, _ = unix.SysvShmCtl(id, unix.IPC_RMID, nil) })
}

// tempDir is a directory that every user may enter.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cescape-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
