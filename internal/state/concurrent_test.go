package state

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
)

// TestOpenedAtOnce lets processes make the same home at the same moment.
func TestOpenedAtOnce(t *testing.T) {
	for range 5 {
		home := t.TempDir()
		var others []*other
		for range 6 {
			others = append(others, start(t, "hold-before-open", home, "open"))
		}
		for _, o := range others {
			_, err := o.in.Write([]byte("\n"))
			must(t, err)
		}
		ids := map[string]bool{}
		for _, o := range others {
			for _, id := range o.finish() {
				ids[id] = true
			}
		}
		if len(ids) != 1 {
			t.Errorf("identities: %v", ids)
		}
	}
}

func TestOneNameForMany(t *testing.T) {
	home := t.TempDir()
	var others []*other
	for range 6 {
		others = append(others, start(t, "create", home))
	}
	won := 0
	for _, o := range others {
		won += len(o.finish())
	}
	boxes, err := mustOpen(t, home).List(t.Context())
	must(t, err)
	if won != 1 || len(boxes) != 1 {
		t.Errorf("%d processes won the name, %d boxes", won, len(boxes))
	}
}

// TestCounted: no change is lost between processes and goroutines.
func TestCounted(t *testing.T) {
	home := t.TempDir()
	db := mustOpen(t, home)
	create(t, db, "box", "box")
	var others []*other
	for range 3 {
		others = append(others, start(t, "count", home))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				if _, err := db.Update(t.Context(), "box", Change{Event: "count"}, func(b *Box) error { b.RestartCount++; return nil }); err != nil {
					t.Error(err)
				}
				if _, err := db.Get(t.Context(), "box"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	for _, o := range others {
		o.finish()
	}
	b, err := db.Get(t.Context(), "box")
	must(t, err)
	events, err := db.Events(t.Context(), 0)
	must(t, err)
	if b.RestartCount != 7*25 || len(events) != 7*25+1 {
		t.Errorf("%d changes and %d events, want %d and one more", b.RestartCount, len(events), 7*25)
	}
}

// TestKilledWriter kills a process that writes all the time, again and again. What it was told is written is there, what is there is
// whole, and the next writer goes on.
func TestKilledWriter(t *testing.T) {
	home := t.TempDir()
	for round := range 12 {
		who := fmt.Sprint("w", round)
		w := start(t, "write", home, who)
		lines := []string{}
		for range 1 + 5*round {
			lines = append(lines, w.line())
		}
		lines = append(lines, w.kill()...)
		said := map[string]string{}
		last := ""
		for _, line := range lines {
			what, id, _ := strings.Cut(line, " ")
			said[id], last = what, id
		}
		db, err := Open(t.Context(), home)
		must(t, err)
		boxes, err := db.List(t.Context())
		must(t, err)
		have := map[string]*Box{}
		for _, b := range boxes {
			have[b.ID] = b
		}
		for id, what := range said {
			b := have[id]
			switch {
			case what == "deleted" && b != nil:
				t.Errorf("%s is back", id)
			case what == "updated" && b == nil && id != last:
				t.Errorf("%s is lost", id)
			case what == "updated" && b != nil && b.Phase != Created, what == "created" && b == nil:
				t.Errorf("%s: %s, but %+v", id, what, b)
			}
		}
		// A record and its events are of one piece.
		events, err := db.Events(t.Context(), 0)
		must(t, err)
		state := map[string]string{}
		for _, e := range events {
			state[e.BoxID] = e.Action
		}
		for id, action := range state {
			b := have[id]
			if (action == "destroy") != (b == nil) || b != nil && (b.Phase == Created) != (action == "made") {
				t.Errorf("%s: the last event is %s, the record %+v", id, action, b)
			}
		}
		var check string
		must(t, db.db.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&check))
		if check != "ok" {
			t.Errorf("integrity: %s", check)
		}
		must(t, db.Close())
	}
}

// TestKilledInside meets a process that stays inside a transaction, and then kills it there.
func TestKilledInside(t *testing.T) {
	if _, err := os.Stat("/proc/locks"); err != nil {
		t.Skipf("the kernel does not tell who holds a lock: %v", err)
	}
	home := t.TempDir()
	db := mustOpen(t, home)
	create(t, db, "box", "box")
	w := start(t, "half", home)
	if got := w.line(); got != "inside" {
		t.Fatal(got)
	}
	// Readers do not wait for it.
	if b, err := db.Get(t.Context(), "box"); err != nil || b.RestartCount != 0 {
		t.Errorf("read beside a writer: %+v, %v", b, err)
	}
	// A writer does, for a while, and says who is in the way and what to do.
	_, err := db.Update(t.Context(), "box", Change{}, func(b *Box) error { b.ExitCode = 1; return nil })
	if err == nil || errors.Is(err, ErrCorrupt) {
		t.Fatalf("wrote beside a writer: %v", err)
	}
	for _, want := range []string{fmt.Sprintf("process %d (", w.cmd.Process.Pid), "try again", home} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	w.kill()
	b, err := db.Update(t.Context(), "box", Change{}, func(b *Box) error { b.ExitCode = 2; return nil })
	must(t, err)
	if b.RestartCount != 0 || b.ExitCode != 2 {
		t.Errorf("%+v", b)
	}
}
