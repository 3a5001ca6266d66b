// Package coffer runs any OCI image as a box: a stateful, isolated workspace for code nobody trusts, with a kernel of its own.
// There is no daemon; every program that opens the same home sees the same boxes.
//
//	rt, err := coffer.Open(ctx, coffer.Config{})
//	box, err := rt.Run(ctx, coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
//	out, err := box.Command(ctx, "echo", "hi").Output()
//	err = box.Stop(ctx)   // returns when nothing of it is left
//	err = box.Remove(ctx)
//
// # The promise
//
// When [Box.Stop] or [Box.Remove] return without an error, nothing of the box's processes is left, which has been observed and
// not assumed, and nothing else was signalled. When that cannot be kept the error names what is left, and record and files stay.
//
// # The helper
//
// Boxes outlive the program that starts them, so each is supervised by a process of the coffer program of the same version,
// which is looked for at [Config.Helper], beside the running program, and in PATH.
//
// # Concurrency
//
// All types are safe for concurrent use, by goroutines and by processes. Methods that block take a context first; its end
// interrupts the wait and never leaves a box half stopped: whoever looks next carries on.
package coffer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/state"
)

// Errors that callers tell apart with errors.Is.
var (
	ErrNotFound      = state.ErrNotFound  // no such box
	ErrImageNotFound = image.ErrNotFound  // no such image
	ErrExists        = state.ErrExists    // the name is taken
	ErrAmbiguous     = state.ErrAmbiguous // an id prefix fits several boxes
	ErrCorrupt       = state.ErrCorrupt   // the state database is damaged
	ErrDamaged       = errors.New("its record is damaged")
	ErrNotRunning    = errors.New("box is not running")
	ErrRunning       = errors.New("box is running")
	ErrNoHelper      = errors.New("the coffer program was not found")
	ErrInvalid       = errors.New("invalid request")
)

// Config says where things are. The zero value is right for most programs.
type Config struct {
	// Home is the state directory. Empty: COFFER_HOME, else /var/lib/coffer for root, else $XDG_DATA_HOME/coffer.
	Home string
	// Helper is the path of the coffer program. Empty: looked for, see the package documentation.
	Helper string
	// Logger takes what may help to find a fault. Nil: nothing is logged.
	Logger *slog.Logger
}

// Runtime is an open home.
type Runtime struct {
	home   home.Layout
	db     *state.DB
	keeper *lifecycle.Keeper
	images *image.Store
	log    *slog.Logger
	helper string
}

// Open opens a home, creating it if need be.
func Open(ctx context.Context, c Config) (*Runtime, error) {
	log := c.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	dir, err := home.Dir(c.Home, os.Getenv)
	if err != nil {
		return nil, err
	}
	db, err := state.Open(ctx, dir)
	if err != nil {
		return nil, err
	}
	l := home.Layout{Root: dir, Instance: db.Instance()}
	images, err := image.Open(l.Images(), log)
	if err != nil {
		db.Close()
		return nil, err
	}
	return &Runtime{
		home: l, db: db, images: images, log: log, helper: c.Helper,
		keeper: &lifecycle.Keeper{DB: db, Home: l, Log: log},
	}, nil
}

// unwritable adds what to do to an error about a home that cannot be written.
func (r *Runtime) unwritable(err error) error {
	if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: make %s writable, or choose another with --home or COFFER_HOME", err, r.home.Root)
	}
	return err
}

// Close lets go of the home. Boxes run on.
func (r *Runtime) Close() error { return r.db.Close() }

// Home is the state directory in use.
func (r *Runtime) Home() string { return r.home.Root }

// helperPath finds the program that supervises boxes.
func (r *Runtime) helperPath() (string, error) {
	if r.helper != "" {
		return filepath.Abs(r.helper)
	}
	if self, err := os.Executable(); err == nil {
		if filepath.Base(self) == helperName {
			return self, nil
		}
		beside := filepath.Join(filepath.Dir(self), helperName)
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() {
			return beside, nil
		}
	}
	p, err := exec.LookPath(helperName)
	if err != nil {
		return "", fmt.Errorf("%w: install it, or set Config.Helper to its path", ErrNoHelper)
	}
	return filepath.Abs(p)
}

const helperName = "coffer"
