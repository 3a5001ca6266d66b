package userland

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"mvdan.cc/sh/v3/expand"
	"mvdan.cc/sh/v3/interp"
	"mvdan.cc/sh/v3/syntax"
)

// The interpreter's subshells and background jobs are goroutines of the shell: they have no process id, end with it and share its
// umask, limits and signals. A job, and a subshell that would change these, is therefore taken out of a script before it runs, and
// becomes a call of a name below. That starts another shell, which is told all that a fork would have left in it.
const (
	ownCall = "coffer:" // begins the names of commands that only this package calls
	jobCall = ownCall + "job"
	subCall = ownCall + "subshell"

	// Parameters that the interpreter does not have, or not as other shells do, are read from these variables instead.
	ownVar  = "__sh_"
	nameVar = ownVar + "name" // $0
	pidVar  = ownVar + "pid"  // $$, which is the same in all subshells
	jobVar  = ownVar + "job"  // $!
	subVar  = ownVar + "sub"  // set in the subshells that are goroutines
)

// ownNames are the builtins that the interpreter leaves out or does in part.
func ownNames() []string {
	return []string{"disown", "jobs", "kill", "trap", "ulimit", "umask", "wait"}
}

// parse reads a script and makes it one that the interpreter can run.
func (s *shell) parse(r io.Reader, name string) (*syntax.File, error) {
	f, err := s.parser.Parse(r, name)
	if err == nil {
		s.rewrite(f)
	}
	return f, err
}

// rewriteText is rewrite for a script that the interpreter is going to read itself.
func (s *shell) rewriteText(src string) string {
	f, err := syntax.NewParser(syntax.Variant(syntax.LangBash)).Parse(strings.NewReader(src), "")
	if err != nil || !s.rewrite(f) {
		return src // the interpreter says what is wrong with it
	}
	return source(f)
}

func source(n syntax.Node) string {
	var b strings.Builder
	if err := syntax.NewPrinter().Print(&b, n); err != nil {
		return ""
	}
	return b.String()
}

func (s *shell) rewrite(f *syntax.File) (changed bool) {
	mark := func(stmts []*syntax.Stmt) []*syntax.Stmt {
		changed = true
		return append([]*syntax.Stmt{{Cmd: &syntax.CallExpr{Assigns: []*syntax.Assign{{Name: &syntax.Lit{Value: subVar}, Value: word("1")}}}}}, stmts...)
	}
	syntax.Walk(f, func(n syntax.Node) bool {
		switch n := n.(type) {
		case *syntax.FuncDecl:
			if n.Name != nil {
				s.mu.Lock()
				s.funcs[n.Name.Value] = true
				s.mu.Unlock()
			}
		case *syntax.ParamExp:
			if v, ok := map[string]string{"0": nameVar, "$": pidVar, "!": jobVar}[n.Param.Value]; ok {
				n.Param, n.Short, changed = &syntax.Lit{ValuePos: n.Param.ValuePos, Value: v}, false, true
			}
		case *syntax.Stmt:
			if n.Background {
				st := *n
				st.Background = false
				*n = syntax.Stmt{Position: n.Position, Cmd: ownCommand(jobCall, source(&st), n.Position)}
				changed = true
				return false
			}
			switch cm := n.Cmd.(type) {
			case *syntax.Subshell:
				if needsProcess(cm.Stmts) {
					n.Cmd, changed = ownCommand(subCall, source(&syntax.File{Stmts: cm.Stmts}), n.Position), true
				} else {
					cm.Stmts = mark(cm.Stmts)
				}
			case *syntax.BinaryCmd:
				if cm.Op != syntax.Pipe && cm.Op != syntax.PipeAll {
					break
				}
				x := []*syntax.Stmt{cm.X}
				if needsProcess(x) {
					cm.X, changed = &syntax.Stmt{Position: cm.X.Position, Cmd: ownCommand(subCall, source(cm.X), cm.X.Position)}, true
				} else {
					cm.X = &syntax.Stmt{Position: cm.X.Position, Cmd: &syntax.Block{Stmts: mark(x)}}
				}
			}
		case *syntax.Assign:
			changed = unbackslash(n.Value) || changed
		case *syntax.Redirect:
			if n.Op != syntax.Hdoc && n.Op != syntax.DashHdoc {
				changed = unbackslash(n.Word) || changed
			}
		case *syntax.CaseClause:
			changed = unbackslash(n.Word) || changed
		case *syntax.CmdSubst:
			switch {
			case needsProcess(n.Stmts):
				n.Stmts, changed = []*syntax.Stmt{{Cmd: ownCommand(subCall, source(&syntax.File{Stmts: n.Stmts}), n.Left)}}, true
			case len(n.Stmts) > 0 && n.Stmts[0].Cmd != nil: // $(<file) must stay as it is
				n.Stmts = mark(n.Stmts)
			}
		case *syntax.ProcSubst:
			n.Stmts = mark(n.Stmts)
		}
		return true
	})
	return changed
}

