package userland

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"mvdan.cc/sh/v3/interp"
)

// ignoredEnv names, by number, the signals that trap ” has a shell's children ignore. The kernel hands that on too, but Go's runtime
// takes it back at the start of each program for all but SIGHUP and SIGINT.
const ignoredEnv = "COFFER_IGNORED_SIGNALS"

// ignoreInherited ignores what the shell that started this program does.
func ignoreInherited() {
	for f := range strings.FieldsSeq(os.Getenv(ignoredEnv)) {
		if n, err := strconv.Atoi(f); err == nil {
			signal.Ignore(syscall.Signal(n))
		}
	}
}

// watch gathers signals. What they set off runs between commands.
func (s *shell) watch() {
	for sig := range s.signals {
		if sig, ok := sig.(syscall.Signal); ok {
			s.raise(sig)
		}
	}
}

// raise notes a signal that has an action, and tells whether it has.
func (s *shell) raise(sig syscall.Signal) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.traps[sig] == "" {
		return false
	}
	if !slices.Contains(s.pending, sig) {
		s.pending = append(s.pending, sig)
	}
	select {
	case s.woken <- struct{}{}:
	default:
	}
	return true
}

// pendingSignal returns the first signal whose action has not run, or 0.
func (s *shell) pendingSignal() syscall.Signal {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) == 0 {
		return 0
	}
	return s.pending[0]
}

// actions takes the script of the signals that have come since it was last called.
func (s *shell) actions() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for _, sig := range s.pending {
		b.WriteString(s.traps[sig] + "\n")
	}
	s.pending = nil
	return b.String()
}

// inSubshell tells whether a command runs in a goroutine's subshell, whose exit is not the shell's: actions wait for its end.
func (s *shell) inSubshell(hc interp.HandlerContext) bool { return hc.Env.Get(subVar).IsSet() }

// act runs what signals have set off. An error ends the shell.
func (s *shell) act(ctx context.Context) error {
	hc := interp.HandlerCtx(ctx)
	if s.inSubshell(hc) {
		return nil
	}
	src := s.actions()
	if src == "" {
		return nil
	}
	return hc.Builtin(ctx, []string{"eval", src + ":"})
}

func (s *shell) trap(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	args = args[1:]
	list := len(args) == 0
	if len(args) > 0 && args[0] == "-l" {
		fmt.Fprintln(hc.Stdout, strings.Join(signalNames(), " "))
		return nil
	}
	if len(args) > 0 && args[0] == "-p" {
		list, args = true, args[1:]
	}
	if len(args) > 0 && args[0] == "--" {
		list, args = list || len(args) == 1, args[1:]
	}
	if list {
		return s.showTraps(ctx, args)
	}
	action := "-"
	_, err := strconv.ParseUint(args[0], 10, 8)
	if reset := err == nil || len(args) == 1; !reset || args[0] == "-" {
		action, args = args[0], args[1:]
	}
	for _, name := range args {
		switch name {
		case "0", "EXIT", "ERR":
			do := s.rewriteText(action)
			if action == "-" {
				do = ""
			}
			if name == "0" {
				name = "EXIT"
			}
			if err := hc.Builtin(ctx, []string{"trap", do, name}); err != nil {
				return err
			}
			continue
		}
		sig, err := parseSignal(name)
		if err != nil || sig == 0 {
			fmt.Fprintf(hc.Stderr, "sh: trap: %s: no signal that can be trapped\n", name)
			return interp.ExitStatus(1)
		}
		s.setTrap(sig, action)
	}
	return nil
}

func (s *shell) setTrap(sig syscall.Signal, action string) {
	do := s.rewriteText(action)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.traps, sig)
	delete(s.ignored, sig)
	switch {
	case action == "":
		s.ignored[sig] = true
		signal.Ignore(sig)
	case action != "-":
		s.traps[sig] = do
		signal.Notify(s.signals, sig)
	case slices.Contains(s.kept, sig):
		signal.Notify(s.signals, sig)
	default:
		signal.Reset(sig)
	}
}

