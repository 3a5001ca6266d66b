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
	"slices"
	"strconv"
	"strings"
	"sync"
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
	only   bool              // the script is one command, which may take the shell's place

	signals chan os.Signal
	kept    []syscall.Signal // never left to the kernel: this shell is typed into
	woken   chan struct{}    // has an element when pending may have

	mu      sync.Mutex // guards what follows
	jobs    []*job
	funcs   map[string]bool // the names of functions
	traps   map[syscall.Signal]string
	ignored map[syscall.Signal]bool
	pending []syscall.Signal
}

// replaceKey is the context's key for where the exec is that may replace the shell: a statement of the shell's own, in no
// pipeline, no subshell and no substitution. Those are goroutines of this process and must not take it away; nor must a job left
// in the background by an earlier statement, which is why this is no field of the shell.
type replaceKey struct{}

func sh(c *call) error {
	args := c.args
	var params []string
	command, interactive, state := false, false, ""
	for len(args) > 0 && len(args[0]) > 1 && (args[0][0] == '-' || args[0][0] == '+') && args[0] != "--" {
		flag := args[0]
		args = args[1:]
		if flag == "--login" {
			continue
		}
		if kind, ok := strings.CutPrefix(flag, "--state="); ok { // what fork starts
			state = kind
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
	s := &shell{c: c, parser: syntax.NewParser(syntax.Variant(syntax.LangBash)), signals: make(chan os.Signal, 16), woken: make(chan struct{}, 1),
		funcs: map[string]bool{}, traps: map[syscall.Signal]string{}, ignored: map[syscall.Signal]bool{}}
	for f := range strings.FieldsSeq(os.Getenv(ignoredEnv)) {
		if n, err := strconv.Atoi(f); err == nil {
			s.ignored[syscall.Signal(n)] = true
		}
	}
	go s.watch()
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
	env := shellEnv{expand.ListEnviron(withDefaults(os.Environ())...), map[string]string{nameVar: name, pidVar: strconv.Itoa(os.Getpid())}}
	s.runner, err = interp.New(interp.StdIO(os.Stdin, os.Stdout, os.Stderr), interp.Env(env), interp.Params(params...),
		interp.CallHandler(s.call), interp.ExecHandlers(s.exec), interp.OpenHandler(s.open))
	if err != nil {
		return errUsage(err.Error())
	}
	if state != "" {
		if err := s.become(state); err != nil {
			return err
		}
	}
	if script != nil {
		s.only = command
		return s.script(script, name)
	}
	if interactive || term.IsTerminal(0) {
		return s.interact()
	}
	return s.stdin()
}

// become makes this shell what the one was that forked it.
func (s *shell) become(kind string) error {
	if kind == "job" {
		// An interrupt is for what runs in the foreground.
		signal.Ignore(syscall.SIGINT, syscall.SIGQUIT)
	}
	f := os.NewFile(3, "state")
	defer f.Close()
	prog, err := s.parse(f, "state")
	if err != nil {
		return err
	}
	var status interp.ExitStatus
	for _, st := range prog.Stmts {
		if err := s.runner.Run(context.Background(), st); err != nil && !errors.As(err, &status) {
			return err
		}
	}
	return nil
}

// shellEnv adds variables of the shell's own to the environment.
type shellEnv struct {
	expand.Environ
	own map[string]string
}

func (e shellEnv) Get(name string) expand.Variable {
	if v, ok := e.own[name]; ok {
		return expand.Variable{Set: true, Kind: expand.String, Str: v}
	}
	return e.Environ.Get(name)
}

func (e shellEnv) Each(f func(name string, v expand.Variable) bool) {
	e.Environ.Each(f)
	for name := range e.own {
		if !f(name, e.Get(name)) {
			return
		}
	}
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
	prog, err := s.parse(r, name)
	if err != nil {
		s.c.warn(err)
		return errExit(2)
	}
	s.only = s.only && len(prog.Stmts) == 1
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
	if err := s.statement(st); err != nil {
		return err
	}
	src := s.actions()
	if src == "" || s.runner.Exited() {
		return nil
	}
	prog, err := s.parse(strings.NewReader(src), "")
	if err != nil {
		s.c.warn(err)
		return nil
	}
	status := s.status
	for _, st := range prog.Stmts {
		if err := s.statement(st); err != nil || s.runner.Exited() {
			return err
		}
	}
	s.status = status
	return nil
}

func (s *shell) statement(st *syntax.Stmt) error {
	call, ok := st.Cmd.(*syntax.CallExpr)
	ctx := context.Background()
	fed := slices.ContainsFunc(st.Redirs, func(r *syntax.Redirect) bool { // by a goroutine, which must go on
		return r.Op == syntax.Hdoc || r.Op == syntax.DashHdoc || r.Op == syntax.WordHdoc
	})
	if ok && !fed && !st.Negated && (len(call.Args) > 1 && call.Args[0].Lit() == "exec" || len(call.Args) > 0 && s.only) {
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
		prog, perr := s.parse(strings.NewReader(pending), "")
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
	// Not ignored, which the children would inherit.
	s.kept = []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM}
	signal.Ignore(syscall.SIGTTOU)
	signal.Notify(s.signals, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM)
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
		prog, err := s.parse(strings.NewReader(pending), "")
		if err != nil && syntax.IsIncomplete(err) && line != "" {
			continue
		}
		pending = ""
		if err != nil {
			s.c.warn(err)
			continue
		}
		for _, st := range prog.Stmts {
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
	main := !s.inSubshell(hc)
	if main && s.pendingSignal() != 0 && (args[0] != "exec" || len(args) > 1) {
		args = s.afterActions(hc, args)
	}
	if args[0] == "command" && len(args) > 1 && slices.Contains(ownNames(), args[1]) {
		return append([]string{ownCall + args[1]}, args[2:]...), nil
	}
	switch {
	case s.isFunction(args[0]):
		return args, nil
	case slices.Contains(ownNames(), args[0]):
		return append([]string{ownCall + args[0]}, args[1:]...), nil
	case args[0] == "eval":
		return []string{"eval", s.rewriteText(strings.Join(args[1:], " "))}, nil
	case (args[0] == "." || args[0] == "source") && len(args) > 1:
		if path, ok := sourced(hc, args[1]); ok {
			args[1] = sourcePrefix + path
		}
		return args, nil
	}
	if args[0] == "printf" && len(args) > 1 && beyondBuiltin(args[1]) {
		if path, err := interp.LookPathDir(hc.Dir, hc.Env, "printf"); err == nil {
			return append([]string{path}, args[1:]...), nil
		}
	}
	if ctx.Value(replaceKey{}) != hc.Pos || args[0] != "exec" && interp.IsBuiltin(args[0]) {
		return args, nil
	}
	prog := args
	if args[0] == "exec" {
		prog = args[1:]
	}
	path, err := interp.LookPathDir(hc.Dir, hc.Env, prog[0])
	if err != nil {
		return args, nil // the interpreter says so in its own way
	}
	if err := replaceFiles(hc.Stdin, hc.Stdout, hc.Stderr); err != nil {
		return args, nil
	}
	if err := os.Chdir(hc.Dir); err != nil {
		return args, nil
	}
	err = syscall.Exec(path, prog, s.exported(hc.Env))
	if errors.Is(err, syscall.ENOEXEC) {
		return args, nil
	}
	fmt.Fprintf(hc.Stderr, "sh: %s: %v\n", prog[0], err)
	return nil, interp.ExitStatus(126)
}

// replaceFiles makes files the standard ones. All are set aside first: one may have the number that another is to get.
func replaceFiles(files ...any) error {
	var fds []int
	for _, f := range files {
		file, ok := f.(*os.File)
		if !ok {
			return errors.New("not a file")
		}
		fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 10)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	for to, fd := range fds {
		if err := unix.Dup3(fd, to, 0); err != nil {
			return err
		}
	}
	return nil
}

// afterActions makes a call one that first runs what signals have set off.
func (s *shell) afterActions(hc interp.HandlerContext, args []string) []string {
	if (args[0] == "exit" || args[0] == "return") && len(args) == 1 {
		args = append(args, strconv.Itoa(hc.LastExitStatus))
	}
	var b strings.Builder
	b.WriteString(s.actions())
	for _, a := range args {
		b.WriteString("'" + strings.ReplaceAll(a, "'", `'\''`) + "' ")
	}
	return []string{"eval", b.String()}
}

func (s *shell) isFunction(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.funcs[name]
}

// beyondBuiltin tells whether a format asks for more than the interpreter's own printf has: precisions, floating-point
// numbers and quotes.
func beyondBuiltin(format string) bool {
	for {
		_, rest, ok := strings.Cut(format, "%")
		if !ok {
			return false
		}
		verb := strings.TrimLeft(rest, "-+ #0123456789")
		if verb != "" && strings.ContainsRune(".*aAeEfFgGq", rune(verb[0])) {
			return true
		}
		format = strings.TrimPrefix(rest, "%")
	}
}

// exported is the environment of children.
func (s *shell) exported(env expand.Environ) []string {
	var list []string
	for name, v := range variables(env) {
		if v.Exported && v.Kind == expand.String && name != ignoredEnv && !strings.HasPrefix(name, ownVar) {
			list = append(list, name+"="+v.String())
		}
	}
	slices.Sort(list)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ignored) > 0 {
		var nums []string
		for sig := range s.ignored {
			nums = append(nums, strconv.Itoa(int(sig)))
		}
		list = append(list, ignoredEnv+"="+strings.Join(nums, " "))
	}
	return list
}

// builtins are what call gives another name for the interpreter not to take it.
func (s *shell) builtins() map[string]func(context.Context, []string) error {
	return map[string]func(context.Context, []string) error{
		ownCall + "disown": disown, jobCall: s.background, subCall: s.subshell, ownCall + "jobs": s.listJobs, ownCall + "kill": s.kill, ownCall + "trap": s.trap,
		ownCall + "ulimit": s.ulimit, ownCall + "umask": s.umask, ownCall + "wait": s.wait,
	}
}

// exec runs programs. Signals from the terminal reach them without help; ending this shell's wait is all that a context can ask.
func (s *shell) exec(next interp.ExecHandlerFunc) interp.ExecHandlerFunc {
	builtins := s.builtins()
	return func(ctx context.Context, args []string) error {
		if f, ok := builtins[args[0]]; ok {
			return f(ctx, args)
		}
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
		cmd := exec.Cmd{Path: path, Args: args, Env: s.exported(hc.Env), Dir: hc.Dir, Stdin: hc.Stdin, Stdout: hc.Stdout, Stderr: hc.Stderr, WaitDelay: time.Second}
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
		if err := s.act(ctx); err != nil {
			return err
		}
		if cmd.ProcessState != nil {
			if code := exitCode(cmd.ProcessState); code != 0 {
				return interp.ExitStatus(code)
			}
			return nil
		}
		return err
	}
}
