//go:build linux

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/test/escape"
)

// attempt returns no error only when it got through.
type attempt struct {
	name string
	try  func(*prisoner) (detail string, err error)
}

func attempts() []attempt {
	list := []attempt{
		{"read another box's file", func(p *prisoner) (string, error) { return readHost(p.OtherFile) }},
		{"read the state database", func(p *prisoner) (string, error) { return readHost(p.Database) }},
		{"open a device", func(*prisoner) (string, error) { return readHost("/dev/zero") }},
		{"open a control group for writing", func(*prisoner) (string, error) { return "", openHost(cgroupFile(), unix.O_WRONLY) }},
		{"open a setting of the host for writing", func(*prisoner) (string, error) { return "", openHost("/proc/sys/kernel/core_pattern", unix.O_WRONLY) }},
		{"make a device node", func(*prisoner) (string, error) {
			err := unix.Mknod("/state/node", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))
			_ = os.Remove("/state/node")
			return "", err
		}},
		{"change the engine's program", func(*prisoner) (string, error) { return "", os.Chmod("/sentry", 0o755) }},
		{"change the image's mode", changeImageMode},
		{"open the image for writing", openImage},
		{"see a process of the host", seeProcess},
		{"signal a process of the host", func(p *prisoner) (string, error) { return "", unix.Kill(p.PID, 0) }},
		{"trace a process of the host", func(p *prisoner) (string, error) { return "", seize(p.PID) }},
		{"trace the jail's first process", func(*prisoner) (string, error) { return "", seize(os.Getppid()) }},
		{"take a descriptor of the jail's first process", takeDescriptor},
		{"have a descriptor that was not given", strayDescriptor},
		{"have a descriptor of the starting command", inheritedDescriptor},
		{"run a setuid program as another user", runSetuid},
		{"write to the box's files past their server", func(*prisoner) (string, error) {
			const path = "/state/past"
			err := os.WriteFile(path, []byte("x"), 0o600)
			_ = os.Remove(path)
			return "", err
		}},
		{"raise a limit", func(*prisoner) (string, error) {
			return "", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1, Max: 1})
		}},
		{"mount", func(*prisoner) (string, error) {
			err := unix.Mount("x", "/state", "tmpfs", 0, "")
			if err == nil {
				err = unix.Unmount("/state", unix.MNT_DETACH)
			}
			return "", err
		}},
		{"make a user namespace by unshare", func(*prisoner) (string, error) {
			return "", runNothing(&syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWUSER})
		}},
		{"make a user namespace by clone", func(*prisoner) (string, error) {
			return "", runNothing(&syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER})
		}},
		{"make a user namespace by clone3", clone3},
		{"connect to the host's loopback", func(p *prisoner) (string, error) {
			c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(p.Port)))
			if err == nil {
				c.Close()
			}
			return "", err
		}},
		{"connect to an abstract socket of the host", func(p *prisoner) (string, error) {
			c, err := net.Dial("unix", p.Abstract)
			if err == nil {
				c.Close()
			}
			return "", err
		}},
		{"open a packet socket", func(*prisoner) (string, error) { return socket(unix.AF_PACKET, unix.SOCK_RAW) }},
		{"open a vsock", func(*prisoner) (string, error) { return socket(unix.AF_VSOCK, unix.SOCK_STREAM) }},
		{"open a netlink socket", func(*prisoner) (string, error) { return socket(unix.AF_NETLINK, unix.SOCK_RAW) }},
		{"attach a shared segment of the host", func(p *prisoner) (string, error) {
			id, err := unix.SysvShmGet(p.ShmKey, 1, 0)
			return strconv.Itoa(id), err
		}},
		// Each of these is reached when its answer is not the filter's.
		{"call keyctl", func(*prisoner) (string, error) {
			return call(unix.SYS_KEYCTL, unix.KEYCTL_GET_KEYRING_ID, specKeyringSession, 0)
		}},
		{"call add_key", func(*prisoner) (string, error) { return call(unix.SYS_ADD_KEY, 0, 0, 0) }},
		{"call userfaultfd", func(*prisoner) (string, error) { return call(unix.SYS_USERFAULTFD, userModeOnly, 0, 0) }},
		{"call io_uring_setup", func(*prisoner) (string, error) { return call(unix.SYS_IO_URING_SETUP, 1, 0, 0) }},
		{"call perf_event_open", func(*prisoner) (string, error) { return call(unix.SYS_PERF_EVENT_OPEN, 0, 0, ^uintptr(0)) }},
		{"call bpf", func(*prisoner) (string, error) { return call(unix.SYS_BPF, 9999, 0, 0) }},
		{"call name_to_handle_at", func(*prisoner) (string, error) { return call(unix.SYS_NAME_TO_HANDLE_AT, 0, 0, 0) }},
		{"call process_vm_readv", func(*prisoner) (string, error) { return call(unix.SYS_PROCESS_VM_READV, uintptr(os.Getpid()), 0, 0) }},
		{"call kcmp", func(*prisoner) (string, error) {
			return call(unix.SYS_KCMP, uintptr(os.Getpid()), uintptr(os.Getpid()), 0)
		}},
		{"call setns", func(*prisoner) (string, error) { return call(unix.SYS_SETNS, ^uintptr(0), 0, 0) }},
		{"call fsopen", func(*prisoner) (string, error) { return call(unix.SYS_FSOPEN, 0, 0, 0) }},
		{"call finit_module", func(*prisoner) (string, error) { return call(unix.SYS_FINIT_MODULE, ^uintptr(0), 0, 0) }},
		{"call keyctl by the 32-bit entrance", foreignKeyctl},
	}
	for _, ns := range []string{"user", "ipc", "uts", "cgroup", "net", "mnt"} {
		list = append(list, attempt{"share the host's " + ns + " namespace", func(p *prisoner) (string, error) {
			have, err := os.Readlink("/proc/self/ns/" + ns)
			if err != nil {
				return "", fmt.Errorf("%w: %w", errUnknown, err)
			}
			if have != p.Namespaces[ns] {
				return "", fmt.Errorf("%s is not the host's %s", have, p.Namespaces[ns])
			}
			return have, nil
		}})
	}
	return list
}