// unbackslash quotes in another way what a backslash does: in assignments, redirections and case the interpreter leaves it in.
func unbackslash(w *syntax.Word) bool {
	if w == nil {
		return false
	}
	var parts []syntax.WordPart
	for _, part := range w.Parts {
		lit, ok := part.(*syntax.Lit)
		if !ok {
			parts = append(parts, part)
			continue
		}
		text := lit.Value
		for {
			i := strings.IndexByte(text, '\\')
			if i < 0 || i+1 == len(text) {
				break
			}
			_, size := utf8.DecodeRuneInString(text[i+1:])
			if i > 0 {
				parts = append(parts, &syntax.Lit{ValuePos: lit.ValuePos, Value: text[:i]})
			}
			quoted := text[i+1 : i+1+size]
			if quoted == "'" {
				parts = append(parts, &syntax.DblQuoted{Parts: []syntax.WordPart{&syntax.Lit{Value: quoted}}})
			} else {
				parts = append(parts, &syntax.SglQuoted{Value: quoted})
			}
			text = text[i+1+size:]
		}
		if text != "" {
			parts = append(parts, &syntax.Lit{ValuePos: lit.ValuePos, Value: text})
		}
	}
	changed := len(parts) != len(w.Parts)
	w.Parts = parts
	return changed
}

func word(s string) *syntax.Word {
	return &syntax.Word{Parts: []syntax.WordPart{&syntax.Lit{Value: s}}}
}

// ownCommand is a call that hands on a script, the shell's options and its parameters.
func ownCommand(name, src string, pos syntax.Pos) *syntax.CallExpr {
	var quoted []syntax.WordPart
	for i, part := range strings.Split(src, "'") {
		if i > 0 {
			quoted = append(quoted, &syntax.DblQuoted{Parts: []syntax.WordPart{&syntax.Lit{Value: "'"}}})
		}
		quoted = append(quoted, &syntax.SglQuoted{Value: part})
	}
	param := func(p string) *syntax.Word {
		return &syntax.Word{Parts: []syntax.WordPart{&syntax.DblQuoted{Parts: []syntax.WordPart{&syntax.ParamExp{Short: true, Param: &syntax.Lit{Value: p}}}}}}
	}
	first := word(name)
	first.Parts[0].(*syntax.Lit).ValuePos = pos
	return &syntax.CallExpr{Args: []*syntax.Word{first, {Parts: quoted}, param("-"), param("@")}}
}

// needsProcess tells whether statements change what belongs to a process. Those that only ask do not.
func needsProcess(stmts []*syntax.Stmt) bool {
	found := false
	for _, st := range stmts {
		syntax.Walk(st, func(n syntax.Node) bool {
			if st, ok := n.(*syntax.Stmt); ok && st.Background {
				return false
			}
			if call, ok := n.(*syntax.CallExpr); ok && len(call.Args) > 1 {
				switch call.Args[0].Lit() {
				case "trap", "umask", "ulimit":
					found = found || !strings.HasPrefix(call.Args[len(call.Args)-1].Lit(), "-")
				}
			}
			return !found
		})
	}
	return found
}

