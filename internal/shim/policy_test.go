//go:build linux

package shim

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
)

func TestArgs(t *testing.T) {
	for _, a := range []Args{{Home: "/h", ID: "x", Generation: 7, Mode: Detached}, {Home: "/h h", ID: "y", Generation: 1, Mode: Files}} {
		got, err := ParseArgs(a.Words()[1:])
		if err != nil || got != a {
			t.Errorf("%+v became %+v, %v", a, got, err)
		}
	}
	for _, words := range [][]string{nil, {"a"}, {"h", "x", "-1", "attached"}, {"h", "x", "1", "attached", "more"}} {
		if _, err := ParseArgs(words); err == nil {
			t.Errorf("%q: no error", words)
		}
	}
}

func TestPause(t *testing.T) {
	for count, want := range map[int]time.Duration{0: 100 * time.Millisecond, 3: 800 * time.Millisecond, 1 << 30: time.Minute} {
		if got := pause(count); got != want {
			t.Errorf("after %d restarts: %v, want %v", count, got, want)
		}
	}
}

// recorded is a shim whose box's main process has just ended, with a real record of it.
func recorded(t *testing.T, change func(*state.Box)) *shim {
	t.Helper()
	root := t.TempDir()
	db, err := state.Open(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	l := home.Layout{Root: root, Instance: db.Instance()}
	b := &state.Box{ID: strings.Repeat("ab", 16), Name: "b", Generation: 4, CreatedAt: time.Unix(1, 0).UTC()}
	change(b)
	if err := db.Create(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	for _, phase := range []state.Phase{state.Created, state.Starting, state.Running} {
		if b, err = db.Update(t.Context(), b.ID, state.Change{Generation: 4}, func(b *state.Box) error { b.Phase = phase; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	files := l.Box(b.ID)
	if err := os.MkdirAll(files.State(), 0o700); err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	return &shim{log: quiet, args: Args{Home: root, ID: b.ID, Generation: 4}, box: b, files: files,
		keeper: &lifecycle.Keeper{DB: db, Home: l, Log: quiet}}
}

// TestFinish: what the record says is carried out, and nothing else.
func TestFinish(t *testing.T) {
	end := lifecycle.End{Code: 9, Reason: lifecycle.ReasonExited}
	t.Run("nothing", func(t *testing.T) {
		s := recorded(t, func(*state.Box) {})
		again, err := s.finish(t.Context(), end)
		b, gerr := s.keeper.DB.Get(t.Context(), s.args.ID)
		if err != nil || gerr != nil || again || b.Phase != state.Stopped || b.ExitCode != 9 {
			t.Errorf("%v, %v, %v, %+v", again, err, gerr, b)
		}
	})
	t.Run("restart", func(t *testing.T) {
		s := recorded(t, func(b *state.Box) { b.Spec.Restart.Policy = "on-failure" })
		again, err := s.finish(t.Context(), end)
		if err != nil || !again {
			t.Fatalf("%v, %v", again, err)
		}
		b, err := s.keeper.DB.Get(t.Context(), s.args.ID)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]any{state.Starting, uint64(5), 1}, []any{b.Phase, b.Generation, b.RestartCount}); d != "" {
			t.Error(d)
		}
	})
	t.Run("failed start is not restarted", func(t *testing.T) {
		s := recorded(t, func(b *state.Box) { b.Spec.Restart.Policy = "always" })
		again, err := s.finish(t.Context(), lifecycle.End{Code: 125, Reason: lifecycle.ReasonFailed, Error: "x"})
		if err != nil || again {
			t.Errorf("%v, %v", again, err)
		}
	})
	t.Run("remove", func(t *testing.T) {
		s := recorded(t, func(b *state.Box) { b.Spec.Remove = true })
		if _, err := s.finish(t.Context(), end); err != nil {
			t.Fatal(err)
		}
		if _, err := s.keeper.DB.Get(t.Context(), s.args.ID); !errors.Is(err, state.ErrNotFound) {
			t.Errorf("the record is still there: %v", err)
		}
		if _, err := os.Stat(s.files.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the files are still there: %v", err)
		}
	})
	t.Run("a command has the box", func(t *testing.T) {
		s := recorded(t, func(b *state.Box) { b.Spec.Remove = true })
		lock, err := supervise.TryLock(s.files.OpLock(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Unlock()
		if _, err := s.finish(t.Context(), end); err != nil {
			t.Fatal(err)
		}
		if b, err := s.keeper.DB.Get(t.Context(), s.args.ID); err != nil || b.Phase != state.Stopped || !b.Spec.Remove {
			t.Errorf("the record is not left to the command: %+v, %v", b, err)
		}
	})
	t.Run("taken over", func(t *testing.T) {
		s := recorded(t, func(b *state.Box) { b.Spec.Remove = true })
		s.box = &state.Box{ID: s.args.ID, Generation: 3}
		if again, err := s.finish(t.Context(), end); again || err != nil {
			t.Errorf("%v, %v", again, err)
		}
		if b, err := s.keeper.DB.Get(t.Context(), s.args.ID); err != nil || b.Phase != state.Running || b.ExitCode != 0 {
			t.Errorf("another generation's record was changed: %+v, %v", b, err)
		}
		if _, err := os.Stat(filepath.Join(s.files.Dir, "state")); err != nil {
			t.Error(err)
		}
	})
}
