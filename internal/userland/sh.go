package userland

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

// shell runs scripts and lines that are typed.
type shell struct {
	c      *call
	runner *interp.Runner
	parser *syntax.Parser
	status interp.ExitStatus // of the last statement
}

// replaceKey is the context's key for where the exec is that may replace the shell: a statement of the shell's own, in no
// pipeline, no subshell and no substitution. Those are goroutines of this process and must not take it away; nor must a job left
// in the background by an earlier statement, which is why this is no field of the shell.
type replaceKey struct{}

func sh(c *call) error {
	args := c.args
	var params []string
	command, interactive := false, false
	for len(args) > 0 && len(args[0]) > 1 && (args[0][0] == '-' || args[0][0] == '+') && args[0] != "--" {
		flag := args[0]
		args = args[1:]
		if flag == "--login" {
			continue
		}
		keep := ""
		for _, f := range flag[1:] {
			switch f {
			case 'c':
				command = true
			case 'i':
				interactive = true
			case 'l', 's':
			case 'o':
				if len(args) == 0 {
					return errUsage("option -o needs a value")
				}
				params = append(params, flag[:1]+"o", args[0])
				args = args[1:]
			default:
				keep += string(f)
			}
		}
		if keep != "" {
			params = append(params, flag[:1]+keep)
		}
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	s := &shell{c: c, parser: syntax.NewParser(syntax.Variant(syntax.LangBash))}
	var script io.Reader
	name := "sh"
	switch {
	case command:
		if len(args) == 0 {
			return errUsage("option -c needs a command")
		}
		script = strings.NewReader(args[0])
		if args = args[1:]; len(args) > 0 {
			name, args = args[0], args[1:]
		}
	case len(args) > 0:
		f, err := os.Open(args[0])
		if err != nil {
			c.warn(err)
			return errExit(127)
		}
		defer f.Close()
		script, name = f, args[0]
		args = args[1:]
	}
	params = append(append(params, "--"), args...)
	var err error
	s.runner, err = interp.New(interp.StdIO(os.Stdin, os.Stdout, os.Stderr), interp.Env(expand.ListEnviron(withDefaults(os.Environ())...)),
		interp.Params(params...), interp.CallHandler(s.call), interp.ExecHandlers(s.exec))
	if err != nil {
		return errUsage(err.Error())
	}
	if script != nil {
		return s.script(script, name)
	}
	if interactive || term.IsTerminal(0) {
		return s.interact()
	}
	return s.stdin()
}

// withDefaults sees to it that programs are found even where no environment was given.
func withDefaults(env []string) []string {
	for _, v := range env {
		if strings.HasPrefix(v, "PATH=") {
			return env
		}
	}
	return append(env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

// script runs a whole script.
func (s *shell) script(r io.Reader, name string) error {
	prog, err := s.parser.Parse(r, name)
	if err != nil {
		s.c.warn(err)
		return errExit(2)
	}
	for _, st := range prog.Stmts {
		if err := s.run(st); err != nil || s.runner.Exited() {
			return s.end(err)
		}
	}
	return s.end(s.last())
}

// last is the status of a script that came to its end. An empty script has the interpreter do what was asked for at exit.
func (s *shell) last() error {
	if err := s.runner.Run(context.Background(), &syntax.File{}); err != nil {
		return err
	}
	if s.status != 0 {
		return s.status
	}
	return nil
}

func (s *shell) run(st *syntax.Stmt) error {
	call, ok := st.Cmd.(*syntax.CallExpr)
	ctx := context.Background()
	if ok && !st.Background && !st.Negated && len(call.Args) > 1 && call.Args[0].Lit() == "exec" {
		ctx = context.WithValue(ctx, replaceKey{}, call.Args[0].Pos())
	}
	err := s.runner.Run(ctx, st)
	var status interp.ExitStatus
	if err != nil && (!errors.As(err, &status) || s.runner.Exited()) {
		return err
	}
	s.status = status
	return nil // goes on after a command that failed
}

// end turns what the interpreter says into this program's end.
func (s *shell) end(err error) error {
	var status interp.ExitStatus
	if errors.As(err, &status) {
		return errExit(status)
	}
	return err
}

// stdin runs what comes in on the standard input, as many lines at a time as make whole statements and reading no further: the
// commands may want the rest.
func (s *shell) stdin() error {
	pending := ""
	for {
		line, err := s.rawLine()
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		pending += line
		prog, perr := s.parser.Parse(strings.NewReader(pending), "")
		if perr != nil && syntax.IsIncomplete(perr) && err == nil {
			continue
		}
		pending = ""
		if perr != nil {
			s.c.warn(perr)
			return errExit(2)
		}
		for _, st := range prog.Stmts {
			if err := s.run(st); err != nil || s.runner.Exited() {
				return s.end(err)
			}
		}
		if err != nil {
			return s.end(s.last())
		}
	}
}

// rawLine reads to the end of a line and not a byte further. At the end of the input there is an error too.
func (s *shell) rawLine() (string, error) {
	var line []byte
	for {
		var b [1]byte
		if n, err := s.c.in.Read(b[:]); n == 0 {
			if err == nil {
				continue
			}
			return string(line), err
		}
		if line = append(line, b[0]); b[0] == '\n' {
			return string(line), nil
		}
	}
}

// interact reads lines from a terminal. While a command runs the terminal is as it was found.
func (s *shell) interact() error {
	signal.Ignore(syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGTTOU)
	ints := make(chan os.Signal, 1)
	signal.Notify(ints, syscall.SIGINT)
	tty := term.NewTerminal(terminal{}, s.prompt())
	pending := ""
	for {
		if w, h, err := term.GetSize(0); err == nil {
			_ = tty.SetSize(w, h)
		}
		tty.SetPrompt(s.prompt())
		if pending != "" {
			tty.SetPrompt("> ")
		}
		line, err := s.readLine(tty)
		if err != nil && !errors.Is(err, term.ErrPasteIndicator) {
			if errors.Is(err, io.EOF) {
				fmt.Fprintln(s.c.err)
				return s.end(s.last())
			}
			return err
		}
		if line == "" && pending == "" {
			continue
		}
		pending += line + "\n"
		prog, err := s.parser.Parse(strings.NewReader(pending), "")
		if err != nil && syntax.IsIncomplete(err) && line != "" {
			continue
		}
		pending = ""
		if err != nil {
			s.c.warn(err)
			continue
		}
		for _, st := range prog.Stmts {
			select {
			case <-ints: // of the command before
			default:
			}
			err := s.run(st)
			if s.runner.Exited() {
				return s.end(err)
			}
			if err != nil {
				s.c.warn(err)
			}
		}
	}
}

func (s *shell) readLine(tty *term.Terminal) (string, error) {
	old, err := term.MakeRaw(0)
	if err != nil {
		return s.plainLine()
	}
	defer func() { _ = term.Restore(0, old) }()
	return tty.ReadLine()
}

// plainLine serves sh -i without a terminal.
func (s *shell) plainLine() (string, error) {
	fmt.Fprint(s.c.err, s.prompt())
	line, err := s.rawLine()
	if line != "" {
		err = nil
	}
	return strings.TrimSuffix(line, "\n"), err
}

func (s *shell) prompt() string {
	if v := s.runner.Vars["PS1"]; v.IsSet() && !strings.Contains(v.String(), `\`) {
		return v.String()
	}
	dir := s.runner.Dir
	if dir == "" {
		dir, _ = os.Getwd() // shown only
	}
	mark := "$ "
	if os.Geteuid() == 0 {
		mark = "# "
	}
	return dir + " " + mark
}

// terminal is the terminal as the line editor sees it: an interrupt clears the line instead of ending the shell.
type terminal struct{}

func (terminal) Write(p []byte) (int, error) { return os.Stdout.Write(p) }

func (terminal) Read(p []byte) (int, error) {
	n, err := os.Stdin.Read(p[:max(1, len(p)/4)])
	if i := bytes.IndexByte(p[:n], 3); i >= 0 && i+3 <= len(p) {
		// To the end of the line, all of it away, and return.
		return copy(p[i:], "\x05\x15\r") + i, err
	}
	return n, err
}

// call sees every command before it runs.
func (s *shell) call(ctx context.Context, args []string) ([]string, error) {
	hc := interp.HandlerCtx(ctx)
	if args[0] == "kill" {
		// The interpreter keeps this name for itself and does not implement it; the program has another one.
		if path, err := interp.LookPathDir(hc.Dir, hc.Env, "kill"); err == nil {
			return append([]string{path}, args[1:]...), nil
		}
	}
	if args[0] == "printf" && len(args) > 1 && beyondBuiltin(args[1]) {
		if path, err := interp.LookPathDir(hc.Dir, hc.Env, "printf"); err == nil {
			return append([]string{path}, args[1:]...), nil
		}
	}
	if args[0] != "exec" || ctx.Value(replaceKey{}) != hc.Pos {
		return args, nil
	}
	path, err := interp.LookPathDir(hc.Dir, hc.Env, args[1])
	if err != nil {
		return args, nil // the interpreter says so in its own way
	}
	for fd, f := range []any{hc.Stdin, hc.Stdout, hc.Stderr} {
		file, ok := f.(*os.File)
		if !ok {
			return args, nil
		}
		if int(file.Fd()) != fd {
			if err := unix.Dup3(int(file.Fd()), fd, 0); err != nil {
				return args, nil
			}
		}
	}
	if err := os.Chdir(hc.Dir); err != nil {
		return args, nil
	}
	err = syscall.Exec(path, args[1:], exported(hc.Env))
	fmt.Fprintf(hc.Stderr, "sh: %s: %v\n", args[1], err)
	return nil, interp.ExitStatus(126)
}

// beyondBuiltin tells whether a format asks for more than the interpreter's own printf has: precisions and floating-point numbers.
func beyondBuiltin(format string) bool {
	for {
		_, rest, ok := strings.Cut(format, "%")
		if !ok {
			return false
		}
		verb := strings.TrimLeft(rest, "-+ #0123456789")
		if verb != "" && strings.ContainsRune(".*aAeEfFgG", rune(verb[0])) {
			return true
		}
		format = strings.TrimPrefix(rest, "%")
	}
}

func exported(env expand.Environ) []string {
	var list []string
	env.Each(func(name string, v expand.Variable) bool {
		if v.Exported && v.Kind == expand.String {
			list = append(list, name+"="+v.String())
		}
		return true
	})
	return list
}

// exec runs programs. Signals from the terminal reach them without help; ending this shell's wait is all that a context can ask.
func (s *shell) exec(next interp.ExecHandlerFunc) interp.ExecHandlerFunc {
	return func(ctx context.Context, args []string) error {
		hc := interp.HandlerCtx(ctx)
		path, err := interp.LookPathDir(hc.Dir, hc.Env, args[0])
		if err != nil {
			if fi, serr := os.Stat(filepath.Join(hc.Dir, args[0])); strings.Contains(args[0], "/") && serr == nil && !fi.IsDir() {
				fmt.Fprintf(hc.Stderr, "sh: %s: permission denied\n", args[0])
				return interp.ExitStatus(126)
			}
			fmt.Fprintf(hc.Stderr, "sh: %s: not found\n", args[0])
			return interp.ExitStatus(127)
		}
		cmd := exec.Cmd{Path: path, Args: args, Env: exported(hc.Env), Dir: hc.Dir, Stdin: hc.Stdin, Stdout: hc.Stdout, Stderr: hc.Stderr, WaitDelay: time.Second}
		err = cmd.Start()
		if errors.Is(err, syscall.ENOEXEC) {
			// A script without a first line that says whose it is.
			cmd = exec.Cmd{Path: "/proc/self/exe", Args: append([]string{"sh", path}, args[1:]...), Env: cmd.Env, Dir: hc.Dir, Stdin: hc.Stdin, Stdout: hc.Stdout, Stderr: hc.Stderr}
			err = cmd.Start()
		}
		if err != nil {
			fmt.Fprintf(hc.Stderr, "sh: %s: %v\n", args[0], errors.Unwrap(err))
			return interp.ExitStatus(126)
		}
		err = cmd.Wait()
		if cmd.ProcessState != nil {
			if code := exitCode(cmd.ProcessState); code != 0 {
				return interp.ExitStatus(code)
			}
			return nil
		}
		return err
	}
}