// job is a command in the background.
type job struct {
	number, pid int
	text        string
	done        chan struct{} // closed when it has ended, with its status in code
	code        int
}

// capture is a file for what the interpreter itself is made to print.
type capture struct{ bytes.Buffer }

func (*capture) Close() error { return nil }

// open opens the files of redirections, with the permissions that the umask leaves.
func (s *shell) open(ctx context.Context, path string, flag int, perm os.FileMode) (io.ReadWriteCloser, error) {
	if c, ok := ctx.Value(captureKey{}).(*capture); ok && path == ownCall {
		return c, nil
	}
	if path, ok := strings.CutPrefix(path, sourcePrefix); ok {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		c := new(capture)
		c.WriteString(s.rewriteText(string(b)))
		return c, nil
	}
	if flag&os.O_CREATE != 0 {
		perm = 0o666
	}
	return interp.DefaultOpenHandler()(ctx, path, flag, perm)
}

type captureKey struct{}

// sourcePrefix begins the names of files that the dot command reads, as call has it.
const sourcePrefix = ownCall + "source:"

// sourced finds what the dot command is to read: on the path, or else here.
func sourced(hc interp.HandlerContext, name string) (string, bool) {
	var dirs []string
	if !strings.Contains(name, "/") {
		dirs = filepath.SplitList(hc.Env.Get("PATH").String())
	}
	for _, dir := range append(dirs, hc.Dir) {
		p := filepath.Join(dir, name)
		if filepath.IsAbs(name) {
			p = name
		}
		if fi, err := os.Stat(p); err == nil && !fi.IsDir() {
			return p, true
		}
	}
	return "", false
}

// state is a script that makes a new shell like the one that is asked, as far as the environment and the arguments do not.
func (s *shell) state(ctx context.Context) string {
	hc := interp.HandlerCtx(ctx)
	var b strings.Builder
	vars := variables(hc.Env)
	for name, v := range vars {
		switch name {
		case "UID", "EUID", "GID", "PWD", subVar:
			continue
		}
		quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
		switch {
		case v.Kind == expand.String && (!v.Exported || v.ReadOnly):
			b.WriteString(name + "=" + quote(v.Str) + "\n")
		case v.Kind == expand.NameRef:
			b.WriteString("declare -n " + name + "=" + quote(v.Str) + "\n")
		case v.Kind == expand.Indexed:
			b.WriteString(name + "=(")
			for i, e := range v.List {
				if v.Indexes != nil {
					i = v.Indexes[i]
				}
				fmt.Fprintf(&b, "[%d]=%s ", i, quote(e))
			}
			b.WriteString(")\n")
		case v.Kind == expand.Associative:
			b.WriteString("declare -A " + name + "=(")
			for k, e := range v.Map {
				fmt.Fprintf(&b, "[%s]=%s ", quote(k), quote(e))
			}
			b.WriteString(")\n")
		}
		if v.ReadOnly {
			b.WriteString("readonly " + name + "\n")
		}
	}
	// Functions and options are known to the interpreter alone.
	funcs := new(capture)
	ctx = context.WithValue(ctx, captureKey{}, funcs)
	var ask strings.Builder
	s.mu.Lock()
	for name := range s.funcs {
		ask.WriteString("declare -f " + name + " >>" + ownCall + " || :\n")
	}
	s.mu.Unlock()
	ask.WriteString("shopt -o pipefail >>" + ownCall + "\n:")
	_ = hc.Builtin(ctx, []string{"eval", ask.String()}) // it ends with :
	text, option, _ := cutLast(strings.TrimSuffix(funcs.String(), "\n"))
	b.WriteString(text + "\n")
	if strings.Contains(option, "\ton") {
		b.WriteString("set -o pipefail\n")
	}
	return b.String()
}

// cutLast cuts the last line off.
func cutLast(s string) (before, last string, ok bool) {
	i := strings.LastIndexByte(s, '\n')
	return s[:max(i, 0)], s[i+1:], i >= 0
}

