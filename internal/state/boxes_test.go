package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/spec"
)

func TestRecord(t *testing.T) {
	home := t.TempDir()
	db := mustOpen(t, home)
	b := &Box{
		ID: "0123456789abcdef", Name: "work", Spec: spec.Box{Image: "base", Labels: map[string]string{"a": "b"}, StopTimeout: time.Second},
		Handles: json.RawMessage(`{"pid":1}`),
	}
	must(t, db.Create(t.Context(), b))
	want, err := db.Update(t.Context(), b.ID, Change{}, func(b *Box) error {
		b.Phase, b.ExitCode, b.Reason, b.FinishedAt = Created, 137, "killed", time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
		return nil
	})
	must(t, err)
	must(t, db.Close())
	for _, ref := range []string{"work", "0123456789abcdef", "0123", "0"} {
		got, err := mustOpen(t, home).Get(t.Context(), ref)
		must(t, err)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", ref, d)
		}
	}
}

func TestGet(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	create(t, db, "aa11", "one")
	create(t, db, "aa22", "two")
	create(t, db, "bb33", "aa1") // a name goes before the beginning of an id
	create(t, db, "cc44", "aa22")
	for ref, want := range map[string]string{"one": "aa11", "aa11": "aa11", "aa1": "bb33", "b": "bb33", "cc44": "cc44"} {
		if b, err := db.Get(t.Context(), ref); err != nil || b.ID != want {
			t.Errorf("%s: %+v, %v", ref, b, err)
		}
	}
	for ref, want := range map[string]error{
		"aa": ErrAmbiguous, "": ErrNotFound, "x": ErrNotFound, "aa112": ErrNotFound, "%": ErrNotFound, "aa_1": ErrNotFound, "on": ErrNotFound,
		"' OR 1=1 --": ErrNotFound,
	} {
		if b, err := db.Get(t.Context(), ref); !errors.Is(err, want) {
			t.Errorf("%q: %+v, %v; want %v", ref, b, err, want)
		}
	}
}

func TestNamesAreUnique(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	create(t, db, "id1", "one")
	create(t, db, "id2", "two")
	if err := db.Create(t.Context(), &Box{ID: "id3", Name: "one"}); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "id1") {
		t.Errorf("create: %v", err)
	}
	rename := func(id, name string) error {
		_, err := db.Update(t.Context(), id, Change{}, func(b *Box) error { b.Name = name; return nil })
		return err
	}
	if err := rename("id2", "one"); !errors.Is(err, ErrExists) {
		t.Errorf("rename: %v", err)
	}
	must(t, rename("id2", "three"))
	must(t, rename("id1", "two")) // free again
	must(t, db.Delete(t.Context(), "id1", "two"))
	must(t, db.Delete(t.Context(), "id1", "two"))
	must(t, rename("id2", "two"))
	if err := rename("id1", "x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("rename what is gone: %v", err)
	}
}

func TestPhases(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	all := []Phase{Creating, Created, Starting, Running, Paused, Stopping, Stopped, Removing, Failed}
	if len(all) != len(next) {
		t.Fatalf("%d phases, and rules for %d", len(all), len(next))
	}
	n := 0
	for _, from := range all {
		for _, to := range all {
			id := fmt.Sprint("box", n)
			n++
			create(t, db, id, id)
			if _, err := db.db.ExecContext(t.Context(), "UPDATE boxes SET data = json_set(data, '$.Phase', ?) WHERE id = ?", from, id); err != nil {
				t.Fatal(err)
			}
			_, err := db.Update(t.Context(), id, Change{Event: "change"}, func(b *Box) error { b.Phase = to; b.ExitCode = 1; return nil })
			allowed := from == to || slices.Contains(next[from], to)
			var te *TransitionError
			if errors.As(err, &te) == allowed || allowed && err != nil {
				t.Errorf("%s to %s: %v", from, to, err)
			}
			b, err := db.Get(t.Context(), id)
			must(t, err)
			if want := (map[bool]Phase{true: to, false: from})[allowed]; b.Phase != want || (b.ExitCode == 1) != allowed {
				t.Errorf("%s to %s: is %s, exit code %d", from, to, b.Phase, b.ExitCode)
			}
		}
	}
	// What must never be allowed, whatever the rules say: a box that is being removed coming back, and one that runs without a start.
	for _, to := range all {
		if slices.Contains(next[Removing], to) {
			t.Errorf("a box that is being removed becomes %s", to)
		}
	}
	for from, to := range next {
		if slices.Contains(to, Running) && from != Starting && from != Paused {
			t.Errorf("a box runs after %s", from)
		}
		if from != Removing && !slices.Contains(to, Removing) {
			t.Errorf("a box that is %s cannot be removed", from)
		}
	}
}

