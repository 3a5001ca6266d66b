package userland

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is what /proc tells of one process.
type process struct {
	pid, ppid, pgid, sid, ttyNr int
	comm, state, args           string
	uid                         uint32
	ticks                       uint64
	start                       uint64
	rss, vsz                    uint64 // KiB
}

func processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := "/proc/" + e.Name()
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue // gone since
		}
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		if open < 0 || end < open {
			continue
		}
		f := strings.Fields(string(stat[end+1:]))
		if len(f) < 22 {
			continue
		}
		num := func(i int) uint64 { n, _ := strconv.ParseUint(f[i], 10, 64); return n }
		p := process{pid: pid, comm: string(stat[open+1 : end]), state: f[0], ppid: int(num(1)), pgid: int(num(2)), sid: int(num(3)),
			ttyNr: int(num(4)), ticks: num(11) + num(12), start: num(19), vsz: num(20) / 1024, rss: num(21) * uint64(os.Getpagesize()) / 1024}
		if fi, err := os.Stat(dir); err == nil {
			p.uid = fi.Sys().(*syscall.Stat_t).Uid
		}
		if b, err := os.ReadFile(dir + "/cmdline"); err == nil && len(b) > 0 {
			p.args = strings.ReplaceAll(strings.TrimRight(string(b), "\x00"), "\x00", " ")
		} else {
			p.args = "[" + p.comm + "]"
		}
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b process) int { return a.pid - b.pid })
	return all, nil
}

func (p process) tty() string {
	switch major := p.ttyNr >> 8 & 0xfff; {
	case p.ttyNr == 0:
		return "?"
	case major >= 136 && major < 144:
		return fmt.Sprintf("pts/%d", p.ttyNr&0xff|p.ttyNr>>12&0xfff00+(major-136)*256)
	}
	return fmt.Sprintf("tty%d", p.ttyNr&0xff)
}

func (p process) time() string {
	s := p.ticks / 100
	return fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
}

func ps(c *call) error {
	// The letters of the other tradition come without a dash.
	for i, a := range c.args {
		if a != "" && a[0] != '-' && strings.Trim(a, "auxwefl") == "" {
			c.args[i] = "-" + a
		}
	}
	o, err := c.parse("e A a x u f l w o|format: p|pid: no-headers")
	if err != nil {
		return err
	}
	all, err := processes()
	if err != nil {
		return err
	}
	names := newIDs()
	cols := []string{"pid", "user", "time", "args"}
	switch {
	case o.has("o"):
		cols = strings.FieldsFunc(strings.Join(o.vals["o"], ","), func(r rune) bool { return r == ',' || r == ' ' })
	case o.has("u"):
		cols = []string{"user", "pid", "vsz", "rss", "tty", "stat", "time", "args"}
	case o.has("f"):
		cols = []string{"user", "pid", "ppid", "tty", "time", "args"}
	}
	var pids []string
	for _, p := range o.vals["p"] {
		pids = append(pids, strings.Split(p, ",")...)
	}
	value := func(p process, col string) (string, error) {
		switch col {
		case "pid", "tid":
			return strconv.Itoa(p.pid), nil
		case "ppid":
			return strconv.Itoa(p.ppid), nil
		case "pgid", "pgrp":
			return strconv.Itoa(p.pgid), nil
		case "sid", "sess":
			return strconv.Itoa(p.sid), nil
		case "user", "euser":
			return names.user(p.uid), nil
		case "uid", "euid":
			return strconv.Itoa(int(p.uid)), nil
		case "stat", "state", "s":
			return p.state, nil
		case "comm", "ucmd":
			return p.comm, nil
		case "args", "cmd", "command":
			return p.args, nil
		case "tty", "tt":
			return p.tty(), nil
		case "time", "cputime":
			return p.time(), nil
		case "rss":
			return strconv.FormatUint(p.rss, 10), nil
		case "vsz":
			return strconv.FormatUint(p.vsz, 10), nil
		}
		return "", errUsage("unknown column " + col)
	}
	var rows [][]string
	header, titled := make([]string, len(cols)), false
	for i, col := range cols {
		name, title, ok := strings.Cut(col, "=")
		cols[i] = name
		header[i] = strings.ToUpper(map[string]string{"args": "command", "cmd": "command"}[name])
		if header[i] == "" {
			header[i] = strings.ToUpper(name)
		}
		if ok {
			header[i] = title
		}
		titled = titled || header[i] != ""
	}
	if titled && !o.has("no-headers") {
		rows = append(rows, header)
	}
	found := false
	for _, p := range all {
		if len(pids) > 0 && !slices.Contains(pids, strconv.Itoa(p.pid)) {
			continue
		}
		found = true
		row := make([]string, len(cols))
		for i, col := range cols {
			if row[i], err = value(p, col); err != nil {
				return err
			}
		}
		rows = append(rows, row)
	}
	width := make([]int, len(cols))
	for _, r := range rows {
		for i, f := range r {
			width[i] = max(width[i], len(f))
		}
	}
	for _, r := range rows {
		for i, f := range r {
			switch {
			case i == len(r)-1:
				c.out.WriteString(f)
			case slices.Contains([]string{"pid", "ppid", "pgid", "sid", "rss", "vsz", "uid"}, cols[i]):
				fmt.Fprintf(c.out, "%*s ", width[i], f)
			default:
				fmt.Fprintf(c.out, "%-*s ", width[i], f)
			}
		}
		c.out.WriteByte('\n')
	}
	if !found {
		return errExit(1)
	}
	return nil
}