// Values that golang.org/x/sys/unix has no names for.
const (
	specKeyringSession = ^uintptr(2) // KEY_SPEC_SESSION_KEYRING, -3
	userModeOnly       = 1           // UFFD_USER_MODE_ONLY
	keyctlNumber386    = 288
)

// onHost calls fn with the path as it is and, if that fails, as a jail without a root of its own shows it.
func onHost(path string, fn func(string) error) error {
	err := fn(path)
	if err != nil {
		if err2 := fn(escape.HostPrefix + path); err2 == nil || !errors.Is(err2, fs.ErrNotExist) {
			return err2
		}
	}
	return err
}

func readHost(path string) (string, error) {
	var b [4]byte
	err := onHost(path, func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Read(b[:])
		return err
	})
	return fmt.Sprintf("%q", b), err
}

func openHost(path string, flags int) error {
	return onHost(path, func(path string) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
}

// cgroupFile is a file of the control groups that only the host's root may write.
func cgroupFile() string {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		for _, prefix := range []string{"", escape.HostPrefix} {
			if _, err := os.Stat(prefix + dir + "/cgroup.procs"); err == nil {
				return dir + "/cgroup.procs"
			}
		}
	}
	return "/sys/fs/cgroup/cgroup.procs"
}

func changeImageMode(p *prisoner) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(p.conf.ImageFDs[0], &st); err != nil {
		return "", err
	}
	return "", unix.Fchmod(p.conf.ImageFDs[0], st.Mode&0o7777)
}

func openImage(p *prisoner) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(p.conf.ImageFDs[0], &st); err != nil {
		return "", err
	}
	// An owner who can write to the file can first make it writable.
	_ = unix.Fchmod(p.conf.ImageFDs[0], 0o600|st.Mode&0o7777)
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p.conf.ImageFDs[0]), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	_ = unix.Fchmod(p.conf.ImageFDs[0], st.Mode&0o7777)
	return "", err
}

