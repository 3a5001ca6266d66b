package userland

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
