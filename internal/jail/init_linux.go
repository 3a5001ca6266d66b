package jail

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// ServeFunc makes ready to serve one of the jail's directories on a socket, and returns what does it until the peer goes away. All are
// made ready before any serves.
type ServeFunc func(s FileServer, socket, root *os.File) (func() error, error)

// Init is the whole life of a jail's first process, and returns its exit code. It must run before anything else of the program,
// in the process that [Spawn] started.
func Init(serve ServeFunc) int {
	// The parent's death must stay fatal through every change of credentials below, which is a matter of a thread; and what the
	// program inherits must be what this process' first thread has.
	runtime.LockOSThread()
	control := os.NewFile(controlFD, "control")
	var o order
	if err := json.NewDecoder(control).Decode(&o); err != nil {
		// The gate never opened: whoever spawned this is gone.
		return 42
	}
	// Everything that is inherited is meant for one reader; none may reach the program by accident.
	if !o.off(layerDescriptors) {
		closeOnExecFrom(controlFD)
	}
	enc := json.NewEncoder(control)
	code, err := live(&o, serve, enc)
	if err != nil {
		_ = enc.Encode(report{Error: err.Error()})
		return 1
	}
	_ = enc.Encode(report{Exit: &code})
	return code
}

func live(o *order, serve ServeFunc, enc *json.Encoder) (int, error) {
	if err := buildRoot(o); err != nil {
		return 0, err
	}
	roots := make([]*os.File, len(o.Servers))
	for i, s := range o.Servers {
		f, err := os.OpenFile(s.Root, unix.O_PATH, 0)
		if err != nil {
			return 0, fmt.Errorf("root of file server: %w", err)
		}
		roots[i] = f
	}
	if err := o.hide(roots); err != nil {
		return 0, err
	}
	// Before the rights to do so are given up.
	for _, path := range o.Program.Opens {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, fmt.Errorf("open %s for the program: %w", path, err)
		}
		o.Program.FDs = append(o.Program.FDs, fd)
	}
	layers, err := confine(o)
	if err != nil {
		return 0, err
	}
	pid, err := startProgram(o.Program)
	if err != nil {
		return 0, err
	}
	// Only now: the servers open descriptors that an exec would let through, and nothing is executed any more.
	run := make([]func() error, len(o.Servers))
	for i, s := range o.Servers {
		if run[i], err = serve(s, os.NewFile(uintptr(s.FD), "lisafs"), roots[i]); err != nil {
			return 0, fmt.Errorf("file server of %s: %w", s.Root, err)
		}
	}
	for i, s := range o.Servers {
		go func() {
			if err := run[i](); err != nil {
				fmt.Fprintf(os.Stderr, "jail: serve %s: %v\n", s.Root, err)
			}
		}()
	}
	if err := enc.Encode(report{Ready: true, Layers: layers}); err != nil {
		return 0, err
	}
	return reapUntil(pid)
}

func startProgram(p Program) (int, error) {
	files := []uintptr{0, 1, 2}
	for _, fd := range p.FDs {
		files = append(files, uintptr(fd))
	}
	pid, err := syscall.ForkExec(p.Path, p.Args, &syscall.ProcAttr{
		Dir: "/", Env: []string{}, Files: files,
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", filepath.Base(p.Path), err)
	}
	// The program has its own copies.
	for _, fd := range p.FDs {
		unix.Close(fd)
	}
	return pid, nil
}

// reapUntil reaps every child, adopted ones too, until the program has ended.
func reapUntil(pid int) (int, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case Outlives && err != nil:
			_ = unix.Pause()
			continue
		case err != nil:
			return 0, fmt.Errorf("wait for the program: %w", err)
		}
		if got != pid || Outlives {
			continue
		}
		if ws.Signaled() {
			return 128 + int(ws.Signal()), nil
		}
		return ws.ExitStatus(), nil
	}
}

