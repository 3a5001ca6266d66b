package state

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPrivate: the records are the owner's alone, also those that were written otherwise.
func TestPrivate(t *testing.T) {
	home := t.TempDir()
	if err := os.Chmod(home, 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		db, err := Open(t.Context(), home)
		if err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(home, File+"*"))
		if err != nil || len(files) == 0 {
			t.Fatal(files, err)
		}
		for _, f := range files {
			if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", f, st.Mode(), err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(home, File), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// The reserve is for boxes that end, and not for what a guest can have recorded at any time.
func TestEnding(t *testing.T) {
	for _, tc := range []struct {
		from, to Phase
		want     bool
	}{{Running, Running, false}, {Created, Starting, false}, {Starting, Running, true}, {Running, Stopping, true}, {Stopped, Stopped, true}, {Removing, Removing, true}} {
		if got := ending(tc.from, tc.to); got != tc.want {
			t.Errorf("%s to %s: %v", tc.from, tc.to, got)
		}
	}
}
