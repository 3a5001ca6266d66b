package agent

import (
	"io"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// procfs is the process table. From the box's start on it is a mount of the agent's own: that of the box its root can unmount, or
// cover by something that has other processes, or that never answers.
type procfs struct{ dir atomic.Pointer[os.Root] }

// own opens a view that has no name in the box any more. Nothing of the box runs yet.
func (p *procfs) own() error {
	if err := unix.Mount("proc", "/proc", "proc", noExec, ""); err != nil {
		return err
	}
	dir, err := os.OpenRoot("/proc")
	if uerr := unix.Unmount("/proc", unix.MNT_DETACH); err == nil {
		err = uerr
	}
	if err == nil {
		p.dir.Store(dir)
	}
	return err
}

func (p *procfs) close() {
	if dir := p.dir.Swap(nil); dir != nil {
		dir.Close()
	}
}

func (p *procfs) open(name string) (*os.File, error) {
	if dir := p.dir.Load(); dir != nil {
		return dir.Open(name)
	}
	return os.Open("/proc/" + name)
}

func (p *procfs) read(name string) ([]byte, error) {
	f, err := p.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// pids reads the process table.
func (p *procfs) pids() []int {
	d, err := p.open(".")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	out := make([]int, 0, len(names))
	for _, n := range names {
		if n[0] < '0' || n[0] > '9' {
			continue
		}
		if pid, err := strconv.Atoi(n); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

func (p *procfs) stat(pid int) (procStat, error) {
	data, err := p.read(strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	return parseStat(string(data))
}

// owner is a process' user.
func (p *procfs) owner(pid int) (uint32, bool) {
	d, err := p.open(strconv.Itoa(pid))
	if err != nil {
		return 0, false
	}
	defer d.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil {
		return 0, false
	}
	return st.Uid, true
}
