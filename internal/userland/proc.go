package userland

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
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

// become replaces this process by another program.
func (c *call) become(args, env []string) error {
	if err := c.out.Flush(); err != nil {
		return err
	}
	path, err := exec.LookPath(args[0])
	if err == nil {
		err = syscall.Exec(path, args, env)
	}
	return c.notRun(args[0], err)
}

// notRun says why a program cannot be run, with the exit code that shells give.
func (c *call) notRun(name string, err error) error {
	var ee *exec.Error
	if errors.As(err, &ee) {
		err = ee.Err
	}
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		c.warn(fmt.Errorf("%s: not found", name))
		return errExit(127)
	}
	c.warn(fmt.Errorf("%s: %w", name, err))
	return errExit(126)
}

func env(c *call) error {
	o, err := c.parse("+i|ignore-environment u|unset: 0|null C|chdir:")
	if err != nil {
		return err
	}
	vars := os.Environ()
	if o.has("i") || len(o.rest) > 0 && o.rest[0] == "-" {
		vars = nil
		if !o.has("i") {
			o.rest = o.rest[1:]
		}
	}
	drop := func(name string) {
		vars = slices.DeleteFunc(vars, func(v string) bool { return strings.HasPrefix(v, name+"=") })
	}
	for _, name := range o.vals["u"] {
		drop(name)
	}
	for len(o.rest) > 0 && strings.Contains(o.rest[0], "=") {
		name, _, _ := strings.Cut(o.rest[0], "=")
		drop(name)
		vars = append(vars, o.rest[0])
		o.rest = o.rest[1:]
	}
	if dir := o.val("C", ""); dir != "" {
		if err := os.Chdir(dir); err != nil {
			return err
		}
	}
	if len(o.rest) > 0 {
		return c.become(o.rest, vars)
	}
	end := "\n"
	if o.has("0") {
		end = "\x00"
	}
	for _, v := range vars {
		c.out.WriteString(v + end)
	}
	return nil
}

func printenv(c *call) error {
	if len(c.args) == 0 {
		return env(c)
	}
	return c.each(c.args, func(name string) error {
		v, ok := os.LookupEnv(name)
		if !ok {
			return errExit(1)
		}
		fmt.Fprintln(c.out, v)
		return nil
	})
}

func nohup(c *call) error {
	if len(c.args) == 0 {
		return errUsage("missing command")
	}
	signal.Ignore(syscall.SIGHUP)
	return c.become(c.args, os.Environ())
}