func (s *shell) showTraps(ctx context.Context, only []string) error {
	hc := interp.HandlerCtx(ctx)
	if len(only) == 0 {
		if err := hc.Builtin(ctx, []string{"trap"}); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := syscall.Signal(1); n < 65; n++ {
		do, ok := s.traps[n]
		name := strings.TrimPrefix(unix.SignalName(n), "SIG")
		if (ok || s.ignored[n]) && (len(only) == 0 || slices.Contains(only, name) || slices.Contains(only, "SIG"+name)) {
			fmt.Fprintf(hc.Stdout, "trap -- '%s' %s\n", strings.ReplaceAll(do, "'", `'\''`), name)
		}
	}
	return nil
}

func (s *shell) umask(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	old := unix.Umask(0)
	unix.Umask(old)
	switch args = args[1:]; {
	case len(args) == 0:
		fmt.Fprintf(hc.Stdout, "%04o\n", old)
	case args[0] == "-S":
		m := modeString(uint32(0o777 &^ old))
		show := func(s string) string { return strings.ReplaceAll(s, "-", "") }
		fmt.Fprintf(hc.Stdout, "u=%s,g=%s,o=%s\n", show(m[1:4]), show(m[4:7]), show(m[7:]))
	case args[0] == "-p":
		fmt.Fprintf(hc.Stdout, "umask %04o\n", old)
	default:
		if n, err := strconv.ParseUint(args[0], 8, 9); err == nil {
			unix.Umask(int(n))
			break
		}
		m, err := newMode(args[0], uint32(0o777&^old), true)
		if err != nil || m > 0o777 {
			fmt.Fprintf(hc.Stderr, "sh: umask: %s: invalid mode\n", args[0])
			return interp.ExitStatus(1)
		}
		unix.Umask(int(0o777 &^ m))
	}
	return nil
}

// limits are what ulimit knows: the option's letter, the kernel's name, the unit, and a name for people.
func limits() []struct {
	flag     byte
	resource int
	unit     uint64
	name     string
} {
	return []struct {
		flag     byte
		resource int
		unit     uint64
		name     string
	}{
		{'c', unix.RLIMIT_CORE, 512, "core file size (blocks)"}, {'d', unix.RLIMIT_DATA, 1024, "data seg size (kB)"},
		{'f', unix.RLIMIT_FSIZE, 512, "file size (blocks)"}, {'l', unix.RLIMIT_MEMLOCK, 1024, "locked memory (kB)"},
		{'m', unix.RLIMIT_RSS, 1024, "resident set (kB)"}, {'n', unix.RLIMIT_NOFILE, 1, "open files"},
		{'s', unix.RLIMIT_STACK, 1024, "stack size (kB)"}, {'t', unix.RLIMIT_CPU, 1, "cpu time (seconds)"},
		{'u', unix.RLIMIT_NPROC, 1, "user processes"}, {'v', unix.RLIMIT_AS, 1024, "virtual memory (kB)"},
	}
}

func (s *shell) ulimit(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	fail := func(format string, a ...any) error {
		fmt.Fprintf(hc.Stderr, "sh: ulimit: "+format+"\n", a...)
		return interp.ExitStatus(1)
	}
	soft, hard, all, which := false, false, false, byte('f')
	args = args[1:]
	for len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' {
		for _, f := range []byte(args[0][1:]) {
			switch f {
			case 'S':
				soft = true
			case 'H':
				hard = true
			case 'a':
				all = true
			default:
				which = f
			}
		}
		args = args[1:]
	}
	known := false
	for _, l := range limits() {
		if !all && l.flag != which {
			continue
		}
		known = true
		var lim unix.Rlimit
		if err := unix.Getrlimit(l.resource, &lim); err != nil {
			return fail("%s: %v", l.name, err)
		}
		if all || len(args) == 0 {
			v, text := lim.Cur, "unlimited"
			if hard && !soft {
				v = lim.Max
			}
			if v != unix.RLIM_INFINITY {
				text = strconv.FormatUint(v/l.unit, 10)
			}
			if all {
				text = fmt.Sprintf("%-26s (-%c) %s", l.name, l.flag, text)
			}
			fmt.Fprintln(hc.Stdout, text)
			continue
		}
		var v uint64
		switch args[0] {
		case "unlimited":
			v = unix.RLIM_INFINITY
		case "hard":
			v = lim.Max
		case "soft":
			v = lim.Cur
		default:
			n, err := strconv.ParseUint(args[0], 10, 53)
			if err != nil {
				return fail("%s: no limit", args[0])
			}
			v = n * l.unit
		}
		if soft || !hard {
			lim.Cur = v
		}
		if hard || !soft {
			lim.Max = v
		}
		if err := unix.Setrlimit(l.resource, &lim); err != nil {
			return fail("%s: %v", l.name, err)
		}
	}
	if !known {
		return fail("unknown option -%c", which)
	}
	return nil
}
