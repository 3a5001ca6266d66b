package agent

import (
	"os"
	"slices"
	"strconv"
	"syscall"
)

// mainNumbers is what the number of the main process is a multiple of. The agent's threads, which have the numbers before it, are fewer.
const mainNumbers = 16

// steadyNumber sees to it that the next process gets a multiple of mainNumbers: the main process then has the same number after every
// start of its box, however many threads the agent has by then. Programs write their number into files, and a database that was
// killed takes the one it finds there for another server's, if a process of its user has it and that is not itself.
//
// Numbers are given out in turn, so those before it are used up by processes that end before they are any program. A box works with
// another number as well, so what cannot be found out is left as it is.
func steadyNumber() {
	threads := ownThreads()
	if len(threads) == 0 {
		return
	}
	first := slices.Max(threads)
	for used := 0; used < 2*mainNumbers; used++ {
		last := first + used
		for _, n := range ownThreads() {
			if n > first {
				last++ // one of the runtime's, begun meanwhile
			}
		}
		if (last+1)%mainNumbers == 0 {
			return
		}
		_, _ = syscall.ForkExec("/", []string{"/"}, &syscall.ProcAttr{}) // no directory can be executed
	}
}

// ownThreads lists the numbers of this program's threads.
func ownThreads() []int {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, n)
		}
	}
	return out
}
