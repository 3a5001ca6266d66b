package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

func TestCheck(t *testing.T) {
	c := startAgent(t, nil)
	for name, tc := range map[string]struct {
		script string
		code   int
		out    string
		cut    bool
	}{
		"good":          {"echo fine", 0, "fine\n", false},
		"bad":           {"echo one; echo two >&2; echo three; exit 3", 3, "one\ntwo\nthree\n", false},
		"signal":        {"kill -9 $$", 137, "", false},
		"says much":     {"head -c 100000 /dev/zero | tr '\\0' x; exit 4", 4, strings.Repeat("x", wire.MaxCheckOutput), true},
		"says just all": {"head -c 4096 /dev/zero | tr '\\0' x", 0, strings.Repeat("x", wire.MaxCheckOutput), false},
		"no input":      {"cat", 0, "", false},
	} {
		got, err := c.Check(t.Context(), sh(tc.script))
		if err != nil || got.Exit.Code != tc.code || string(got.Output) != tc.out || got.Cut != tc.cut || got.Exit.TimedOut {
			t.Errorf("%s: code %d, output %.40q (%d), cut %v, %v", name, got.Exit.Code, got.Output, len(got.Output), got.Cut, err)
		}
	}
	p := sh("")
	p.Args = []string{"nosuch"}
	if _, err := c.Check(t.Context(), p); !errors.Is(err, wire.ErrCommandNotFound) {
		t.Errorf("no command: %v", err)
	}
}

// TestCheckLeavesNothing: what a check has started in its session ends with it, however it ends.
func TestCheckLeavesNothing(t *testing.T) {
	c := startAgent(t, nil)
	file := filepath.Join(t.TempDir(), "pid")
	got, err := c.Check(t.Context(), sh("trap '' TERM HUP; sleep 1000 & echo $! >"+file+"; exit 0"))
	if pid := pidIn(t, file); err != nil || got.Exit.Code != 0 || alive(pid) {
		t.Errorf("after its end: %+v %v, what it left lives: %v", got, err, alive(pid))
	}
	p := sh(treeScript(file + "2"))
	p.Timeout = 300 * time.Millisecond
	got, err = c.Check(t.Context(), p)
	if pid := pidIn(t, file+"2"); err != nil || !got.Exit.TimedOut || alive(pid) {
		t.Errorf("after its timeout: %+v %v, what it left lives: %v", got, err, alive(pid))
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.Check(ctx, sh(treeScript(file+"3")))
		ended <- err
	}()
	pid := pidIn(t, file+"3")
	// There is one at a time.
	if _, err := c.Check(t.Context(), sh("true")); !errors.Is(err, wire.ErrInvalid) {
		t.Errorf("a second one: %v", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	eventually(t, "end of a check that nobody waits for", func() bool { return !alive(pid) })
	eventually(t, "another check", func() bool { _, err := c.Check(t.Context(), sh("true")); return err == nil })
}

// TestCheckFlood: a check that never stops writing costs the agent no memory, and one that left its output to a session of its own does
// not hang it.
func TestCheckFlood(t *testing.T) {
	c := startAgent(t, nil)
	rss := func() int64 {
		st, err := c.Stats(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return st.AgentRSS
	}
	file := filepath.Join(t.TempDir(), "pid")
	before := rss()
	p := sh("cat /dev/zero & cat /dev/zero >&2")
	p.Timeout = time.Second
	got, err := c.Check(t.Context(), p)
	if err != nil || !got.Exit.TimedOut || len(got.Output) != wire.MaxCheckOutput || !got.Cut {
		t.Errorf("%+v, %d bytes, cut %v, %v", got.Exit, len(got.Output), got.Cut, err)
	}
	if more := rss() - before; more > 16<<20 {
		t.Errorf("%d MiB more", more>>20)
	}
	got, err = c.Check(t.Context(), sh("setsid sh -c 'echo $$ >"+file+"; exec cat /dev/zero' & while [ ! -s "+file+" ]; do sleep 0.01; done"))
	pid := pidIn(t, file)
	defer unix.Kill(pid, unix.SIGKILL)
	if err != nil || got.Exit.Code != 0 {
		t.Errorf("%+v %v", got.Exit, err)
	}
}

// TestCheckOfAStoppingBox: the end of a box says nothing about its health.
func TestCheckOfAStoppingBox(t *testing.T) {
	c := startAgent(t, nil)
	dir := t.TempDir()
	main, err := c.Start(t.Context(), wire.ExecRequest{Process: sh("while [ ! -e " + dir + "/end ]; do sleep 0.01; done"), Main: true}, wire.IO{Stdout: io.Discard})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Check(t.Context(), sh("echo $$ >"+dir+"/pid; sleep 1000"))
		ended <- err
	}()
	pid := pidIn(t, dir+"/pid")
	if err := os.WriteFile(dir+"/end", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if st, err := main.Wait(t.Context()); err != nil || st.Code != 0 {
		t.Error(st, err)
	}
	if err := <-ended; !errors.Is(err, wire.ErrStopping) {
		t.Errorf("the check: %v", err)
	}
	if alive(pid) {
		t.Error("the check lives")
	}
	if _, err := c.Check(t.Context(), sh("true")); !errors.Is(err, wire.ErrStopping) {
		t.Errorf("another check: %v", err)
	}
}

// TestCheckEnvironment: a check is the user, and in the place, that it is said to be.
func TestCheckEnvironment(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	c := startAgent(t, nil)
	p := sh(`echo $(id -u) $PWD $A`)
	p.User, p.Dir, p.Env = strconv.Itoa(12345), "/usr", append(p.Env, "A=b")
	got, err := c.Check(t.Context(), p)
	if want := fmt.Sprintln("12345 /usr b"); err != nil || string(got.Output) != want {
		t.Errorf("%q %v", got.Output, err)
	}
}
