// Package signals reads and writes the names of signals as people write them.
package signals

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Real-time signals as the C library counts them: it keeps the first two for itself.
const (
	realtimeMin = 34
	realtimeMax = 64
)

// Parse reads a number, or a name with or without SIG, in any case. A real-time signal is RTMIN, RTMIN+n, RTMAX or RTMAX-n.
func Parse(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > realtimeMax {
			return 0, fmt.Errorf("signal %d: signals are numbered from 1 to %d", n, realtimeMax)
		}
		return n, nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return int(n), nil
	}
	for from, base := range map[string]int{"RTMIN": realtimeMin, "RTMAX": realtimeMax} {
		if n, ok := offset(name, from); ok && base+n >= realtimeMin && base+n <= realtimeMax {
			return base + n, nil
		}
	}
	return 0, fmt.Errorf("unknown signal %q: use a name such as SIGTERM, or a number", s)
}

// offset reads a name with a number added or taken away.
func offset(name, from string) (int, bool) {
	rest, ok := strings.CutPrefix(name, from)
	if !ok || rest == "" {
		return 0, ok
	}
	n, err := strconv.Atoi(rest)
	return n, err == nil && (rest[0] == '+' || rest[0] == '-')
}

// Name is a signal's name, or its number where it has none.
func Name(n int) string {
	if s := unix.SignalName(syscall.Signal(n)); s != "" {
		return s
	}
	return strconv.Itoa(n)
}
