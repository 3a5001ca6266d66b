//go:build linux

package shim

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestBoundLog: however much is written, the log keeps its bound, and the last words.
func TestBoundLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l := &boundLog{f: f, max: 64 << 10}
	w, finish, err := l.pipe()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100_000 {
		if _, err := fmt.Fprintf(w, "line %d\n", i); err != nil {
			t.Fatal(err)
		}
	}
	finish()
	b, err := os.ReadFile(path)
	if err != nil || len(b) > 64<<10+32 || len(b) < 16<<10 || !bytes.HasSuffix(b, []byte("line 99998\nline 99999\n")) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}
