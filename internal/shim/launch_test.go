package shim

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/coffer-box/coffer/internal/cgroup"
	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
)

// TestPlacement: a jail that cannot be put where it can be found and killed is not started, and nothing of it is left.
func TestPlacement(t *testing.T) {
	s := recorded(t, func(*state.Box) {})
	host, err := cgroup.Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if host.Kind() == cgroup.KindNone {
		t.Skip("no control group is writable here: " + host.Describe())
	}
	if s.group, err = host.Create(t.Context(), s.keeper.Home.GenerationName(s.args.ID, 4), cgroup.Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := s.group.Remove(t.Context()); err != nil { // as if it was taken from under the shim
		t.Fatal(err)
	}
	ran := t.TempDir() + "/ran"
	j, err := s.Launch(t.Context(), jail.Config{Exe: script(t, "#!/bin/sh\ntouch "+ran+"\nexec sleep 1000\n")})
	if err == nil {
		j.Kill()
		<-j.Done()
		t.Fatal("the jail was started outside of its control group")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Launch = %v", err)
	}
	if held, err := supervise.Held(s.files.InitLock()); err != nil || held {
		t.Errorf("the jail's lock is held: %v, %v: a process is left", held, err)
	}
}

func script(t *testing.T, text string) string {
	t.Helper()
	path := t.TempDir() + "/jail"
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}
