package lifecycle

import (
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