func closeOnExecFrom(first uint) {
	// close_range exists since 5.9, its CLOEXEC flag since 5.11; older kernels get the slow way.
	if unix.CloseRange(first, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	for fd := range openDescriptors(int(first)) {
		unix.CloseOnExec(fd)
	}
}

// CloseInherited closes the descriptors from first on that came through an exec. A supervisor outlives the command that started it
// by far, and what that had open (somebody's pipe, say) is nothing to it. The runtime's own descriptors, which end with an exec,
// stay.
func CloseInherited(first int) {
	o := order{Without: without()}
	if o.off(layerDescriptors) {
		return
	}
	for fd := range openDescriptors(first) {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
}

// openDescriptors are this process' from first on.
func openDescriptors(first int) iter.Seq[int] {
	return func(yield func(int) bool) {
		dir, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			return
		}
		for _, e := range dir {
			if n, err := strconv.Atoi(e.Name()); err == nil && n >= first && !yield(n) {
				return
			}
		}
	}
}

// buildRoot makes a file system that holds the binds and a /proc of this pid namespace, and nothing else, and enters it.
func buildRoot(o *order) error {
	binds := o.Binds
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Sources are opened first: the new root is built over a directory of the old one, which may hide them.
	sources := make([]int, len(binds))
	for i, b := range binds {
		sources[i] = b.FD
		if b.FD != 0 {
			continue
		}
		fd, err := unix.Open(b.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", b.Source, err)
		}
		sources[i] = fd
	}
	keepHost, err := o.hostTree()
	if err != nil {
		return err
	}
	base, err := mountBase()
	if err != nil {
		return err
	}
	for i, b := range binds {
		if err := o.attach(base, b, sources[i]); err != nil {
			return err
		}
		unix.Close(sources[i])
	}
	if err := keepHost(base); err != nil {
		return err
	}
	if err := mountProc(base); err != nil {
		return err
	}
	if err := unix.Chdir(base); err != nil {
		return err
	}
	// The old root ends up under the new one and is let go of in one step.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return setAttr("/", unix.MOUNT_ATTR_RDONLY)
}

// hide takes the directories with a quota out of the jail's tree. The server has hold of them, and its program, which may have the same
// uid, could otherwise write to them by their paths.
func (o *order) hide(roots []*os.File) error {
	for i, s := range o.Servers {
		if s.Quota == 0 || o.off(layerHidden) {
			continue
		}
		if err := unix.Unmount(s.Root, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("hide %s: %w", s.Root, err)
		}
		for j := range o.Binds {
			if o.Binds[j].Target == s.Root {
				o.Binds[j].Target = "/proc/self/fd/" + strconv.Itoa(int(roots[i].Fd()))
			}
		}
	}
	return nil
}

func mountBase() (string, error) {
	var err error
	for _, dir := range []string{"/tmp", "/mnt", "/var/tmp", "/run", "/home"} {
		err = unix.Mount("coffer", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0755,size=1m")
		if err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("mount the jail's root: %w", err)
}

func (o *order) attach(base string, b Bind, fd int) error {
	target := filepath.Join(base, b.Target)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", b.Source, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
	} else {
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		f.Close()
	}
	if b.FD != 0 {
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("attach volume %s: %w", b.Source, err)
		}
	} else if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(fd), target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", b.Source, err)
	}
	attr := uint64(unix.MOUNT_ATTR_NODEV)
	if !o.off(layerNosuid) {
		attr |= unix.MOUNT_ATTR_NOSUID
	}
	if b.ReadOnly && !o.off(layerReadOnly) {
		attr |= unix.MOUNT_ATTR_RDONLY
	}
	if !b.Exec {
		attr |= unix.MOUNT_ATTR_NOEXEC
	}
	return setAttr(target, attr)
}

// setAttr adds mount attributes; mount_setattr never drops one that a user namespace may not drop, as a remount would.
func setAttr(target string, attr uint64) error {
	if err := unix.MountSetattr(unix.AT_FDCWD, target, 0, &unix.MountAttr{Attr_set: attr}); err != nil {
		return fmt.Errorf("restrict mount %s: %w (needs Linux 5.12 or newer)", target, err)
	}
	return nil
}

// procFiles is what the user-space kernel reads of /proc where no procfs of the namespace can be mounted (inside a container
// whose own /proc is partly covered).
var procFiles = []string{"sys/vm/mmap_min_addr", "sys/kernel/cap_last_cap", "cpuinfo"}

func mountProc(base string) error {
	dir := filepath.Join(base, "proc")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err := unix.Mount("proc", dir, "proc", flags, "")
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, name := range procFiles {
		b, err := readBounded("/proc/"+name, 1<<20)
		if err != nil {
			return err
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, b, 0o444); err != nil {
			return err
		}
	}
	return bindDescriptors(dir)
}

// bindDescriptors puts this process' own descriptors, through which the file server opens files anew, under a /proc that is none. They
// are those that the /proc of outside shows: only that one directory of it comes along, and it opens to nobody but this process.
func bindDescriptors(proc string) error {
	target := filepath.Join(proc, "self/fd")
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/proc/self/fd", target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("no /proc can be mounted in the jail, as in a container whose own is partly covered, nor the descriptors of "+
			"/proc/self/fd be had from outside: %w: give the container a whole /proc (docker run --security-opt systempaths=unconfined)", err)
	}
	return setAttr(target, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}

func readBounded(path string, max int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, max))
}
