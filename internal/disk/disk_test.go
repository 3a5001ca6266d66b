package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	claim := path + "-claim"
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				unlock, err := Lock(t.Context(), path)
				if err != nil {
					t.Error(err)
					return
				}
				f, err := os.OpenFile(claim, os.O_CREATE|os.O_EXCL, 0o600)
				if err == nil {
					err = errors.Join(f.Close(), os.Remove(claim))
				}
				if err != nil {
					t.Errorf("somebody else is in: %v", err)
				}
				unlock()
			}
		})
	}
	wg.Wait()
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("a lock in other hands: %v", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := TryLock(f); got || err != nil {
		t.Errorf("a lock in other hands: %v, %v", got, err)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, text := range []string{"one", "two"} {
		if err := Replace(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Errorf("%q, %v", b, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	if err := Replace(filepath.Join(dir, "none", "f"), nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestReplaceWith(t *testing.T) {
	dir := t.TempDir()
	path, spare := filepath.Join(dir, "f"), filepath.Join(dir, "spare")
	if err := ReplaceWith(spare, path, []byte("x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no spare: %v", err)
	}
	if err := errors.Join(os.WriteFile(path, []byte("old"), 0o600), Spare(spare, 4096), Spare(spare, 4096), ReplaceWith(spare, path, []byte("new"))); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