// parseSignal reads a signal's number or name, with or without SIG.
func parseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil && n >= 0 && n <= 64 {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if sig := unix.SignalNum(name); sig != 0 {
		return sig, nil
	}
	return 0, errUsage("unknown signal " + s)
}

// signalNames lists the signals that have names, by number, without SIG.
func signalNames() []string {
	var all []string
	for n := syscall.Signal(1); n < 32; n++ {
		all = append(all, strings.TrimPrefix(unix.SignalName(n), "SIG"))
	}
	return all
}

func kill(c *call) error { return killWith(c, syscall.Kill) }

func killWith(c *call, send func(pid int, sig syscall.Signal) error) error {
	sig, args := syscall.SIGTERM, c.args
	if len(args) > 0 && args[0] == "-l" {
		if len(args) > 1 { // of an exit code, too
			return c.each(args[1:], func(a string) error {
				n, err := strconv.Atoi(a)
				if err != nil {
					sig, err := parseSignal(a)
					fmt.Fprintln(c.out, int(sig))
					return err
				}
				name := unix.SignalName(syscall.Signal(n & 127))
				if name == "" {
					return errUsage("unknown signal " + a)
				}
				fmt.Fprintln(c.out, strings.TrimPrefix(name, "SIG"))
				return nil
			})
		}
		for i, name := range signalNames() {
			fmt.Fprintf(c.out, "%d %s\n", i+1, name)
		}
		return nil
	}
	var err error
	switch {
	case len(args) > 1 && args[0] == "-s":
		sig, err = parseSignal(args[1])
		args = args[2:]
	case len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' && args[0] != "--":
		sig, err = parseSignal(args[0][1:])
		args = args[1:]
	}
	if err != nil {
		return err
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		return errUsage("missing process id")
	}
	return c.each(args, func(a string) error {
		pid, err := strconv.Atoi(a)
		if err != nil {
			return fmt.Errorf("%s: no process id", a)
		}
		if err := send(pid, sig); err != nil {
			return fmt.Errorf("(%d): %w", pid, err)
		}
		return nil
	})
}

func sleep(c *call) error {
	if len(c.args) == 0 {
		return errUsage("missing operand")
	}
	var total time.Duration
	forever := false
	for _, a := range c.args {
		if a == "inf" || a == "infinity" {
			forever = true
			continue
		}
		d, err := parseDuration(a)
		if err != nil {
			return err
		}
		total += d
	}
	// Not select {}: where nothing else runs the runtime takes that for a deadlock, and ends.
	for forever {
		time.Sleep(math.MaxInt64)
	}
	time.Sleep(total)
	return nil
}

func parseDuration(s string) (time.Duration, error) {
	unit := time.Second
	num := s
	if n := len(s); n > 0 {
		if u, ok := map[byte]time.Duration{'s': time.Second, 'm': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour}[s[n-1]]; ok {
			unit, num = u, s[:n-1]
		}
	}
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || f < 0 || f > 1e9 {
		return 0, errUsage("invalid time " + s)
	}
	return time.Duration(f * float64(unit)), nil
}
