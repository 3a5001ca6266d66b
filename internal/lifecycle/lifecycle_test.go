package lifecycle

import (
	"log/slog"
	"testing"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
)

func TestWantsRestart(t *testing.T) {
	for _, c := range []struct {
		description string
		restart     spec.Restart
		box         state.Box
		want        bool
	}{
		{"no policy", spec.Restart{Policy: "no"}, state.Box{ExitCode: 1}, false},
		{"always", spec.Restart{Policy: "always"}, state.Box{}, true},
		{"stopped by hand", spec.Restart{Policy: "always"}, state.Box{ManualStop: true}, false},
		{"stopped", spec.Restart{Policy: "always"}, state.Box{Reason: ReasonStopped}, false},
		{"damaged", spec.Restart{Policy: "always"}, state.Box{Damaged: true}, false},
		{"no failure", spec.Restart{Policy: "on-failure"}, state.Box{RestartCount: 5}, false},
		{"a failure", spec.Restart{Policy: "on-failure"}, state.Box{RestartCount: 5, ExitCode: 1}, true},
		{"the last try", spec.Restart{Policy: "on-failure", Max: 3}, state.Box{RestartCount: 2, ExitCode: 1}, true},
		{"too many", spec.Restart{Policy: "on-failure", Max: 3}, state.Box{RestartCount: 3, ExitCode: 1}, false},
	} {
		b := c.box
		b.Spec.Restart = c.restart
		b.Phase = state.Stopped
		if got := WantsRestart(&b); got != c.want {
			t.Errorf("%s: %v", c.description, got)
		}
		b.Phase = state.Running
		if WantsRestart(&b) {
			t.Errorf("%s: a running box is to be started again", c.description)
		}
	}
}

// A start that a stop came into ends as what the user asked for; any other that fails says so.
func TestMarkEndedOfFailedStart(t *testing.T) {
	db, err := state.Open(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	k := &Keeper{DB: db, Log: slog.New(slog.DiscardHandler)}
	for _, c := range []struct {
		during state.Phase
		want   state.Phase
		reason string
		err    string
	}{
		{state.Starting, state.Failed, ReasonFailed, "cut"},
		{state.Stopping, state.Stopped, ReasonStopped, ""},
	} {
		b := &state.Box{ID: string(c.during), Name: string(c.during)}
		if err := db.Create(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		for _, p := range []state.Phase{state.Created, state.Starting, c.during} {
			if b, err = db.Update(t.Context(), b.ID, state.Change{}, func(b *state.Box) error { b.Phase = p; return nil }); err != nil {
				t.Fatal(err)
			}
		}
		b, err = k.MarkEnded(t.Context(), b, End{Code: 125, Reason: ReasonFailed, Error: "cut"})
		if err != nil {
			t.Fatal(err)
		}
		if b.Phase != c.want || b.Reason != c.reason || b.Error != c.err {
			t.Errorf("a start that fails while the box is %s: %s, reason %q, error %q", c.during, b.Phase, b.Reason, b.Error)
		}
	}
}
