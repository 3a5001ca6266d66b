package supervise

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fileID identifies a file, whatever its path is called in whichever mount namespace.
type fileID struct{ dev, ino uint64 }

func idOf(path string) (fileID, bool) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return fileID{}, false
	}
	return fileID{uint64(st.Dev), st.Ino}, true
}

// pids lists the processes of /proc.
func pids() []int {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var out []int
	for _, n := range names {
		if p, err := strconv.Atoi(n); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// holdsLock tells whether a process holds the write lock on a file through one of its own descriptors. Having the file open is
// not enough: whoever looks at a lock has it open for a moment, and must not be killed for that.
func holdsLock(pid int, id fileID) bool {
	dir := "/proc/" + strconv.Itoa(pid)
	d, err := os.Open(dir + "/fdinfo")
	if err != nil {
		return false
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		b, err := os.ReadFile(dir + "/fdinfo/" + n)
		if err != nil || !hasWriteLock(string(b)) {
			continue
		}
		// Only locked descriptors are looked at, and even their file systems are not asked.
		if got, ok := idOfUnasked(dir + "/fd/" + n); ok && got == id {
			return true
		}
	}
	return false
}

// hasWriteLock tells whether a /proc/PID/fdinfo file shows a write lock held through that very descriptor:
// "lock: 1: OFDLCK  ADVISORY  WRITE -1 fe:00:1234 0 EOF".
func hasWriteLock(fdinfo string) bool {
	for line := range strings.Lines(fdinfo) {
		if v, ok := strings.CutPrefix(line, "lock:"); ok {
			if f := strings.Fields(v); len(f) >= 4 && f[1] == "OFDLCK" && f[3] == "WRITE" {
				return true
			}
		}
	}
	return false
}

// jailInits holds the processes that are pid 1 of a pid namespace below the caller's and hold the lock at path.
func jailInits(path string) []*Process {
	own := pidNamespace(os.Getpid())
	return holders(path, func(pid int) bool {
		if ns := pidNamespace(pid); ns != 0 && ns == own {
			return false // most processes of a host, at the price of one stat
		}
		return firstOfNamespace(pid)
	})
}

// lockHolders holds every process that holds the lock at path.
func lockHolders(path string) []*Process { return holders(path, func(int) bool { return true }) }

// holders holds each process before it looks at it, so that what it saw is true of what it holds.
func holders(path string, candidate func(pid int) bool) []*Process {
	id, ok := idOf(path)
	if !ok {
		return nil
	}
	var out []*Process
	for _, pid := range pids() {
		if pid == os.Getpid() || !candidate(pid) {
			continue
		}
		p, err := hold(pid)
		if err != nil {
			continue
		}
		if candidate(pid) && holdsLock(pid, id) && p.exists() {
			out = append(out, p)
			continue
		}
		p.Close()
	}
	return out
}

func firstOfNamespace(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return false
	}
	n := parseStatus(string(b)).nspid
	return len(n) > 1 && n[len(n)-1] == 1
}

// status is the part of /proc/PID/status that matters here.
type status struct {
	tracer int
	nspid  []int // from the reader's pid namespace down to the process' own
}

func parseStatus(s string) status {
	var st status
	for line := range strings.Lines(s) {
		k, v, _ := strings.Cut(line, ":")
		switch k {
		case "TracerPid":
			st.tracer, _ = strconv.Atoi(strings.TrimSpace(v))
		case "NSpid":
			st.nspid = nil
			for w := range strings.FieldsSeq(v) {
				n, err := strconv.Atoi(w)
				if err != nil {
					return status{}
				}
				st.nspid = append(st.nspid, n)
			}
		}
	}
	return st
}
