package jail

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spawn starts the jail's first process behind its gate. The calling goroutine must be locked to a thread that lives as long as
// the jail should: the kernel kills the jail when that thread ends (pdeathsig follows the thread, not the process).
func Spawn(cfg Config) (*Jail, error) {
	exe := cfg.Exe
	if exe == "" {
		exe = "/proc/self/exe"
	}
	parent, child, err := controlPair()
	if err != nil {
		return nil, err
	}
	defer child.Close()

	cmd := &exec.Cmd{Path: exe, Args: []string{Marker, Arg, cfg.Name}, Env: []string{}, Dir: "/", Stderr: cfg.Stderr}
	cmd.ExtraFiles = []*os.File{child, cfg.Lock}
	next := firstFD
	add := func(f *os.File) int {
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		next++
		return next - 1
	}
	root := os.Geteuid() == 0
	o := order{Binds: append([]Bind(nil), cfg.Binds...), Servers: append([]FileServer(nil), cfg.Servers...), Program: cfg.Program,
		Without: without()}
	var mounts []*os.File
	defer func() {
		for _, f := range mounts {
			f.Close()
		}
	}()
	for i, b := range o.Binds {
		if !b.IDMapped || !root {
			continue
		}
		f, err := idMappedTree(b.Source, cfg.HostID)
		if err != nil {
			parent.Close()
			return nil, err
		}
		mounts = append(mounts, f)
		o.Binds[i].FD = add(f)
		o.KeepCaps = o.KeepCaps || !b.ReadOnly
	}
	for i := range o.Servers {
		o.Servers[i].FD = add(o.Servers[i].Socket)
	}
	for _, f := range o.Program.Files {
		o.Program.FDs = append(o.Program.FDs, add(f))
	}

	var files unix.Rlimit
	// Among few files, gVisor's start is slower. The descriptors below are closed by this, and so it must not be where they are to stay.
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &files) == nil && files.Cur > wideFD && !o.off(layerDescriptors) {
		wide, err := os.Open(os.DevNull)
		if err != nil {
			parent.Close()
			return nil, fmt.Errorf("start jail: %w", err)
		}
		defer wide.Close()
		for next < wideFD {
			add(nil)
		}
		add(wide)
	}

	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:                 o.cloneFlags(),
		Setsid:                     true,
		Pdeathsig:                  dieWithParent,
		GidMappingsEnableSetgroups: false,
	}
	if cfg.Cgroup != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(cfg.Cgroup.Fd())
	}
	uid, gid := os.Geteuid(), os.Getegid()
	switch {
	case cmd.SysProcAttr.Cloneflags&syscall.CLONE_NEWUSER == 0:
		o.DropTo = cfg.HostID
	case root:
		// The first process starts as the namespace's root, which is the host's, to reach root's files by path; it then
		// drops to id 1, the first of the jail's own unprivileged range.
		m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}, {ContainerID: 1, HostID: int(cfg.HostID), Size: IDCount}}
		cmd.SysProcAttr.UidMappings, cmd.SysProcAttr.GidMappings = m, m
		cmd.SysProcAttr.GidMappingsEnableSetgroups = true
		o.DropTo = 1
	default:
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
	}
	err = cmd.Start()
	if errors.Is(err, unix.ENOSYS) && cfg.Cgroup != nil {
		// A host's own filter that knows no clone3: the caller moves the process.
		parent.Close()
		cfg.Cgroup = nil
		return Spawn(cfg)
	}
	if err != nil {
		parent.Close()
		return nil, explainSpawn(err)
	}
	if cfg.Cgroup != nil && unborn(cmd.Process.Pid) {
		// Once the spawner's own control group was killed, some kernels (6.18 is one) kill whatever its members clone into another,
		// for good. A process that is moved there later is left alone.
		parent.Close() // should it live after all, its gate is shut for good
		_ = cmd.Wait()
		cfg.Cgroup = nil
		return Spawn(cfg)
	}
	return &Jail{cmd: cmd, control: parent, order: o, done: make(chan struct{}), ready: make(chan struct{})}, nil
}

// unborn tells whether a child that was started without an error had died before its program ran: it has no memory any more.
func unborn(pid int) bool {
	_, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	return errors.Is(err, unix.ENOENT)
}

// wideFD is open in the jail's first process, and closed in its program, to have their tables of descriptors made wide enough for what
// gVisor uses at once (253 to 255): to widen that of a process with threads has the kernel wait for all processors each time.
const wideFD = 255

// controlPair makes the spawner's and the jail's end of the control stream. Only the jail's end survives an exec.
func controlPair() (parent, child *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("control sockets of jail: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "jail"), os.NewFile(uintptr(fds[1]), "jail"), nil
}

// explainSpawn adds what to do where the kernel or its policy forbids user namespaces.
func explainSpawn(err error) error {
	for _, s := range Switches() {
		if s.Blocking {
			return fmt.Errorf("start jail: %w: %s; %s", err, s.Reason, s.Fix)
		}
	}
	return fmt.Errorf("start jail: %w", err)
}