func seeProcess(p *prisoner) (string, error) {
	return p.Mark, onHost("/proc/"+strconv.Itoa(p.PID)+"/cmdline", func(path string) error {
		b, err := os.ReadFile(path)
		if err == nil && !strings.Contains(string(b), p.Mark) {
			err = errors.New("another process")
		}
		return err
	})
}

// seize begins to trace a process, which goes on running; the end of this process ends it.
func seize(pid int) error {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}

// takeDescriptor copies the control stream of the jail's first process.
func takeDescriptor(*prisoner) (string, error) {
	fd, err := unix.PidfdOpen(os.Getppid(), 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	got, err := unix.PidfdGetfd(fd, 3, 0)
	if err == nil {
		unix.Close(got)
	}
	return "", err
}

func strayDescriptor(p *prisoner) (string, error) {
	for _, fd := range p.fds {
		if fd > p.given {
			// What it is tells whose it was.
			what, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
			return fmt.Sprintf("%d (%s), though %d was the last to be given", fd, what, p.given), nil
		}
	}
	return "", errors.New("none")
}

func inheritedDescriptor(p *prisoner) (string, error) {
	for _, fd := range p.fds {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && uint64(st.Dev) == p.LeakDev && st.Ino == p.LeakIno {
			return strconv.Itoa(fd), nil
		}
	}
	return "", errors.New("none")
}

func runSetuid(*prisoner) (string, error) {
	out, err := command(escape.SetuidPath, "euid").Output()
	if err != nil {
		return "", err
	}
	if string(out) == strconv.Itoa(os.Geteuid()) {
		return "", fmt.Errorf("it still ran as %s", out)
	}
	return string(out), nil
}

// command needs no /dev/null, which the jail does not have.
func command(name, arg string) *exec.Cmd {
	c := exec.Command(name, arg)
	c.Stdin, c.Stderr = os.Stdin, os.Stderr
	return c
}

func runNothing(attr *syscall.SysProcAttr) error {
	c := command("/sentry", "nothing")
	c.Stdout, c.SysProcAttr = os.Stdout, attr
	return c.Run()
}

// clone3 makes a child that ends at once.
func clone3(*prisoner) (string, error) {
	type cloneArgs struct{ flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls uint64 }
	args := cloneArgs{flags: unix.CLONE_NEWUSER, exitSignal: uint64(unix.SIGCHLD)}
	pid, _, e := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if e == 0 && pid == 0 {
		for {
			_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	runtime.KeepAlive(&args)
	if e != 0 {
		return "", e
	}
	_, err := unix.Wait4(int(pid), nil, 0, nil)
	return "", err
}

func socket(family, typ int) (string, error) {
	fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return "", fmt.Errorf("%w: %w", errUnknown, err)
	}
	if err == nil {
		unix.Close(fd)
	}
	return "", err
}

// call makes a system call that does nothing, and gets through when the kernel itself answers: the filter's answer is EPERM.
func call(nr, a, b, c uintptr) (string, error) {
	r, _, e := unix.Syscall6(nr, a, b, c, 0, 0, 0)
	return answer(r, e)
}

func answer(r uintptr, e syscall.Errno) (string, error) {
	switch e {
	case 0:
		return strconv.Itoa(int(r)), nil
	case unix.EPERM:
		return "", e
	case unix.ENOSYS:
		return "", fmt.Errorf("%w: %w", errUnknown, e)
	}
	return e.Error(), nil
}

// foreignKeyctl leaves the call to a child, which a kernel without that entrance ends.
func foreignKeyctl(*prisoner) (string, error) {
	out, err := command("/sentry", "int80").Output()
	if err != nil {
		return "", fmt.Errorf("%w: no entrance for 32-bit programs: %w", errUnknown, err)
	}
	r, err := strconv.Atoi(string(out))
	if err != nil {
		return "", err
	}
	if r < 0 && r > -4096 {
		return answer(0, syscall.Errno(-r))
	}
	return strconv.Itoa(r), nil
}