// variables reads an environment in which later entries take the place of earlier ones.
func variables(env expand.Environ) map[string]expand.Variable {
	vars := map[string]expand.Variable{}
	env.Each(func(name string, v expand.Variable) bool {
		if vars[name] = v; !v.IsSet() {
			delete(vars, name)
		}
		return true
	})
	return vars
}

// fork starts another shell with the script, options and parameters of a call that ownCommand has made.
func (s *shell) fork(ctx context.Context, kind string, args []string) (*job, error) {
	hc := interp.HandlerCtx(ctx)
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("start a shell: %w", err)
	}
	state := os.NewFile(uintptr(fd), "state")
	defer state.Close()
	if _, err := io.WriteString(state, s.state(ctx)); err != nil {
		return nil, fmt.Errorf("start a shell: %w", err)
	}
	if _, err := state.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("start a shell: %w", err)
	}
	argv := []string{"sh", "--state=" + kind}
	if args[2] != "" {
		argv = append(argv, "-"+args[2])
	}
	argv = append(append(argv, "-c", "--", args[1], hc.Env.Get(nameVar).String()), args[3:]...)
	cmd := exec.Cmd{Path: "/proc/self/exe", Args: argv, Env: s.exported(hc.Env), Dir: hc.Dir, ExtraFiles: []*os.File{state}}
	if kind == "sub" {
		cmd.Stdin = hc.Stdin
	}
	// A pipe of package exec's would end with this shell, so what is no file gets one here, read to its end as $() is.
	var r, w *os.File
	for i, to := range []io.Writer{hc.Stdout, hc.Stderr} {
		std := []*io.Writer{&cmd.Stdout, &cmd.Stderr}[i]
		_, isFile := to.(*os.File)
		switch {
		case to == io.Discard:
			continue
		case isFile:
			*std = to
			continue
		case w == nil:
			if r, w, err = os.Pipe(); err != nil {
				return nil, fmt.Errorf("start a shell: %w", err)
			}
			defer r.Close()
			defer w.Close()
		}
		*std = w
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a shell: %w", err)
	}
	j := &job{pid: cmd.Process.Pid, text: args[1], done: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its state tells
		j.code = exitCode(cmd.ProcessState)
		close(j.done)
	}()
	if w != nil {
		w.Close()
		if _, err := io.Copy(hc.Stdout, r); err != nil {
			return nil, err
		}
	}
	return j, nil
}

func (s *shell) subshell(ctx context.Context, args []string) error {
	j, err := s.fork(ctx, "sub", args)
	if err != nil {
		return err
	}
	<-j.done
	return exitStatus(j.code)
}

func (s *shell) background(ctx context.Context, args []string) error {
	j, err := s.fork(ctx, "job", args)
	if err != nil {
		return err
	}
	s.mu.Lock()
	j.number = 1
	if n := len(s.jobs); n > 0 {
		j.number = s.jobs[n-1].number + 1
	}
	s.jobs = append(s.jobs, j)
	s.mu.Unlock()
	return interp.HandlerCtx(ctx).Builtin(ctx, []string{"eval", jobVar + "=" + strconv.Itoa(j.pid)})
}

func exitStatus(code int) error {
	if code == 0 {
		return nil
	}
	return interp.ExitStatus(code)
}

// find returns the job that a process id or %number names.
func (s *shell) find(name string) *job {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == "%%" || name == "%+" || name == "%" {
		if len(s.jobs) == 0 {
			return nil
		}
		return s.jobs[len(s.jobs)-1]
	}
	i := slices.IndexFunc(s.jobs, func(j *job) bool { return strconv.Itoa(j.pid) == name || "%"+strconv.Itoa(j.number) == name })
	if i < 0 {
		return nil
	}
	return s.jobs[i]
}

func (s *shell) forget(done *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jobs = slices.DeleteFunc(s.jobs, func(j *job) bool { return j == done })
}

