package logfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newLog(t *testing.T, max int64) (*Writer, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	w, err := NewWriter(path, max, 3)
	must(t, err)
	t.Cleanup(func() { w.Close() })
	return w, path
}

func texts(t *testing.T, path string) []string {
	t.Helper()
	s, err := Snap(path)
	must(t, err)
	var out []string
	must(t, s.Each(func(e Entry) error {
		out = append(out, string(e.Data()))
		return nil
	}))
	return out
}

// line is what one entry of these tests takes in a file.
const line = 100

func TestRotation(t *testing.T) {
	w, path := newLog(t, 4*line)
	for i := range 100 {
		must(t, w.Append(Stdout, fmt.Appendf(nil, "%08d", i)))
	}
	must(t, w.Append(Stderr, []byte{0xff, 0}))
	files, err := filepath.Glob(path + "*")
	must(t, err)
	if len(files) != 3 {
		t.Errorf("files: %v", files)
	}
	for _, f := range files {
		if st, err := os.Stat(f); err != nil || st.Size() > 4*line {
			t.Errorf("%s: %d bytes, %v", f, st.Size(), err)
		}
	}
	got := texts(t, path)
	if n := len(got); n < 5 || got[n-1] != "\xff\x00" {
		t.Fatalf("%q", got)
	}
	for i, s := range slices.Backward(got[:len(got)-1]) {
		if want := fmt.Sprintf("%08d", 100-len(got)+1+i); s != want {
			t.Errorf("entry %d is %q, want %q", i, s, want)
		}
	}
}

// TestSnapWhileRotating: whatever the writer does meanwhile, there is no hole in what a reader gets.
func TestSnapWhileRotating(t *testing.T) {
	w, path := newLog(t, 4*line)
	var stop atomic.Bool
	done := make(chan error, 1)
	go func() {
		var err error
		for i := 0; err == nil && !stop.Load(); i++ {
			err = w.Append(Stdout, fmt.Append(nil, i))
		}
		done <- err
	}()
	defer func() {
		stop.Store(true)
		must(t, <-done)
	}()
	for range 3000 {
		last := -1
		for _, s := range texts(t, path) {
			var n int
			if _, err := fmt.Sscan(s, &n); err != nil || last >= 0 && n != last+1 {
				t.Fatalf("%q comes after %d: %v", s, last, err)
			}
			last = n
		}
	}
}

// TestTornLines: what a crash or a full disk has torn is left out, and takes nothing with it.
func TestTornLines(t *testing.T) {
	w, path := newLog(t, 0)
	must(t, w.Append(Stdout, []byte("one")))
	w.Close()
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(`{"time":"2026-01-01T00:`)
	must(t, err)
	f.Close()
	w, err = NewWriter(path, 0, 0)
	must(t, err)
	defer w.Close()
	must(t, w.Append(Stdout, []byte("two")))

	// A limit on the file's size does what a full disk does, and lets a part be written.
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &was))
	signal.Ignore(unix.SIGXFSZ)
	defer signal.Reset(unix.SIGXFSZ)
	must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: uint64(w.size) + 200, Max: was.Max}))
	err = w.Append(Stdout, bytes.Repeat([]byte("x"), 1000))
	must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &was))
	if !errors.Is(err, unix.EFBIG) {
		t.Errorf("an entry beyond the limit: %v", err)
	}
	must(t, w.Append(Stdout, []byte("three")))
	if got := texts(t, path); !slices.Equal(got, []string{"one", "two", "three"}) {
		t.Errorf("%q", got)
	}
}

// TestFollow goes through rotations, more than one between two looks, and gets every entry once.
func TestFollow(t *testing.T) {
	w, path := newLog(t, 4*line)
	next := 0
	write := func(n int) {
		for range n {
			must(t, w.Append(Stdout, fmt.Append(nil, next)))
			next++
		}
	}
	write(6)
	s, err := Snap(path)
	must(t, err)
	defer s.Close()
	want, rounds := 0, 0
	err = s.Follow(t.Context(), path, func() (bool, error) {
		if want < next {
			return false, nil
		}
		if rounds++; rounds > 50 {
			return true, nil
		}
		write(rounds % 9) // up to two files of the three that are kept
		return false, nil
	}, func(e Entry) error {
		if got := string(e.Data()); got != fmt.Sprint(want) {
			return fmt.Errorf("%q, want %d", got, want)
		}
		want++
		return nil
	})
	if err != nil || want != next {
		t.Errorf("%d of %d entries: %v", want, next, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s, err = Snap(path)
	must(t, err)
	defer s.Close()
	if err := s.Follow(ctx, path, func() (bool, error) { return false, nil }, func(Entry) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestFollowFromNothing: the log may begin only later.
func TestFollowFromNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	s, err := Snap(path)
	must(t, err)
	defer s.Close()
	var got []string
	var w *Writer
	must(t, s.Follow(t.Context(), path, func() (bool, error) {
		if w != nil {
			return true, nil
		}
		var err error
		if w, err = NewWriter(path, 0, 0); err != nil {
			return false, err
		}
		return false, w.Append(Stdout, []byte("first"))
	}, func(e Entry) error {
		got = append(got, string(e.Data()))
		return nil
	}))
	w.Close()
	if !slices.Equal(got, []string{"first"}) {
		t.Errorf("%q", got)
	}
}
