package userland

import (
	"os"
	"path/filepath"
	"testing"
)

// TestFullDisk writes little enough to fit a buffer, so that only its last flush can fail.
func TestFullDisk(t *testing.T) {
	const full = "/dev/full"
	if _, err := os.Stat(full); err != nil {
		t.Skip(err)
	}
	in := filepath.Join(t.TempDir(), "in")
	if err := os.WriteFile(in, []byte("b\na\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"tar", "-cf", full, in}, {"tar", "-czf", full, in}, {"sort", "-o", full, in}} {
		if code := Main(args); code != 1 {
			t.Errorf("%v: exit code %d, want 1", args, code)
		}
	}
}