// wait waits for jobs. A signal that has an action ends it.
func (s *shell) wait(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	args = args[1:]
	next := len(args) > 0 && args[0] == "-n"
	if next {
		args = args[1:]
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	s.mu.Lock()
	jobs := slices.Clone(s.jobs)
	s.mu.Unlock()
	code := 0
	if len(args) > 0 {
		jobs = nil
		for _, a := range args {
			if _, err := strconv.Atoi(strings.TrimPrefix(a, "%")); err != nil && s.find(a) == nil {
				fmt.Fprintf(hc.Stderr, "sh: wait: %s: neither a process id nor a job\n", a)
				return interp.ExitStatus(2)
			}
			code = 127
			if j := s.find(a); j != nil {
				jobs, code = append(jobs, j), 0
			}
		}
	} else if next && len(jobs) == 0 {
		return interp.ExitStatus(127)
	}
	for len(jobs) > 0 {
		// One at a time, but in the order that they end in if the next is asked for.
		n := 1
		if next {
			n = len(jobs)
		}
		var cases []reflect.SelectCase
		for _, j := range jobs[:n] {
			cases = append(cases, reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(j.done)})
		}
		if !s.inSubshell(hc) {
			cases = append(cases, reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(s.woken)})
		}
		i, _, _ := reflect.Select(cases)
		if i == n {
			if sig := s.pendingSignal(); sig != 0 {
				if err := s.act(ctx); err != nil {
					return err
				}
				return interp.ExitStatus(128 + int(sig))
			}
			continue
		}
		j := jobs[i]
		if jobs = slices.Delete(jobs, i, i+1); len(args) > 0 || next {
			code = j.code
		}
		s.forget(j)
		if next {
			break
		}
	}
	return exitStatus(code)
}

func (s *shell) listJobs(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	s.mu.Lock()
	jobs := slices.Clone(s.jobs)
	s.mu.Unlock()
	for _, a := range args[1:] {
		if a != "-l" && a != "-p" {
			fmt.Fprintf(hc.Stderr, "sh: jobs: unknown option %s\n", a)
			return interp.ExitStatus(2)
		}
	}
	for _, j := range jobs {
		state := "Running"
		select {
		case <-j.done:
			if state = "Done"; j.code != 0 {
				state = fmt.Sprintf("Done(%d)", j.code)
			}
		default:
		}
		switch {
		case slices.Contains(args, "-p"):
			fmt.Fprintln(hc.Stdout, j.pid)
		case slices.Contains(args, "-l"):
			fmt.Fprintf(hc.Stdout, "[%d] %d %s\t%s\n", j.number, j.pid, state, j.text)
		default:
			fmt.Fprintf(hc.Stdout, "[%d] %s\t%s\n", j.number, state, j.text)
		}
		if state != "Running" && !slices.Contains(args, "-p") {
			s.forget(j)
		}
	}
	return nil
}

// kill is the command of that name, for which jobs have names too, and for which this shell is no stranger: the action on a signal
// that it sends to itself has run when the next command does.
func (s *shell) kill(ctx context.Context, args []string) error {
	hc := interp.HandlerCtx(ctx)
	c := &call{name: "kill", args: slices.Clone(args[1:]), out: bufio.NewWriter(hc.Stdout), err: hc.Stderr}
	for i, a := range c.args {
		if j := s.find(a); strings.HasPrefix(a, "%") && j != nil {
			c.args[i] = strconv.Itoa(j.pid)
		}
	}
	code := c.end(killWith(c, func(pid int, sig syscall.Signal) error {
		if pid != os.Getpid() {
			return syscall.Kill(pid, sig)
		}
		if s.raise(sig) {
			return nil
		}
		err := syscall.Kill(pid, sig)
		deadly := sig == syscall.SIGTERM || sig == syscall.SIGHUP || sig == syscall.SIGINT || sig == syscall.SIGQUIT
		for err == nil && deadly && !signal.Ignored(sig) && !slices.Contains(s.kept, sig) {
			time.Sleep(time.Hour) // it is on its way, and nothing more is to be done
		}
		return err
	}))
	if !s.inSubshell(hc) {
		if err := s.act(ctx); err != nil {
			return err
		}
	}
	return exitStatus(code)
}

// disown has nothing to do: no job of this shell ends with it.
func disown(context.Context, []string) error { return nil }
