package supervise

import (
	"path/filepath"
	"testing"
)

// A lock that is kept outlives its own value: only the end of the process gives it back.
func TestKeep(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	l, err := TryLock(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Keep(); err != nil {
		t.Fatal(err)
	}
	l.Unlock()
	if held, err := Held(path); !held || err != nil {
		t.Errorf("held: %v, %v", held, err)
	}
}
