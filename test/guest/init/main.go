//go:build linux

// Command init is the first process of a test guest: it makes a system of the initial file system and an empty disk, runs the programs
// that it is told to, says on the console how each ended, and powers off. It knows nothing of Coffer.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/test/guest/plan"
)

func main() {
	if err := run(); err != nil {
		say(plan.SaysFail, err)
	} else {
		say(plan.SaysPass)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// say begins a new line, whatever a program has left unfinished.
func say(words ...any) { fmt.Fprint(os.Stdout, "\n"+fmt.Sprintln(words...)) }

func run() error {
	if err := mount("/dev", "devtmpfs", "devtmpfs", 0, ""); err != nil {
		return err
	}
	b, err := os.ReadFile(plan.File)
	if err != nil {
		return err
	}
	var p plan.Plan
	if err := json.Unmarshal(b, &p); err != nil {
		return err
	}
	for _, m := range p.Modules {
		if err := load(m); err != nil {
			return fmt.Errorf("load %s: %w", m, err)
		}
	}
	if err := moveRoot(); err != nil {
		return fmt.Errorf("leave the initial file system: %w", err)
	}
	if err := mounts(p.Cgroups); err != nil {
		return err
	}
	for _, s := range p.Steps {
		code, err := execute(s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		say(plan.SaysEnd, s.Name, code)
	}
	return nil
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// moveRoot copies everything to the disk and makes that the root. From the kernel's own initial root pivot_root is refused, which a
// jail needs, and the extended attributes of users, which a box's files have, need more than a file system in memory on this kernel.
func moveRoot() error {
	if err := mount(plan.Disk, "/dev/vda", "ext4", 0, ""); err != nil {
		return err
	}
	err := filepath.WalkDir("/", func(p string, d fs.DirEntry, err error) error {
		to := plan.Disk + p
		switch {
		case err != nil:
			return err
		case p == "/":
			return nil
		case p == plan.Disk || p == "/dev":
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(to, 0o755)
		case d.Type() == fs.ModeSymlink:
			l, err := os.Readlink(p)
			if err != nil {
				return err
			}
			return os.Symlink(l, to)
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, b, 0o755); err != nil {
			return err
		}
		return os.Remove(p) // it would stay in memory
	})
	if err != nil {
		return err
	}
	if err := os.Chdir(plan.Disk); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

func mount(dir, dev, typ string, flags uintptr, opts string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, dir, typ, flags, opts); err != nil {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	return nil
}

func mounts(kind plan.Cgroups) error {
	for _, m := range []struct{ dir, typ, opts string }{
		{"/proc", "proc", ""}, {"/sys", "sysfs", ""}, {"/dev", "devtmpfs", ""}, {"/dev/pts", "devpts", "ptmxmode=0666"},
		{"/dev/shm", "tmpfs", "mode=1777"}, {"/run", "tmpfs", "mode=755"},
	} {
		if err := mount(m.dir, m.typ, m.typ, 0, m.opts); err != nil {
			return err
		}
	}
	if err := os.Mkdir("/tmp", 0o755); err != nil {
		return err
	}
	if err := os.Chmod("/tmp", 0o1777); err != nil {
		return err
	}
	for link, to := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2"} {
		_ = os.Symlink(to, link) // devtmpfs has the devices only
	}
	return cgroups(kind)
}

func cgroups(kind plan.Cgroups) error {
	const top = "/sys/fs/cgroup"
	if kind != plan.V1 {
		var flags uintptr
		if kind == plan.None {
			flags = unix.MS_RDONLY
		}
		return mount(top, "cgroup2", "cgroup2", flags, "")
	}
	if err := mount(top, "tmpfs", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, c := range []string{"memory", "cpu,cpuacct", "pids", "freezer"} {
		if err := mount(filepath.Join(top, c), "cgroup", "cgroup", 0, c); err != nil {
			return err
		}
	}
	return nil
}

// execute runs a program and collects everything that ends until it does: orphans come to the first process.
func execute(s plan.Step) (int, error) {
	pid, err := syscall.ForkExec(s.Argv[0], s.Argv, &syscall.ProcAttr{Dir: s.Dir, Env: s.Env, Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", strings.Join(s.Argv, " "), err)
	}
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 0, err
		case got == pid && ws.Signaled():
			return 128 + int(ws.Signal()), nil
		case got == pid:
			return ws.ExitStatus(), nil
		}
	}
}
