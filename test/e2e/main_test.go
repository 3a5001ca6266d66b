// Package e2e tests the built program from outside, as a user runs it, and judges what it leaves with the observer.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coffer-box/coffer/test/observer"
)

// binary is the program under test.
func binary(t *testing.T) string {
	t.Helper()
	p := os.Getenv("COFFER_BIN")
	if p == "" {
		p = "../../bin/coffer"
	}
	abs, err := filepath.Abs(p)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(abs); err != nil {
		t.Fatalf("%v: build it with `make build`, or name it in COFFER_BIN", err)
	}
	return abs
}

// home is a state directory of a test's own. When the test ends nothing may be left of it.
type home struct {
	t        *testing.T
	bin, dir string
}

func newHome(t *testing.T) *home {
	t.Helper()
	dir, err := os.MkdirTemp("", "ce2e-")
	if err != nil {
		t.Fatal(err)
	}
	warm(t, dir)
	h := &home{t: t, bin: binary(t), dir: dir}
	t.Cleanup(func() {
		if out, code := h.try("ps", "-aq"); code == 0 {
			for id := range strings.FieldsSeq(out) {
				h.try("rm", "-f", "-v", id)
			}
		}
		if left := h.left(); len(left) > 0 {
			t.Errorf("left after the test:\n%s", strings.Join(left, "\n"))
		}
		_ = os.RemoveAll(dir)
	})
	return h
}

// warm puts into a new home what COFFER_TEST_WARM, a home that was used before, has unpacked: on an emulated machine that takes most of
// a test's time.
func warm(t *testing.T, dir string) {
	t.Helper()
	from := os.Getenv("COFFER_TEST_WARM")
	if from == "" {
		return
	}
	for _, part := range []string{"assets", "images"} {
		err := filepath.WalkDir(filepath.Join(from, part), func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			to := filepath.Join(dir, strings.TrimPrefix(p, from))
			info, err := d.Info()
			switch {
			case err != nil:
				return err
			case d.IsDir():
				return os.Mkdir(to, info.Mode().Perm())
			case info.Size() > 1<<20: // written once, and never changed
				return os.Link(p, to)
			}
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			return os.WriteFile(to, b, info.Mode().Perm())
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// instance is the home's identity, which stands in every name outside of it.
func (h *home) instance() string {
	b, _ := os.ReadFile(filepath.Join(h.dir, "instance"))
	return strings.TrimSpace(string(b))
}

func (h *home) marks() []string {
	m := []string{h.dir}
	if i := h.instance(); i != "" {
		m = append(m, "coffer-"+i)
	}
	return m
}

// left is what the observer sees of this home.
func (h *home) left() []string { return observer.Left(h.marks()...) }

// live counts processes of this home.
func (h *home) live() []observer.Process { return observer.Processes(h.marks()...) }

func (h *home) cmd(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	h.t.Cleanup(cancel)
	c := exec.CommandContext(ctx, h.bin, args...)
	c.Env = append(os.Environ(), "COFFER_HOME="+h.dir)
	return c
}

// try runs a command and returns what it printed on standard output, and its exit code.
func (h *home) try(args ...string) (string, int) {
	out, _, code := h.all(args...)
	return out, code
}

func (h *home) all(args ...string) (stdout, stderr string, code int) {
	h.t.Helper()
	c := h.cmd(args...)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		h.t.Fatalf("coffer %v: %v", args, err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

// run runs a command that must succeed.
func (h *home) run(args ...string) string {
	h.t.Helper()
	out, errs, code := h.all(args...)
	if code != 0 {
		logs, _ := filepath.Glob(filepath.Join(h.dir, "boxes", "*", "shim.log"))
		for _, l := range logs {
			if b, err := os.ReadFile(l); err == nil && len(b) > 0 {
				h.t.Logf("%s:\n%s", l, b)
			}
		}
		h.t.Fatalf("coffer %s: exit code %d: %s", strings.Join(args, " "), code, errs)
	}
	return strings.TrimSuffix(out, "\n")
}

// until waits for a condition that must come about; how long it takes is not judged.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if done() {
			return
		}
	}
	t.Fatalf("never came about: %s", what)
}

func (h *home) noneLeft(when string) {
	h.t.Helper()
	if left := h.left(); len(left) > 0 {
		h.t.Fatalf("%s, %d things of the box are left:\n%s", when, len(left), strings.Join(left, "\n"))
	}
}

// noBoxes sees that no box is on record.
func (h *home) noBoxes() {
	h.t.Helper()
	if out := h.run("ps", "-aq"); out != "" {
		h.t.Errorf("boxes left: %s", out)
	}
}

func (h *home) field(box, tmpl string) string {
	h.t.Helper()
	return strings.TrimSpace(h.run("inspect", "-f", tmpl, box))
}

func pids(ps []observer.Process) string { return fmt.Sprint(ps) }
