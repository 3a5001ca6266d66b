// Package supervise ends the processes of one generation of a box and proves that they are gone. It finds them through kernel
// objects recorded at their birth (a cgroup, process identities, locks), or by names derived from the box's id when no record is
// left, and it signals nothing that it has not identified first. It knows no engine and no database.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of [Handle.Open].
var (
	// ErrGone says that the process has ended, on this boot or an earlier one.
	ErrGone = errors.New("process is gone")
	// ErrStranger says that the number now belongs to another process. It must not be signalled.
	ErrStranger = errors.New("the pid now belongs to another process")
)

// Handle is a process' identity, taken by its parent at its birth. A pid and a start time alone are no identity: start times are
// counted in ticks of 10 ms, within which a pid can be used again.
type Handle struct {
	BootID    string `json:"boot_id"`
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`          // ticks since boot
	PidfsIno  uint64 `json:"pidfs_ino,omitempty"` // unique for the boot; 0 before Linux 6.9
	PIDNS     uint64 `json:"pid_ns,omitempty"`    // inode of the process' pid namespace
	Cgroup    string `json:"cgroup,omitempty"`    // its cgroup2 path at the time
	// FileHandle reopens this very process or fails; empty where the kernel gives none.
	FileHandle     []byte `json:"file_handle,omitempty"`
	FileHandleType int32  `json:"file_handle_type,omitempty"`
}

// BootID identifies the running boot of the host.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Capture takes the identity of a process that cannot be reaped meanwhile: the caller itself or its unreaped child.
func Capture(pid int) (Handle, error) {
	h := Handle{PID: pid}
	var err error
	if h.BootID, err = BootID(); err != nil {
		return h, err
	}
	fd, err := pidfdOpen(pid)
	if err != nil {
		return h, fmt.Errorf("identify process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if h.PidfsIno = pidfsInode(fd); h.PidfsIno != 0 {
		h.FileHandle, h.FileHandleType = fileHandle(fd)
	}
	if h.StartTime, err = startTime(pid); err != nil {
		return h, fmt.Errorf("identify process %d: %w", pid, err)
	}
	h.PIDNS = pidNamespace(pid)
	h.Cgroup = cgroupPath(pid)
	// All of this was read by number. It is the held process' only if that one still has the number.
	if errors.Is(pidfdSignal(fd, 0), unix.ESRCH) {
		return Handle{}, fmt.Errorf("identify process %d: %w", pid, ErrGone)
	}
	return h, nil
}

const pidfsMagic = 0x50494446

func pidfsInode(fd int) uint64 {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != pidfsMagic || unix.Fstat(fd, &st) != nil {
		return 0
	}
	return st.Ino
}

func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	st, err := parseStat(string(b))
	return st.start, err
}

type stat struct {
	comm  string
	state byte
	ppid  int
	start uint64
}

// parseStat reads /proc/PID/stat; the command may itself hold parentheses and spaces.
func parseStat(s string) (stat, error) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 0 || end < open || end+2 > len(s) {
		return stat{}, errors.New("malformed stat")
	}
	f := strings.Fields(s[end+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, errors.New("malformed stat")
	}
	ppid, err1 := strconv.Atoi(f[1])
	start, err2 := strconv.ParseUint(f[19], 10, 64)
	return stat{comm: s[open+1 : end], state: f[0][0], ppid: ppid, start: start}, errors.Join(err1, err2)
}

func pidNamespace(pid int) uint64 {
	var st unix.Stat_t
	if unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/pid", &st) != nil {
		return 0
	}
	return st.Ino
}

// Process is a process held by a descriptor, so that no other can take its place.
type Process struct {
	fd  int
	PID int
}

// Open holds the process first and compares its identity then. Errors wrap [ErrGone] or [ErrStranger].
func (h Handle) Open() (*Process, error) {
	boot, err := BootID()
	if err != nil {
		return nil, err
	}
	if h.PID <= 0 || h.BootID != boot {
		return nil, ErrGone
	}
	if p := h.reopen(); p != nil {
		return p, nil
	}
	p, err := hold(h.PID)
	if err != nil {
		return nil, err
	}
	same := false
	if ino := pidfsInode(p.fd); ino != 0 && h.PidfsIno != 0 {
		same = ino == h.PidfsIno
	} else if start, err := startTime(h.PID); err == nil {
		// Start times tick every 10 ms, so a second fact is needed that no bystander shares: a pid namespace other than the
		// caller's own, which half the host is in, or a cgroup that was made for this generation.
		own := h.PIDNS != 0 && h.PIDNS != pidNamespace(os.Getpid()) && pidNamespace(h.PID) == h.PIDNS
		group := strings.Contains(h.Cgroup, "/coffer/coffer-") && cgroupPath(h.PID) == h.Cgroup
		// Read by number, so true of the held process only while that has not been reaped.
		same = start == h.StartTime && (own || group) && p.exists()
	}
	if !same {
		p.Close()
		return nil, ErrStranger
	}
	return p, nil
}

// reopen holds the process by its file handle; nil where that cannot be done, whether it is gone or the kernel has no such
// handles: the number decides then.
func (h Handle) reopen() *Process {
	if len(h.FileHandle) == 0 {
		return nil
	}
	fd, err := openFileHandle(h.FileHandle, h.FileHandleType)
	if err != nil {
		return nil
	}
	if ino := pidfsInode(fd); ino == 0 || ino != h.PidfsIno {
		unix.Close(fd) // a damaged record
		return nil
	}
	return &Process{fd: fd, PID: h.PID}
}

// exists tells whether the process, alive or not collected, still has its number.
func (p *Process) exists() bool { return !errors.Is(pidfdSignal(p.fd, 0), unix.ESRCH) }

func cgroupPath(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return ""
	}
	return parseCgroup2(string(b))
}

// parseCgroup2 is the cgroup2 path of a /proc/PID/cgroup; empty when there is none.
func parseCgroup2(s string) string {
	for line := range strings.Lines(s) {
		if p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::/"); ok {
			return "/" + p
		}
	}
	return ""
}

func hold(pid int) (*Process, error) {
	fd, err := pidfdOpen(pid)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("hold process %d: %w", pid, err)
	}
	return &Process{fd: fd, PID: pid}, nil
}

// Signal sends a signal to exactly this process. A process that has ended is [ErrGone].
func (p *Process) Signal(sig unix.Signal) error {
	err := pidfdSignal(p.fd, sig)
	if errors.Is(err, unix.ESRCH) {
		return ErrGone
	}
	return err
}

// Ended tells whether the process has ended, reaped or not.
func (p *Process) Ended() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 0)
	return err == nil && n == 1
}

// Wait returns when the process has ended.
func (p *Process) Wait(ctx context.Context) error {
	for {
		// Bounded, so that the end of ctx is noticed.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 20)
		if n == 1 && err == nil {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", p.PID, err)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// Close lets go of the process.
func (p *Process) Close() { unix.Close(p.fd) }

// poll calls done until it is true or ctx ends.
func poll(ctx context.Context, done func() bool) bool {
	for wait := 300 * time.Microsecond; ; wait = min(2*wait, 2*time.Millisecond) {
		if done() {
			return true
		}
		select {
		case <-ctx.Done():
			return done()
		case <-time.After(wait):
		}
	}
}
