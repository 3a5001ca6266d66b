package agent

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// reaper collects every dead child, its own and orphans that the kernel hands to the box's first process. One lock spans a
// fork with its registration, so that no status of a process that we started is taken for an orphan's, and a signal with the
// check that the process is not yet collected, so that no signal hits a later process of the same number.
type reaper struct {
	mu       sync.Mutex
	children map[int]*child
	sigs     chan os.Signal
	stopped  chan struct{}
	loop     sync.WaitGroup
}

// child is a process that we started.
type child struct {
	pid   int
	done  chan struct{} // closed when collected; exit is valid then
	ended bool          // under the reaper's lock
	exit  wire.ExitStatus
}

func newReaper() *reaper {
	r := &reaper{children: make(map[int]*child), sigs: make(chan os.Signal, 1), stopped: make(chan struct{})}
	signal.Notify(r.sigs, unix.SIGCHLD)
	r.loop.Go(func() {
		for {
			select {
			case <-r.sigs:
				r.collect()
			case <-r.stopped:
				return
			}
		}
	})
	return r
}

func (r *reaper) close() {
	signal.Stop(r.sigs)
	close(r.stopped)
	r.loop.Wait()
}

// start forks and registers. The main process of a box gets the number that it always has.
func (r *reaper) start(path string, args []string, attr *syscall.ProcAttr, main bool) (*child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if main {
		steadyNumber()
	}
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil {
		return nil, err
	}
	c := &child{pid: pid, done: make(chan struct{})}
	r.children[pid] = c
	return c, nil
}

func (r *reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws unix.WaitStatus
		var ru unix.Rusage
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, &ru)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		c := r.children[pid]
		if c == nil || !(ws.Exited() || ws.Signaled()) {
			continue
		}
		delete(r.children, pid)
		c.exit = exitStatus(ws, &ru)
		c.ended = true
		close(c.done)
	}
}

func exitStatus(ws unix.WaitStatus, ru *unix.Rusage) wire.ExitStatus {
	st := wire.ExitStatus{
		Code:   ws.ExitStatus(),
		User:   time.Duration(ru.Utime.Nano()),
		System: time.Duration(ru.Stime.Nano()),
		MaxRSS: ru.Maxrss << 10,
	}
	if ws.Signaled() {
		st.Signal = int(ws.Signal())
		st.Code = 128 + st.Signal
		st.CoreDump = ws.CoreDump()
	}
	return st
}

// signal sends to a process of ours that has not been collected.
func (r *reaper) signal(c *child, sig syscall.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.ended {
		_ = syscall.Kill(c.pid, sig)
	}
}

// kill ends a process of ours that has not been collected, and its process group, which it leads from its start on.
func (r *reaper) kill(c *child) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.ended {
		_ = syscall.Kill(-c.pid, unix.SIGKILL)
		_ = syscall.Kill(c.pid, unix.SIGKILL)
	}
}

// live lists what we started and has not been collected.
func (r *reaper) live() []*child {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*child, 0, len(r.children))
	for _, c := range r.children {
		out = append(out, c)
	}
	return out
}
