package coffer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/wire"
)

// Command runs a program in a running box. It is used like the Cmd of os/exec: set its fields, then call [Command.Run],
// [Command.Output], or [Command.Start] and [Command.Wait]. A Command is used once.
type Command struct {
	Path string   // looked up in the box's PATH
	Args []string // with the program's name

	Env    []string // over the box's environment
	Dir    string   // empty: the box's working directory
	User   string   // "user[:group]"; empty: the box's user
	TTY    bool     // give it a terminal; output then all comes on Stdout
	Rows   uint16   // size of the terminal; 0: not known
	Cols   uint16
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Timeout kills the program and all of its session; the status then says so. 0: never. In a box that does not even answer any
	// more, the command ends all the same, a few seconds later.
	Timeout time.Duration
	// Detach lets the program run on after this process is gone. Without it, the end of the context given to Command, and the
	// end of this process, kill the program and all of its session.
	Detach bool

	box    *Box
	ctx    context.Context // as in os/exec, the command's
	limit  context.Context // the same, and the end of all patience with Timeout
	client *wire.Client
	proc   *wire.Process
	stop   func() bool
	cut    bool
}

// Command prepares a program to be run in the box.
func (b *Box) Command(ctx context.Context, name string, args ...string) *Command {
	return &Command{Path: name, Args: append([]string{name}, args...), box: b, ctx: ctx}
}

// ExitError says that a program ended with a code other than 0.
type ExitError struct {
	Code     int
	Signal   int // that killed it; 0: it exited
	TimedOut bool
	Stderr   []byte // what it said, if Output was asked for and nobody else took it
}

func (e *ExitError) Error() string {
	switch {
	case e.TimedOut:
		return "killed after its timeout"
	case e.Signal != 0:
		return fmt.Sprintf("killed by signal %d", e.Signal)
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// ExitCode is the code a shell would report.
func (e *ExitError) ExitCode() int { return e.Code }

// Errors of starting a program, told apart with errors.Is.
var (
	ErrCommandNotFound = wire.ErrCommandNotFound
	ErrNotExecutable   = wire.ErrNotExecutable
	ErrNoUser          = wire.ErrNoUser
	ErrBadDir          = wire.ErrBadDir
)

// Start starts the program.
func (c *Command) Start() error {
	if c.proc != nil {
		return errors.New("command was started already")
	}
	limit, cancel := c.ctx, func() {}
	if c.Timeout > 0 {
		// The agent keeps the time, but root in the box can stop the agent.
		limit, cancel = context.WithTimeout(c.ctx, min(c.Timeout, maxTimeout)+grace)
	}
	rec, client, err := c.box.connect(limit, state.Running)
	if err != nil {
		cancel()
		return err
	}
	m := rec.Spec.Main
	p, err := client.Start(limit, wire.ExecRequest{Detach: c.Detach, Process: spec.Process{
		Args: append([]string{c.Path}, c.Args[min(1, len(c.Args)):]...), Env: mergeEnv(m.Env, c.Env), Dir: first(c.Dir, m.Dir),
		User: first(c.User, m.User), TTY: c.TTY, WinSize: spec.WinSize{Rows: c.Rows, Cols: c.Cols}, Timeout: c.Timeout, Rlimits: m.Rlimits,
	}}, wire.IO{Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr})
	if err != nil {
		client.Close()
		if limit.Err() != nil && c.ctx.Err() == nil {
			err = timedOut()
		}
		cancel()
		return fmt.Errorf("run %s in box %s: %w", c.Path, rec.Name, err)
	}
	c.client, c.proc, c.limit = client, p, limit
	// Closing the process ends its control stream, at which the agent kills the program's session.
	stop := context.AfterFunc(limit, func() { p.Close() })
	c.stop = func() bool {
		defer cancel()
		return stop()
	}
	return nil
}

// maxTimeout is as good as never, and can be added to.
const maxTimeout = 10 * 365 * 24 * time.Hour

// timedOut is the end of a program that the box does not tell about.
func timedOut() *ExitError { return &ExitError{Code: 137, Signal: 9, TimedOut: true} }

// Wait waits for the program and its output. A code other than 0 is an [*ExitError].
func (c *Command) Wait() error {
	if c.proc == nil {
		return errNotStarted
	}
	st, err := c.proc.Wait(c.limit)
	c.cut = st.Truncated
	late := err != nil && c.limit.Err() != nil
	c.stop()
	err = errors.Join(err, c.client.Close())
	// The copies to the command's writers end with the connection. The caller may look at what it gave only when they have.
	<-c.proc.Done()
	if cerr := c.ctx.Err(); cerr != nil {
		return cerr
	}
	if late {
		return timedOut()
	}
	if err != nil {
		return fmt.Errorf("run %s in box %s: %w", c.Path, c.box.name, err)
	}
	if st.Code != 0 || st.TimedOut {
		return &ExitError{Code: st.Code, Signal: st.Signal, TimedOut: st.TimedOut}
	}
	return nil
}

// Run starts the program and waits for it.
func (c *Command) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns what it wrote to its standard output.
func (c *Command) Output() ([]byte, error) {
	if c.Stdout != nil {
		return nil, errors.New("the command's Stdout is set already")
	}
	var out, errs bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &limited{w: &errs, left: 32 << 10}
	}
	err := c.Run()
	var ee *ExitError
	if errors.As(err, &ee) {
		ee.Stderr = errs.Bytes()
	}
	return out.Bytes(), err
}

// limited keeps the beginning of what is written to it.
type limited struct {
	w    io.Writer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	n := min(len(p), l.left)
	l.left -= n
	_, err := l.w.Write(p[:n])
	return len(p), err
}

// errNotStarted answers what only a started program can do.
var errNotStarted = errors.New("command was not started: call Start first")

// Truncated tells, after [Command.Wait], whether something that the program left behind still had its output open. What that writes is
// not delivered; all that the program wrote itself is.
func (c *Command) Truncated() bool { return c.cut }

// PID is the program's number inside the box; 0 before it was started.
func (c *Command) PID() int {
	if c.proc == nil {
		return 0
	}
	return c.proc.PID()
}

// Signal sends a signal to the started program.
func (c *Command) Signal(ctx context.Context, n int) error {
	if c.proc == nil {
		return errNotStarted
	}
	return c.proc.Signal(ctx, n)
}

// Resize sets the size of its terminal.
func (c *Command) Resize(ctx context.Context, rows, cols uint16) error {
	if c.proc == nil {
		return errNotStarted
	}
	return c.proc.Resize(ctx, rows, cols)
}

// Release lets go of a started, detached program.
func (c *Command) Release() error {
	if c.proc == nil {
		return errNotStarted
	}
	c.stop()
	return errors.Join(c.proc.Close(), c.client.Close())
}

// String is the command as a line.
func (c *Command) String() string { return strings.Join(c.Args, " ") }