func timeout(c *call) error {
	o, err := c.parse("+s|signal: k|kill-after: preserve-status foreground v")
	if err != nil {
		return err
	}
	if err := o.need(2); err != nil {
		return err
	}
	after, err := parseDuration(o.rest[0])
	if err != nil {
		return err
	}
	sig, err := parseSignal(o.val("s", "TERM"))
	if err != nil {
		return err
	}
	later := time.Duration(0)
	if v := o.val("k", ""); v != "" {
		if later, err = parseDuration(v); err != nil {
			return err
		}
	}
	if err := c.out.Flush(); err != nil {
		return err
	}
	cmd := exec.Command(o.rest[1], o.rest[2:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// What the command starts is in its group, and must not stay behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: !o.has("foreground")}
	forward := make(chan os.Signal, 8)
	signal.Notify(forward, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	if err := cmd.Start(); err != nil {
		return c.notRun(o.rest[1], err)
	}
	send := func(sig syscall.Signal) {
		pid := cmd.Process.Pid
		if !o.has("foreground") {
			pid = -pid
		}
		_ = syscall.Kill(pid, sig) // it may have ended
		if sig != syscall.SIGKILL {
			_ = syscall.Kill(pid, syscall.SIGCONT) // a stopped one would not hear it
		}
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its state tells
		close(done)
	}()
	var expired, hard <-chan time.Time
	if after > 0 {
		expired = time.After(after)
	}
	timedOut := false
	for {
		select {
		case <-expired:
			timedOut = true
			if o.has("v") {
				c.warn(fmt.Errorf("sending signal %s to command %s", strings.TrimPrefix(unix.SignalName(sig), "SIG"), o.rest[1]))
			}
			send(sig)
			if later > 0 {
				hard = time.After(later)
			}
		case <-hard:
			send(syscall.SIGKILL)
		case got := <-forward:
			if got, ok := got.(syscall.Signal); ok {
				send(got)
			}
		case <-done:
			if timedOut && !o.has("preserve-status") {
				return errExit(124)
			}
			return errExit(exitCode(cmd.ProcessState))
		}
	}
}

// exitCode is a process's exit code as shells tell it.
func exitCode(st *os.ProcessState) int {
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return st.ExitCode()
}

func xargs(c *call) error {
	o, err := c.parse("+0|null n|max-args: I: r|no-run-if-empty t|verbose P: L:")
	if err != nil {
		return err
	}
	cmd := o.rest
	if len(cmd) == 0 {
		cmd = []string{"echo"}
	}
	number := func(name string) (int, error) {
		v := o.val(name, "")
		if v == "" {
			return 0, nil
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 && name != "P" || n < 0 {
			return 0, errUsage("invalid number " + v)
		}
		return n, nil
	}
	per, err1 := number("n")
	perLines, err2 := number("L")
	atOnce, err3 := number("P")
	for _, err := range []error{err1, err2, err3} {
		if err != nil {
			return err
		}
	}
	in := new(strings.Builder)
	if _, err := io.Copy(in, c.in); err != nil {
		return err
	}
	mark := o.val("I", "")
	var items []string
	var groups [][]string // what goes together in one call
	switch {
	case o.has("0"):
		if text := strings.TrimSuffix(in.String(), "\x00"); text != "" {
			items = strings.Split(text, "\x00")
		}
	case mark != "" || perLines > 0:
		for l := range strings.SplitSeq(in.String(), "\n") {
			if l = strings.TrimSpace(l); l != "" {
				items = append(items, l)
			}
		}
	default:
		items = splitQuoted(in.String())
	}
	switch {
	case mark != "":
		per = 1
	case perLines > 0:
		for lines := range slices.Chunk(items, perLines) {
			var words []string
			for _, l := range lines {
				words = append(words, splitQuoted(l)...)
			}
			groups = append(groups, words)
		}
		items = nil
	}
	for len(items) > 0 {
		n, size := 0, 0
		for n < len(items) && (per == 0 || n < per) && size < 96<<10 {
			size += len(items[n]) + 1
			n++
		}
		groups, items = append(groups, items[:n]), items[n:]
	}
	if len(groups) == 0 && !o.has("r") && mark == "" {
		groups = [][]string{nil}
	}
	var (
		mu     sync.Mutex
		wg     sync.WaitGroup
		status int
	)
	slots := make(chan struct{}, cmp.Or(atOnce, map[bool]int{true: len(groups) + 1, false: 1}[o.has("P")]))
	for _, words := range groups {
		args := slices.Clone(cmd)
		if mark != "" {
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], mark, words[0])
			}
		} else {
			args = append(args, words...)
		}
		slots <- struct{}{}
		mu.Lock()
		ended := status
		mu.Unlock()
		if ended == 124 {
			break
		}
		if o.has("t") {
			fmt.Fprintln(c.err, strings.Join(args, " "))
		}
		run := exec.Command(args[0], args[1:]...)
		run.Stdout, run.Stderr = os.Stdout, os.Stderr
		if err := run.Start(); err != nil {
			wg.Wait()
			return c.notRun(args[0], err)
		}
		wg.Go(func() {
			_ = run.Wait() // its state tells
			mu.Lock()
			defer mu.Unlock()
			switch code := exitCode(run.ProcessState); {
			case code == 255:
				status = 124
			case code != 0 && status == 0:
				status = 123
			}
			<-slots
		})
	}
	wg.Wait()
	if status != 0 {
		return errExit(status)
	}
	return nil
}

// splitQuoted cuts at blanks and takes off quotes and backslashes.
func splitQuoted(s string) []string {
	var all []string
	var cur strings.Builder
	quote, in := byte(0), false
	for i := 0; i < len(s); i++ {
		b := s[i]
		switch {
		case quote != 0 && b == quote:
			quote = 0
		case quote != 0:
			cur.WriteByte(b)
		case b == '\'' || b == '"':
			quote, in = b, true
		case b == '\\' && i+1 < len(s):
			i++
			cur.WriteByte(s[i])
			in = true
		case b == ' ' || b == '\t' || b == '\n':
			if in {
				all = append(all, cur.String())
				cur.Reset()
				in = false
			}
		default:
			cur.WriteByte(b)
			in = true
		}
	}
	if in {
		all = append(all, cur.String())
	}
	return all
}
