package supervise

import (
	"os"
	"strconv"
	"strings"
	"time"
)

// NamespaceMembers lists the processes in the pid namespace whose first process is init, init included.
func NamespaceMembers(init int) []int {
	ns := pidNamespace(init)
	if ns == 0 {
		return nil
	}
	var out []int
	for _, pid := range pids() {
		if pidNamespace(pid) == ns {
			out = append(out, pid)
		}
	}
	return out
}

// CPUTime is the processor time that a process has used, to a hundredth of a second.
func CPUTime(pid int) time.Duration {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	sys, _ := strconv.Atoi(f[12])
	return time.Duration(user+sys) * 10 * time.Millisecond
}

// ProportionalMemory is a process' share of the memory it uses, in bytes; 0 where it cannot be read.
func ProportionalMemory(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pss:"); ok {
			n, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return n << 10
		}
	}
	return 0
}
