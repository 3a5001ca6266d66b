package state

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/coffer-box/coffer/internal/spec"
)

// helperEnv makes the test program another process that uses the database: what to do, and where.
const helperEnv = "COFFER_STATE_HELPER"

func TestMain(m *testing.M) {
	if what, ok := os.LookupEnv(helperEnv); ok {
		if err := helper(strings.Fields(what)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// helper is the other process. It says a line for everything that it has been told was written.
func helper(args []string) error {
	ctx := context.Background()
	what, home := args[0], args[1]
	if what == "hold-before-open" { // waits, so that several open at once
		if _, err := bufio.NewReader(os.Stdin).ReadByte(); err != nil {
			return err
		}
		what = args[2]
	}
	db, err := Open(ctx, home)
	if err != nil {
		return err
	}
	defer db.Close()
	switch what {
	case "open":
		fmt.Println(db.Instance())
	case "create": // the same name as others
		err := db.Create(ctx, &Box{ID: fmt.Sprintf("%064d", os.Getpid()), Name: "only"})
		if errors.Is(err, ErrExists) {
			return nil
		}
		if err == nil {
			fmt.Println("won")
		}
		return err
	case "count":
		for range 25 {
			if _, err := db.Update(ctx, "box", Change{Event: "count"}, func(b *Box) error { b.RestartCount++; return nil }); err != nil {
				return err
			}
			fmt.Println("counted")
		}
	case "write": // for ever
		for i := 0; ; i++ {
			id := fmt.Sprintf("%s-%d", args[2], i)
			if err := db.Create(ctx, &Box{ID: id, Name: "name-of-" + id}); err != nil {
				return err
			}
			fmt.Println("created", id)
			if _, err := db.Update(ctx, id, Change{Event: "made"}, func(b *Box) error { b.Phase = Created; return nil }); err != nil {
				return err
			}
			fmt.Println("updated", id)
			if i%3 == 0 {
				if err := db.Delete(ctx, id, "name-of-"+id); err != nil {
					return err
				}
				fmt.Println("deleted", id)
			}
		}
	case "half": // stays inside a transaction that has written
		_, err := db.Update(ctx, "box", Change{}, func(b *Box) error {
			b.RestartCount = 1000
			fmt.Println("inside")
			_, err := io.Copy(io.Discard, os.Stdin)
			return err
		})
		return err
	}
	return nil
}

// other is a process that uses the database too.
type other struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
	err strings.Builder
}

func start(t *testing.T, what, home string, args ...string) *other {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	o := &other{t: t, cmd: exec.CommandContext(t.Context(), exe)}
	o.cmd.Env = append(os.Environ(), helperEnv+"="+strings.Join(append([]string{what, home}, args...), " "))
	o.cmd.Stderr = &o.err
	o.in, err = o.cmd.StdinPipe()
	must(t, err)
	out, err := o.cmd.StdoutPipe()
	must(t, err)
	o.out = bufio.NewScanner(out)
	must(t, o.cmd.Start())
	return o
}

// line is the next thing that the process says.
func (o *other) line() string {
	o.t.Helper()
	if !o.out.Scan() {
		o.t.Fatalf("the other process ended: %v, %s", o.cmd.Wait(), &o.err)
	}
	return o.out.Text()
}

// rest is everything that it says until its end.
func (o *other) rest() []string {
	var lines []string
	for o.out.Scan() {
		lines = append(lines, o.out.Text())
	}
	return lines
}

func (o *other) finish() []string {
	o.t.Helper()
	lines := o.rest()
	if err := o.cmd.Wait(); err != nil {
		o.t.Fatalf("the other process: %v, %s", err, &o.err)
	}
	return lines
}

// kill ends the process wherever it is, and returns what it said before.
func (o *other) kill() []string {
	o.t.Helper()
	must(o.t, o.cmd.Process.Signal(syscall.SIGKILL))
	lines := o.rest()
	if err := o.cmd.Wait(); err == nil || o.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		o.t.Fatalf("the other process had ended by itself: %v, %s", err, &o.err)
	}
	return lines
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t *testing.T, home string) *DB {
	t.Helper()
	db, err := Open(t.Context(), home)
	must(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}

func create(t *testing.T, db *DB, id, name string) {
	t.Helper()
	must(t, db.Create(t.Context(), &Box{ID: id, Name: name, Spec: spec.Box{Image: "base"}}))
}

// withBoxes is a home with n boxes, closed, each with a directory as a real one has.
func withBoxes(t *testing.T, n int) string {
	t.Helper()
	home := t.TempDir()
	db := mustOpen(t, home)
	for i := range n {
		id := "box" + strconv.Itoa(i)
		create(t, db, id, "name"+strconv.Itoa(i))
		must(t, os.MkdirAll(filepath.Join(home, "boxes", id), 0o700))
	}
	must(t, db.Close())
	return home
}
