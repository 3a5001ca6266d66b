package observer_test

import (
	"bufio"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/coffer-box/coffer/test/observer"
)

// TestPlanted plants one leak of each kind and sees each found, and nothing where none is planted.
func TestPlanted(t *testing.T) {
	const mark = "observer-mark-7731"
	if got := observer.Left(mark); len(got) != 0 {
		t.Fatalf("before: %v", got)
	}
	dir := filepath.Join(t.TempDir(), mark)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	start := func(c *exec.Cmd) {
		t.Helper()
		in, err := c.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		// The shell says that it runs before anything is judged.
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { in.Close(); _ = c.Wait() })
	}
	const script = "echo up; read x"
	cases := map[string]func() *exec.Cmd{
		"cmdline": func() *exec.Cmd { return exec.Command("sh", "-c", script, mark) },
		"environ": func() *exec.Cmd { c := exec.Command("sh", "-c", script); c.Env = []string{"M=" + mark}; return c },
		"cwd":     func() *exec.Cmd { c := exec.Command("sh", "-c", script); c.Dir = dir; return c },
	}
	n := 0
	for name, make := range cases {
		start(make())
		n++
		if got := observer.Processes(mark); len(got) != n {
			t.Errorf("after planting by %s: %d processes, want %d: %v", name, len(got), n, got)
		}
	}
	// A process that holds a file open.
	f, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := exec.Command("sh", "-c", script)
	c.ExtraFiles = []*os.File{f}
	start(c)
	if got := observer.Processes(mark); len(got) != n+1 {
		t.Errorf("after planting by fd: %v", got)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := observer.Sockets(mark); len(got) == 0 {
		t.Error("socket not found")
	}
}
