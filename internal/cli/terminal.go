package cli

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"

	"github.com/coffer-box/coffer"
)

// terminal is this process' side of a connection to a box. From the moment it is made, signals are kept for the box.
type terminal struct {
	a       *app
	tty     bool
	stdin   bool
	raw     *term.State
	once    sync.Once
	isTerm  bool
	signals chan os.Signal
	done    chan struct{}
}

func (a *app) terminal(tty, stdin bool) (*terminal, error) {
	t := &terminal{a: a, tty: tty, stdin: stdin, isTerm: term.IsTerminal(int(a.in.Fd())),
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
		s.Stdin = io.Reader(t.a.in)
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

// forward passes signals and changes of size on, those since the terminal was made included, until it is closed.
func (t *terminal) forward(ctx context.Context, to remote) {
	go func() {
		for {
			select {
			case <-t.done:
				return
			case s := <-t.signals:
				if s == syscall.SIGWINCH {
					if rows, cols := t.size(); rows > 0 {
						_ = to.Resize(ctx, rows, cols)
					}
					continue
				}
				_ = to.Signal(ctx, int(s.(syscall.Signal)))
			}
		}
	}()
}