// TestLateWriter: what a shim of an older start says is not taken for the newer one.
func TestLateWriter(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	create(t, db, "id", "box")
	set := func(gen uint64) error {
		_, err := db.Update(t.Context(), "id", Change{Generation: gen, Event: "end"}, func(b *Box) error { b.Generation++; return nil })
		return err
	}
	must(t, set(0)) // 0 is anybody
	must(t, set(1))
	if err := set(1); !errors.Is(err, ErrStale) {
		t.Errorf("an older start: %v", err)
	}
	b, err := db.Get(t.Context(), "id")
	must(t, err)
	events, err := db.Events(t.Context(), 0)
	must(t, err)
	if b.Generation != 2 || len(events) != 3 {
		t.Errorf("generation %d, events %v", b.Generation, events)
	}
}

// TestFailedChange leaves neither the change nor its event.
func TestFailedChange(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	create(t, db, "id", "box")
	reason := errors.New("no")
	if _, err := db.Update(t.Context(), "id", Change{Event: "change"}, func(b *Box) error { b.ExitCode = 5; return reason }); !errors.Is(err, reason) {
		t.Errorf("%v", err)
	}
	b, err := db.Get(t.Context(), "id")
	must(t, err)
	events, err := db.Events(t.Context(), 0)
	must(t, err)
	if b.ExitCode != 0 || len(events) != 1 {
		t.Errorf("exit code %d, events %v", b.ExitCode, events)
	}
}

// note records an event of the box "id".
func note(t *testing.T, db *DB, action string, attrs map[string]string) {
	t.Helper()
	_, err := db.Update(t.Context(), "id", Change{Event: action, Attrs: attrs}, func(*Box) error { return nil })
	must(t, err)
}

func TestEvents(t *testing.T) {
	home := t.TempDir()
	db, watcher := mustOpen(t, home), mustOpen(t, home)
	create(t, db, "id", "box")
	note(t, db, "exec", map[string]string{"a": "b"})
	must(t, db.Delete(t.Context(), "id", "box"))
	must(t, db.Delete(t.Context(), "id", "box")) // no second event
	events, err := watcher.Events(t.Context(), 0)
	must(t, err)
	var got []string
	for i, e := range events {
		got = append(got, e.Action)
		if e.BoxID != "id" || e.Name != "box" || e.Time.IsZero() || i > 0 && e.Seq <= events[i-1].Seq {
			t.Errorf("%+v", e)
		}
	}
	if !slices.Equal(got, []string{"create", "exec", "destroy"}) || events[1].Attrs["a"] != "b" {
		t.Errorf("%+v", events)
	}
	if after, err := watcher.Events(t.Context(), events[1].Seq); err != nil || len(after) != 1 || after[0].Action != "destroy" {
		t.Errorf("after the second: %+v, %v", after, err)
	}
}

// TestEventsAreBounded: the oldest go, the numbers are never used again.
func TestEventsAreBounded(t *testing.T) {
	db := mustOpen(t, t.TempDir())
	if _, err := db.db.ExecContext(t.Context(), `WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
		INSERT INTO events (seq, data) SELECT i, '{}' FROM n`, maxEvents+49); err != nil {
		t.Fatal(err)
	}
	create(t, db, "id", "box")
	for range 100 {
		note(t, db, "new", nil)
	}
	events, err := db.Events(t.Context(), 0)
	must(t, err)
	last := events[len(events)-1]
	if len(events) > maxEvents+100 || last.Seq != maxEvents+150 || last.Action != "new" || events[0].Seq != 101 {
		t.Errorf("%d events, from %d to %+v", len(events), events[0].Seq, last)
	}
}
