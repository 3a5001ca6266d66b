package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/coffer-box/coffer"
)

// terminal is this process' side of a connection to a box. From the moment it is made, signals are kept for the box.
type terminal struct {
	a       *app
	tty     bool
	stdin   bool
	raw     *term.State
	input   io.Reader // standard input, without what is typed to this program
	once    sync.Once
	isTerm  bool
	signals chan os.Signal
	done    chan struct{}
}

func (a *app) terminal(tty, stdin bool) (*terminal, error) {
	t := &terminal{a: a, tty: tty, stdin: stdin, input: a.in, isTerm: term.IsTerminal(int(a.in.Fd())),
		signals: make(chan os.Signal, 16), done: make(chan struct{})}
	if tty && stdin && !t.isTerm {
		return nil, errors.New("standard input is not a terminal: leave out -t")
	}
	if tty && stdin {
		st, err := term.MakeRaw(int(a.in.Fd()))
		if err != nil {
			return nil, err
		}
		t.raw = st
	}
	signal.Notify(t.signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH)
	return t, nil
}

// close gives the terminal and the signals back.
func (t *terminal) close() {
	t.once.Do(func() {
		signal.Stop(t.signals)
		close(t.done)
		if t.raw != nil {
			_ = term.Restore(int(t.a.in.Fd()), t.raw)
		}
	})
}

func (t *terminal) size() (rows, cols uint16) {
	if !t.tty || !t.isTerm {
		return 0, 0
	}
	w, h, err := term.GetSize(int(t.a.in.Fd()))
	if err != nil {
		return 0, 0
	}
	return uint16(h), uint16(w)
}

func (t *terminal) io() coffer.IO {
	s := coffer.IO{Stdout: t.a.out, Stderr: t.a.err}
	if t.stdin {
		s.Stdin = t.input
	}
	return s
}

func (t *terminal) options(backlog bool) coffer.AttachOptions {
	o := coffer.AttachOptions{IO: t.io(), Backlog: backlog}
	o.Rows, o.Cols = t.size()
	return o
}

// remote is a process that takes signals and sizes.
type remote interface {
	Signal(ctx context.Context, n int) error
	Resize(ctx context.Context, rows, cols uint16) error
}

// tellTruncated says what else would look like the whole output.
func (a *app) tellTruncated(of interface{ Truncated() bool }) {
	if of.Truncated() {
		fmt.Fprintln(a.err, "coffer: the command left something running that still has its output open: what that writes is not shown")
	}
}

// errInterrupted says that the user wants no more of a connection; it is reported like any other interruption.
var errInterrupted = fmt.Errorf("interrupted: %w", context.Canceled)

// takeover makes the context of a connection to a box. Until begun is called it ends with ctx, and so at a signal to this program; from
// then on signals are the box's, and only giveUp ends it.
func takeover(ctx context.Context) (run context.Context, begun func(), giveUp context.CancelCauseFunc) {
	run, giveUp = context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { giveUp(errInterrupted) })
	return run, func() { stop() }, giveUp
}

// impatience is how soon a second request for an end must follow the first to be meant for this program.
const impatience = 10 * time.Second

// forward passes signals and changes of size on, those since the terminal was made included, until it is closed. A second SIGINT or
// SIGTERM that soon follows a first, and one that cannot be delivered, are for this program: it gives up.
func (t *terminal) forward(ctx context.Context, to remote, giveUp context.CancelCauseFunc) {
	deliver := make(chan os.Signal, cap(t.signals))
	go func() {
		for {
			select {
			case <-t.done:
				return
			case s := <-deliver:
				t.deliver(ctx, to, s, giveUp)
			}
		}
	}()
	go func() {
		var last time.Time
		for {
			select {
			case <-t.done:
				return
			case s := <-t.signals:
				if asksForEnd(s) {
					if !last.IsZero() && time.Since(last) < impatience {
						giveUp(errInterrupted)
					}
					last = time.Now()
				}
				select {
				case deliver <- s:
				default: // the box takes none
				}
			}
		}
	}()
}

func asksForEnd(s os.Signal) bool { return s == syscall.SIGINT || s == syscall.SIGTERM }

func (t *terminal) deliver(ctx context.Context, to remote, s os.Signal, giveUp context.CancelCauseFunc) {
	if s == syscall.SIGWINCH {
		if rows, cols := t.size(); rows > 0 {
			_ = to.Resize(ctx, rows, cols)
		}
		return
	}
	if err := to.Signal(ctx, int(s.(syscall.Signal))); err == nil || !asksForEnd(s) {
		return
	}
	select {
	case <-t.done: // what it was for ended just now
	case <-time.After(time.Second):
		giveUp(errInterrupted)
	}
}
