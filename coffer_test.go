package coffer_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coffer-box/coffer"
)

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "clib-")
	if err != nil {
		panic(err)
	}
	os.Setenv("COFFER_EXAMPLE_HOME", dir)
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// runtime opens a home of the test's own; at the end of the test no goroutine of the library may be left.
func runtime(t *testing.T) *coffer.Runtime {
	t.Helper()
	bin, err := filepath.Abs("bin/coffer")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("%v: build it first, with `make build`", err)
	}
	before := goleak.IgnoreCurrent()
	dir, err := os.MkdirTemp("", "clib-")
	if err != nil {
		t.Fatal(err)
	}
	rt, err := coffer.Open(t.Context(), coffer.Config{Home: dir, Helper: bin})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		infos, err := rt.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, i := range infos {
			if b, err := rt.Get(ctx, i.ID); err == nil {
				if err := b.Remove(ctx, coffer.Force(), coffer.WithVolumes()); err != nil {
					t.Error(err)
				}
			}
		}
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, before)
		os.RemoveAll(dir)
	})
	return rt
}

// TestLibraryZombies: a long-lived program that starts and removes boxes collects no zombies. L12.
func TestLibraryZombies(t *testing.T) {
	rt := runtime(t)
	for range 3 {
		b, err := rt.Run(t.Context(), coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Remove(t.Context(), coffer.Force()); err != nil {
			t.Fatal(err)
		}
	}
	self := "\nPPid:\t" + strconv.Itoa(os.Getpid()) + "\n"
	dirs, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, d := range dirs {
		if b, err := os.ReadFile(d); err == nil && strings.Contains(string(b), self) && strings.Contains(string(b), "State:\tZ") {
			t.Errorf("a zombie is left: %s", b)
		}
	}
}

// TestConcurrentUse: one runtime used by many goroutines.
func TestConcurrentUse(t *testing.T) {
	rt := runtime(t)
	b, err := rt.Run(t.Context(), coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			c := b.Command(t.Context(), "cat")
			in := strings.Repeat(string(rune('a'+i)), 100000)
			c.Stdin = strings.NewReader(in)
			if out, err := c.Output(); err != nil || string(out) != in {
				t.Errorf("%d: %d bytes, %v", i, len(out), err)
			}
			if _, err := rt.List(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestCreateOrRemoveImage: a box is made of an image, or the image is removed, and never both.
func TestCreateOrRemoveImage(t *testing.T) {
	rt := runtime(t)
	rootfs := t.TempDir()
	if err := os.WriteFile(filepath.Join(rootfs, "init"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	made, removed := 0, 0
	for range 25 {
		img, err := rt.ImportImage(t.Context(), rootfs, nil, "raced", nil)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var boxes [3]*coffer.Box
		for i := range boxes {
			wg.Go(func() {
				var err error
				if boxes[i], err = rt.Create(t.Context(), coffer.Spec{Image: "raced", Pull: coffer.PullNever, Cmd: []string{"/init"}}); err != nil && !errors.Is(err, coffer.ErrImageNotFound) {
					t.Errorf("create: %v", err)
				}
			})
		}
		wg.Go(func() { _, _ = rt.RemoveImage(t.Context(), img.ID) }) // refused where a box was faster
		wg.Wait()
		root := filepath.Join(rt.Home(), "images", "rootfs", img.RootfsID+".erofs")
		_, gone := os.Stat(root)
		for _, b := range boxes {
			if b == nil {
				continue
			}
			made++
			if gone != nil {
				t.Errorf("a box was made, and its root file system is gone: %v", gone)
			}
			if err := b.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if gone != nil {
			removed++
		} else if _, err := rt.RemoveImage(t.Context(), img.ID); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d boxes were made, and the image was removed %d times", made, removed)
	if infos, err := rt.List(t.Context()); err != nil || len(infos) > 0 {
		t.Errorf("left: %v, %v", infos, err)
	}
}

// TestErrors: what callers tell apart.
func TestErrors(t *testing.T) {
	rt := runtime(t)
	ctx := t.Context()
	if _, err := rt.Get(ctx, "nobody"); !errors.Is(err, coffer.ErrNotFound) {
		t.Errorf("unknown box: %v", err)
	}
	bad := []coffer.Spec{
		{}, {Image: "base", Name: "../x"}, {Image: "base", Name: "a/b"}, {Image: "base", Memory: -1}, {Image: "base", Memory: 1000},
		{Image: "base", CPUs: -2}, {Image: "base", CPUs: 1e9}, {Image: "base", PIDs: -1}, {Image: "base", DiskSize: -1},
		{Image: "base", DiskSize: 1000}, {Image: "base", StopSignal: "SIGNOPE"},
		{Image: "base", Dir: "rel"}, {Image: "base", Engine: "warp"}, {Image: "base", Restart: coffer.Restart{Policy: "maybe"}},
		{Image: "base", Volumes: []coffer.Volume{{Source: "/does/not/exist", Target: "/x"}}},
		{Image: "base", Volumes: []coffer.Volume{{Source: "/tmp", Target: "relative"}}}, {Image: "base", Timeout: -1},
	}
	for _, s := range bad {
		if _, err := rt.Create(ctx, s); !errors.Is(err, coffer.ErrInvalid) {
			t.Errorf("%+v: %v", s, err)
		}
	}
	if _, err := rt.Create(ctx, coffer.Spec{Image: "no-such-image", Pull: coffer.PullNever}); !errors.Is(err, coffer.ErrImageNotFound) {
		t.Errorf("unknown image: %v", err)
	}
	b, err := rt.Run(ctx, coffer.Spec{Image: "base", Name: "b", Cmd: []string{"sleep", "600"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rt.Create(ctx, coffer.Spec{Image: "base", Name: "b"}); !errors.Is(err, coffer.ErrExists) {
		t.Errorf("name taken: %v", err)
	}
	nobody, nowhere := b.Command(ctx, "true"), b.Command(ctx, "true")
	nobody.User, nowhere.Dir = "stranger", "/etc/passwd"
	for want, c := range map[error]*coffer.Command{
		coffer.ErrCommandNotFound: b.Command(ctx, "no-such-program"), coffer.ErrNotExecutable: b.Command(ctx, "/etc/passwd"),
		coffer.ErrNoUser: nobody, coffer.ErrBadDir: nowhere,
	} {
		if err := c.Run(); !errors.Is(err, want) {
			t.Errorf("want %v, got %v", want, err)
		}
	}
	if err := b.Remove(ctx); !errors.Is(err, coffer.ErrRunning) {
		t.Errorf("remove of a running box: %v", err)
	}
	if err := b.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if err := b.Command(ctx, "true").Run(); !errors.Is(err, coffer.ErrNotRunning) {
		t.Errorf("command in a stopped box: %v", err)
	}
	// Nothing that was refused has left a record.
	infos, err := rt.List(ctx)
	if err != nil || len(infos) != 1 {
		t.Errorf("%d boxes, %v", len(infos), err)
	}
}

// TestCancel: the end of a command's context kills the program in the box.
func TestCancel(t *testing.T) {
	rt := runtime(t)
	b, err := rt.Run(t.Context(), coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c := b.Command(ctx, "sleep", "555")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := c.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
	for {
		ps, err := b.Processes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, p := range ps {
			found = found || strings.Contains(strings.Join(p.Command, " "), "555")
		}
		if !found {
			return
		}
	}
}

// TestNotStarted: what only a started command can do is an error before, and nothing worse.
func TestNotStarted(t *testing.T) {
	var c coffer.Command
	if c.PID() != 0 {
		t.Errorf("PID = %d", c.PID())
	}
	for name, err := range map[string]error{"Signal": c.Signal(t.Context(), 15), "Resize": c.Resize(t.Context(), 1, 1), "Release": c.Release(),
		"Wait": c.Wait()} {
		if err == nil || !strings.Contains(err.Error(), "not started") {
			t.Errorf("%s = %v", name, err)
		}
	}
}

// gate is a writer that is busy until it is let go.
type gate struct{ entered, open chan struct{} }

func (g gate) Write(p []byte) (int, error) {
	select {
	case g.entered <- struct{}{}:
	default:
	}
	<-g.open
	return len(p), nil
}

// TestWaitForWriters: when Wait has returned, nothing is written any more to what the caller gave, as with os/exec.
func TestWaitForWriters(t *testing.T) {
	rt := runtime(t)
	b, err := rt.Run(t.Context(), coffer.Spec{Image: "base", Cmd: []string{"sleep", "600"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	g := gate{make(chan struct{}, 1), make(chan struct{})}
	cmd := b.Command(ctx, "sh", "-c", "echo x; sleep 1000")
	cmd.Stdout = g
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-g.entered
	cancel()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		t.Errorf("Wait returned (%v) while the command's output is still being written", err)
		close(g.open)
	case <-time.After(time.Second):
		close(g.open)
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}
