package agent

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killSession kills every process of a session and repeats until a look at the whole table finds none twice in a row: a
// process that forks while we look may have put its child where we had already been. A process that made a session of its own
// is no longer part of this one, on purpose: that is what a daemon does.
func (a *Agent) killSession(c *child) {
	// What the process is waited for by needs no table.
	a.reap.kill(c)
	deadline := time.Now().Add(killBound)
	pause := 200 * time.Microsecond
	for clean := 0; clean < 2 && time.Now().Before(deadline); {
		n := a.signalSession(c.pid, unix.SIGKILL)
		if n == 0 {
			clean++
			continue
		}
		clean = 0
		time.Sleep(pause)
		pause = min(2*pause, 10*time.Millisecond)
	}
}

// signalSession signals the live processes of a session and returns how many there were.
func (a *Agent) signalSession(sid int, sig unix.Signal) int {
	n := 0
	self := os.Getpid()
	for _, pid := range a.proc.pids() {
		if pid == self {
			continue
		}
		if s, err := unix.Getsid(pid); err != nil || s != sid {
			continue
		}
		// A dead process that its parent has not collected has a session, and never goes by a signal.
		if st, err := a.proc.stat(pid); err != nil || st.dead() {
			continue
		}
		_ = unix.Kill(pid, sig)
		n++
	}
	return n
}

// killAll ends every process but the agent. As the box's first process it can name them all at once.
func (a *Agent) killAll() {
	deadline := time.Now().Add(killBound)
	pause := 200 * time.Microsecond
	for time.Now().Before(deadline) {
		left := 0
		if os.Getpid() == 1 {
			_ = unix.Kill(-1, unix.SIGKILL)
			left = a.others()
		} else {
			for _, c := range a.reap.live() {
				a.killSession(c)
				left++
			}
		}
		if left == 0 {
			return
		}
		time.Sleep(pause)
		pause = min(2*pause, 10*time.Millisecond)
	}
	a.log.Warn("processes did not die", "after", killBound)
}

// others counts live processes that are not the agent.
func (a *Agent) others() int {
	n := 0
	for _, pid := range a.proc.pids() {
		if pid == os.Getpid() {
			continue
		}
		// Kernel threads, in a virtual machine, have no memory of their own and no signal ends them.
		if st, err := a.proc.stat(pid); err == nil && !st.dead() && st.vsize > 0 {
			n++
		}
	}
	return n
}

// procStat is what we use of /proc/PID/stat.
type procStat struct {
	comm         string
	state        byte
	ppid, sid    int
	utime, stime uint64 // in ticks
	start        uint64
	vsize        uint64
	rss          int64 // in pages
}

func (s procStat) dead() bool { return s.state == 'Z' || s.state == 'X' }

// parseStat reads a line of /proc/PID/stat. The name in it is free text and may hold anything, parentheses too: the fields
// begin after the last one.
func parseStat(line string) (procStat, error) {
	var st procStat
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || end < open {
		return st, os.ErrInvalid
	}
	st.comm = line[open+1 : end]
	f := strings.Fields(line[end+1:])
	if len(f) < 22 || len(f[0]) != 1 {
		return st, os.ErrInvalid
	}
	num := func(i int) uint64 { n, _ := strconv.ParseUint(f[i], 10, 64); return n }
	st.state = f[0][0]
	st.ppid, st.sid = int(num(1)), int(num(3))
	st.utime, st.stime, st.start, st.vsize = num(11), num(12), num(19), num(20)
	st.rss = int64(num(21))
	return st, nil
}
