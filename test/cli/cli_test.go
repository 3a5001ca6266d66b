// Package cli tests the command line as a user sees it: scripts of commands with what they print and how they exit. After each
// script the observer sees that nothing of it is left.
package cli

import (
	"bytes"
	"database/sql"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/rogpeppe/go-internal/testscript"
	_ "modernc.org/sqlite" // to change a database behind the program's back

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

// TestScripts runs every script of testdata in a home of its own. Beside testscript's commands a script has
//
//	coffer ARGS...        the program; "coffer ARGS... &name&" is testscript's exec in the background
//	code N coffer ARGS... it must end with exit code N; with 125, after one line that says why,
//	                      or with 125*L after L of them
//	sql FILE STATEMENT    changes a database
//	until PATTERN ARGS... runs coffer ARGS until its output matches; how long that takes is not judged
//	files N GLOB          there must be N files of that pattern
//
// a registry of images without TLS at $REGISTRY, and the conditions [root] and [limits], the latter where the host can enforce limits of memory, processors and processes.
func TestScripts(t *testing.T) {
	bin := binary(t)
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup:               func(e *testscript.Env) error { return setup(e, bin) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"coffer": cmdCoffer, "code": cmdCode, "sql": cmdSQL, "until": cmdUntil, "files": cmdFiles,
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "limits":
				return limits(t, bin), nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
	})
}

// limits asks the program itself what the host can enforce; that it then does is what the scripts see.
func limits(t *testing.T, bin string) bool {
	c := exec.Command(bin, "info", "--format", "{{.Cgroups}}")
	c.Env = append(os.Environ(), "COFFER_HOME="+t.TempDir())
	out, err := c.Output()
	if err != nil {
		t.Fatalf("coffer info: %v", err)
	}
	return strings.Contains(string(out), "limits: memory, cpu, pids")
}

func setup(e *testscript.Env, bin string) error {
	home, err := os.MkdirTemp("", "ccli-")
	if err != nil {
		return err
	}
	e.Setenv("COFFER_HOME", home)
	e.Setenv("HOME", e.WorkDir)
	e.Setenv("PATH", filepath.Dir(bin)+string(os.PathListSeparator)+os.Getenv("PATH"))
	e.Setenv("COFFER", bin)
	e.Setenv("DOCKER_CONFIG", filepath.Join(e.WorkDir, "docker"))
	reg := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	e.Defer(reg.Close)
	e.Setenv("REGISTRY", strings.TrimPrefix(reg.URL, "http://"))
	t := e.T()
	e.Defer(func() {
		run := func(args ...string) string {
			c := exec.Command(bin, args...)
			c.Env = append(os.Environ(), "COFFER_HOME="+home)
			out, err := c.Output()
			if err != nil {
				t.Log(fmt.Sprintf("coffer %v: %v", args, err))
			}
			return string(out)
		}
		if ids := strings.Fields(run("ps", "-aq")); len(ids) > 0 {
			run(append([]string{"rm", "-f", "-v"}, ids...)...)
		}
		marks := []string{home}
		if b, err := os.ReadFile(filepath.Join(home, "instance")); err == nil {
			marks = append(marks, "coffer-"+strings.TrimSpace(string(b)))
		}
		if left := leftOfBoxes(marks); len(left) > 0 {
			t.Fatal("left after the script:\n" + strings.Join(left, "\n"))
		}
		_ = os.RemoveAll(home)
	})
	return nil
}

// leftOfBoxes is what the observer sees, but for commands that the script itself has in the background: those end after this.
func leftOfBoxes(marks []string) []string {
	var out []string
	for _, s := range observer.Left(marks...) {
		var pid int
		if _, err := fmt.Sscanf(s, "process %d", &pid); err == nil && child(pid) {
			continue
		}
		out = append(out, s)
	}
	return out
}

func child(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true // gone
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return f[1] == strconv.Itoa(os.Getpid())
}

func cmdCoffer(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("coffer", args...)
	if neg == (err == nil) {
		ts.Fatalf("coffer %s: %v", strings.Join(args, " "), outcome(err))
	}
}

func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N PROGRAM ARGS...")
	}
	code, times, several := strings.Cut(args[0], "*")
	want, err := strconv.Atoi(code)
	ts.Check(err)
	wantLines := 1
	if several {
		wantLines, err = strconv.Atoi(times)
		ts.Check(err)
	}
	err = ts.Exec(args[1], args[2:]...)
	if got := outcome(err); got != want {
		ts.Fatalf("%s: exit code %d, want %d", strings.Join(args[1:], " "), got, want)
	}
	if lines := strings.Count(ts.ReadFile("stderr"), "\n"); want == 125 && lines != wantLines {
		ts.Fatalf("%s: %d lines of error, want %d:\n%s", strings.Join(args[1:], " "), lines, wantLines, ts.ReadFile("stderr"))
	}
}

func cmdSQL(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: sql FILE STATEMENT")
	}
	db, err := sql.Open("sqlite", ts.MkAbs(args[0]))
	ts.Check(err)
	defer db.Close()
	_, err = db.Exec(args[1])
	ts.Check(err)
}

// outcome is an exit code; death by a signal is 128 and its number.
func outcome(err error) int {
	if err == nil {
		return 0
	}
	ee, ok := err.(*exec.ExitError) //nolint:errorlint // as testscript returns it
	if !ok {
		return -1
	}
	if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ee.ExitCode()
}

func cmdUntil(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] until PATTERN ARGS...")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var last string
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		c := exec.Command(ts.Getenv("COFFER"), args[1:]...)
		c.Env = append(os.Environ(), "COFFER_HOME="+ts.Getenv("COFFER_HOME"))
		out, _ := c.Output()
		if last = string(out); re.MatchString(last) != neg {
			return
		}
	}
	ts.Fatalf("never came about; coffer %s at last printed:\n%s", strings.Join(args[1:], " "), last)
}

func cmdFiles(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: files N GLOB")
	}
	m, err := filepath.Glob(ts.MkAbs(args[1]))
	ts.Check(err)
	if strconv.Itoa(len(m)) != args[0] {
		ts.Fatalf("%d files %s, want %s: %v", len(m), args[1], args[0], m)
	}
}
