package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/wire"
)

// scaffold makes what an engine would: an image with the programs of this host by bind mount, a state directory, volumes.
type scaffold struct {
	lower, state, newroot, vol string
}

// boxed starts an agent as the first process of new user, mount, pid and uts namespaces, with the real root step.
func boxed(t *testing.T, sc *scaffold) *wire.Client {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	*sc = scaffold{dir + "/lower", dir + "/state", dir + "/newroot", dir + "/vol"}
	for _, d := range []string{sc.lower + "/bin", sc.lower + "/etc", sc.lower + "/data", sc.state, sc.newroot, sc.vol} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []string{"sh", "cat", "ls", "stty", "sleep", "hostname", "touch", "tty", "wc", "readlink", "setsid"} {
		install(t, sc.lower, n)
	}
	os.WriteFile(sc.lower+"/etc/passwd", []byte("root:x:0:0::/root:/bin/sh\n"), 0o644)
	c := startAgent(t, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Env, rootfsEnv+"="+sc.newroot)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
	})
	return c
}

// install copies a program of this host, and the libraries it says it needs, into an image.
func install(t *testing.T, lower, name string) {
	t.Helper()
	prog, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("this host has no %s to put into a test image", name)
	}
	copyFile(t, prog, lower+"/bin/"+name)
	libs, _ := exec.Command("ldd", prog).Output() // none: it is static
	for f := range strings.FieldsSeq(string(libs)) {
		if filepath.IsAbs(f) {
			copyFile(t, f, lower+f)
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	if _, err := os.Stat(to); err == nil {
		return
	}
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Dir(to), 0o755)
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

func needNamespaces(t *testing.T) {
	t.Helper()
	cmd := exec.Command("/bin/true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS}
	if err := cmd.Run(); err != nil {
		t.Skipf("this host gives no user namespaces: %v", err)
	}
}

func TestRootfs(t *testing.T) {
	needNamespaces(t)
	var sc scaffold
	c := boxed(t, &sc)
	// What an image may hold against us: links out of the root where mounts and files go.
	outside := t.TempDir()
	os.Symlink(outside, sc.lower+"/linked")
	os.Symlink("../../../../../.."+outside+"/resolv", sc.lower+"/etc/resolv.conf")
	os.MkdirAll(sc.vol+"/0/sub", 0o755)
	os.WriteFile(sc.vol+"/0/hello", []byte("volume\n"), 0o644)
	os.WriteFile(sc.vol+"/1", []byte("single\n"), 0o644)
	os.MkdirAll(sc.vol+"/2", 0o755)
	os.WriteFile(sc.lower+"/etc/kept", []byte("below"), 0o644)
	// What lies over it wins.
	over := t.TempDir()
	os.Mkdir(over+"/etc", 0o755)
	os.WriteFile(over+"/etc/kept", []byte("mine"), 0o644)
	os.Chmod(over, 0o711)

	if _, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("true")}, wire.IO{}); err == nil {
		t.Fatal("a process started before the box was configured")
	}
	info, err := c.Configure(t.Context(), wire.Setup{
		Hostname: "testbox", Lower: []string{sc.lower, over}, State: sc.state,
		Tmpfs: []spec.Tmpfs{{Target: "/scratch", Size: 1 << 20, Mode: 0o700}},
		Volumes: []wire.SetupVolume{
			{Staging: sc.vol + "/2", Target: "/data/vol/sub", ReadOnly: true},
			{Staging: sc.vol + "/0", Target: "/data/vol"},
			{Staging: sc.vol + "/1", Target: "/etc/single"},
			{Staging: sc.vol + "/2", Target: "/linked/target"},
		},
		Files: []wire.SetupFile{
			{Path: "/etc/resolv.conf", Data: []byte("nameserver 1.2.3.4\n")},
			{Path: "/etc/hosts", Data: []byte("127.0.0.1 localhost\n")},
			{Path: "/etc/kept", Data: []byte("theirs"), Keep: true},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("warnings:", info.Warnings)
	if info.PID != 1 {
		t.Fatalf("agent is process %d", info.PID)
	}
	p := sh(`cat /data/vol/hello /etc/single /etc/hostname /etc/resolv.conf /etc/hosts; cat /etc/kept; echo
hostname; echo new >/data/vol/new; echo x >/data/vol/sub/x 2>/dev/null || echo read-only
echo $HOSTNAME $HOME; readlink /dev/fd; echo x >/dev/null && ls -d /dev/pts/ptmx /dev/shm; touch /scratch/x /written; ls -d /proc/1 /sys/kernel
ls /lower /state /newroot 2>/dev/null | wc -l; ls /`)
	got := run(t, c, p, "")
	want := "volume\nsingle\ntestbox\nnameserver 1.2.3.4\n127.0.0.1 localhost\nmine\ntestbox\nread-only\ntestbox /root\n/proc/self/fd\n/dev/pts/ptmx\n/dev/shm\n/proc/1\n/sys/kernel\n0\n"
	if !strings.HasPrefix(got.out, want) {
		t.Fatalf("got:\n%s\n%s\nwant:\n%s", got.out, got.err, want)
	}
	if ents, _ := os.ReadDir(outside); len(ents) != 0 {
		t.Fatal("the image's link led out of the box:", ents)
	}
	if b, _ := os.ReadFile(sc.vol + "/0/new"); string(b) != "new\n" {
		t.Fatal("volume did not get its file")
	}
	if _, err := os.Stat(sc.state + "/upper/written"); err != nil {
		t.Fatal("writable layer:", err)
	}
	if st, err := os.Stat(sc.state + "/upper"); err != nil || st.Mode().Perm() != 0o711 {
		t.Fatal("the image's root has another mode:", st.Mode(), err)
	}
	tty := sh("stty size; tty")
	tty.TTY, tty.WinSize = true, spec.WinSize{Rows: 5, Cols: 6}
	if got := run(t, c, tty, ""); got.out != "5 6\r\n/dev/pts/0\r\n" {
		t.Fatalf("terminal: %q %q", got.out, got.err)
	}
	limited := sh("ulimit -n")
	limited.Rlimits = []spec.Rlimit{{Name: "nofile", Soft: 33, Hard: 33}}
	if got := run(t, c, limited, ""); got.out != "33\n" {
		t.Fatalf("limits: %q %q", got.out, got.err)
	}
	// As the box's first process it ends all there is, also what made a session of its own.
	daemon := sh("setsid /bin/sh -c 'trap \"\" TERM; echo ready >/data/vol/daemon; while :; do sleep 1; done' </dev/null >/dev/null 2>&1 &")
	run(t, c, daemon, "")
	eventually(t, "the daemon", func() bool { _, err := os.Stat(filepath.Join(sc.vol, "0", "daemon")); return err == nil })
	if _, err := c.Shutdown(t.Context(), 0, 0); err != nil {
		t.Fatal(err)
	}
	<-c.Session().Done()
}

func TestRootfsReadOnly(t *testing.T) {
	needNamespaces(t)
	var sc scaffold
	c := boxed(t, &sc)
	os.MkdirAll(sc.vol+"/0", 0o755)
	_, err := c.Configure(t.Context(), wire.Setup{
		Hostname: "ro", Lower: []string{sc.lower}, State: sc.state, ReadOnly: true,
		Tmpfs:   []spec.Tmpfs{{Target: "/made/tmp"}},
		Volumes: []wire.SetupVolume{{Staging: sc.vol + "/0", Target: "/made/vol"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := run(t, c, sh(`touch /x 2>/dev/null || echo sealed; touch /made/tmp/x /made/vol/x /dev/shm/x && echo open; cat /etc/hostname`), "")
	if got.out != "sealed\nopen\nro\n" {
		t.Fatalf("%q %q", got.out, got.err)
	}
}

func TestResolveStaysInside(t *testing.T) {
	root := t.TempDir()
	b := &boxRoot{newroot: root}
	os.MkdirAll(root+"/a/b", 0o755)
	for name, target := range map[string]string{"abs": "/a", "up": "../../../a/b", "loop": "loop", "chain": "abs/b", "a/rel": "../abs"} {
		os.Symlink(target, filepath.Join(root, name))
	}
	for in, want := range map[string]string{
		"/":                "/",
		"/a/../../..":      "/",
		"abs/b":            "/a/b",
		"/up/c":            "/a/b/c",
		"/chain":           "/a/b",
		"/a/rel/b/new/dir": "/a/b/new/dir",
		"/none/../a":       "/a",
		"/abs/../up":       "/a/b",
	} {
		got, err := b.resolve(in)
		if err != nil || got != filepath.Join(root, want) {
			t.Errorf("%s: got %s, %v; want %s", in, got, err, want)
		}
	}
	if _, err := b.resolve("/loop/x"); err == nil {
		t.Error("a loop of links has an end")
	}
}
