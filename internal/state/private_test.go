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
