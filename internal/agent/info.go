package agent

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// ticks is the unit of /proc's times, which the kernel has fixed for user space.
const ticks = 100

const (
	maxProcesses = 4096     // in one answer
	maxCommand   = 16 << 10 // of one process's arguments
)

func (a *Agent) processes() ([]wire.ProcessInfo, error) {
	up := a.uptime()
	self := os.Getpid()
	out := []wire.ProcessInfo{}
	size := 0
	names := make(map[uint32]string)
	for _, pid := range a.proc.pids() {
		st, err := a.proc.stat(pid)
		if pid == self || err != nil {
			continue // gone meanwhile
		}
		if self == 1 && st.vsize == 0 && !st.dead() {
			continue // a kernel thread
		}
		p := wire.ProcessInfo{
			PID: pid, PPID: st.ppid, Session: st.sid, State: string(st.state),
			CPU: time.Duration(st.utime+st.stime) * (time.Second / ticks),
			Age: max(0, up-time.Duration(st.start)*(time.Second/ticks)),
			RSS: st.rss * int64(os.Getpagesize()),
		}
		if uid, ok := a.proc.owner(pid); ok {
			p.UID = uid
			if _, ok := names[p.UID]; !ok {
				names[p.UID] = a.users.nameOf(p.UID)
			}
			p.User = names[p.UID]
		}
		cmd, _ := a.proc.read(strconv.Itoa(pid) + "/cmdline")
		cmd = bytes.TrimRight(cmd[:min(len(cmd), maxCommand)], "\x00")
		if len(cmd) == 0 {
			p.Command = []string{"[" + st.comm + "]"}
		} else {
			p.Command = strings.Split(string(cmd), "\x00")
		}
		size += len(cmd) + 512
		if len(out) == maxProcesses || size > wire.MaxReply/4 {
			break
		}
		out = append(out, p)
	}
	return out, nil
}

func (a *Agent) uptime() time.Duration {
	data, _ := a.proc.read("uptime")
	f, _, _ := strings.Cut(string(data), " ")
	sec, _ := strconv.ParseFloat(f, 64)
	return time.Duration(sec * float64(time.Second))
}

func (a *Agent) stats() (wire.Stats, error) {
	st := wire.Stats{Uptime: a.uptime(), Processes: max(0, len(a.proc.pids())-1)}
	mem, err := a.proc.read("meminfo")
	if err != nil {
		return st, err
	}
	for line := range strings.SplitSeq(string(mem), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			st.MemTotal = n << 10
		case "MemAvailable:":
			st.MemAvailable = n << 10
		}
	}
	var fs unix.Statfs_t
	if unix.Statfs("/", &fs) == nil {
		st.DiskTotal, st.DiskFree = int64(fs.Blocks)*fs.Bsize, int64(fs.Bavail)*fs.Bsize
	}
	if self, err := a.proc.stat(os.Getpid()); err == nil {
		st.AgentRSS = self.rss * int64(os.Getpagesize())
	}
	return st, nil
}
