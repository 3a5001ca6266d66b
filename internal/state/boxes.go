package state

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Create records a new box in phase [Creating]. A name in use is [ErrExists].
func (d *DB) Create(ctx context.Context, b *Box) error {
	b.Phase, b.CreatedAt = Creating, now()
	tx := d.durably
	if b.Spec.Remove {
		tx = d.tx
	}
	return tx(ctx, func(tx *sql.Tx) error {
		var other string
		err := tx.QueryRowContext(ctx, "SELECT id FROM boxes WHERE name = ?", b.Name).Scan(&other)
		if err == nil {
			return fmt.Errorf("name %q %w (box %.12s): remove or rename that box, or choose another name", b.Name, ErrExists, other)
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		data, err := json.Marshal(b)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO boxes (id, name, phase, generation, data) VALUES (?, ?, ?, ?, ?)",
			b.ID, b.Name, b.Phase, b.Generation, string(data)); err != nil {
			return err
		}
		return appendEvent(ctx, tx, Event{BoxID: b.ID, Name: b.Name, Action: "create", Attrs: map[string]string{"image": b.Spec.Image}})
	})
}

func now() time.Time { return time.Now().UTC().Round(0) }

// Get finds a box by name, id, or the beginning of an id.
func (d *DB) Get(ctx context.Context, ref string) (*Box, error) {
	if ref == "" {
		return nil, fmt.Errorf("empty name: %w", ErrNotFound)
	}
	rows, err := d.query(ctx, "WHERE name = ? OR id = ? OR substr(id, 1, ?) = ?", ref, ref, len(ref), ref)
	if err != nil {
		return nil, err
	}
	for _, b := range rows {
		if b.Name == ref || b.ID == ref {
			return b, nil
		}
	}
	switch len(rows) {
	case 0:
		return nil, fmt.Errorf("%w: %s", ErrNotFound, ref)
	case 1:
		return rows[0], nil
	}
	return nil, fmt.Errorf("id %s: %w", ref, ErrAmbiguous)
}

// List returns all boxes, oldest first.
func (d *DB) List(ctx context.Context) ([]*Box, error) {
	out, err := d.query(ctx, "")
	slices.SortFunc(out, func(a, b *Box) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out, err
}

func (d *DB) query(ctx context.Context, where string, args ...any) ([]*Box, error) {
	rows, err := d.db.QueryContext(ctx, selectBox+where, args...)
	if err != nil {
		return nil, d.explain("read", err)
	}
	defer rows.Close()
	var out []*Box
	for rows.Next() {
		b, err := scanBox(rows)
		if err != nil {
			return nil, d.explain("read", err)
		}
		out = append(out, b)
	}
	return out, d.explain("read", rows.Err())
}

const selectBox = "SELECT id, name, phase, generation, data FROM boxes "

// scanBox reads a record. Of one that is damaged remains what its columns say, which is enough to find and end the box, so that one
// bad record hides no other box and keeps none from being removed.
func scanBox(row interface{ Scan(...any) error }) (*Box, error) {
	var col Box
	var data string
	if err := row.Scan(&col.ID, &col.Name, &col.Phase, &col.Generation, &data); err != nil {
		return nil, err
	}
	b := &Box{}
	err := json.Unmarshal([]byte(data), b)
	if _, known := next[b.Phase]; err == nil && known && b.ID == col.ID {
		return b, nil
	}
	if _, known := next[col.Phase]; !known {
		col.Phase = Failed
	}
	col.Damaged, col.Error = true, "its record is damaged"
	return &col, nil
}

// Change is what a caller may say about an update.
type Change struct {
	// Generation, if not 0, must still be the box's: a late shim must not write over a newer start.
	Generation uint64
	// Event is recorded with the change; empty: none.
	Event string
	Attrs map[string]string
	// Dispensable is a change that may fail on a full disk, where others use up the room that is kept for the end of boxes.
	Dispensable bool
}

// Update changes one box in a transaction of its own. fn must be quick and without side effects. The phase may only go where the
// state machine allows ([TransitionError]).
func (d *DB) Update(ctx context.Context, id string, c Change, fn func(*Box) error) (*Box, error) {
	var out *Box
	ends := false
	change := func(tx *sql.Tx) error {
		b, err := scanBox(tx.QueryRowContext(ctx, selectBox+"WHERE id = ?", id))
		if errors.Is(err, sql.ErrNoRows) {
			return fmt.Errorf("%w: %.12s", ErrNotFound, id)
		}
		if err != nil {
			return err
		}
		if c.Generation != 0 && b.Generation != c.Generation {
			return fmt.Errorf("box %s: %w", b.Name, ErrStale)
		}
		from, name := b.Phase, b.Name
		if err := fn(b); err != nil {
			return err
		}
		ends = b.Phase != Creating && b.Phase != Created && b.Phase != Starting && !c.Dispensable
		if b.Phase != from && !slices.Contains(next[from], b.Phase) {
			return &TransitionError{Name: b.Name, From: from, To: b.Phase}
		}
		if b.Name != name {
			var other string
			if err := tx.QueryRowContext(ctx, "SELECT id FROM boxes WHERE name = ?", b.Name).Scan(&other); err == nil {
				return fmt.Errorf("name %q %w (box %.12s)", b.Name, ErrExists, other)
			}
		}
		out = b
		text, err := json.Marshal(b)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE boxes SET name = ?, phase = ?, generation = ?, data = ? WHERE id = ?",
			b.Name, b.Phase, b.Generation, string(text), id); err != nil {
			return err
		}
		if c.Event == "" {
			return nil
		}
		return appendEvent(ctx, tx, Event{BoxID: id, Name: b.Name, Action: c.Event, Attrs: c.Attrs})
	}
	err := d.tx(ctx, change)
	if ends && d.makeRoom(err) {
		err = d.tx(ctx, change)
	}
	return out, err
}

// Delete removes a record, last of all that belongs to a box. A missing one is no error.
func (d *DB) Delete(ctx context.Context, id, name string) error {
	remove := func(tx *sql.Tx) error {
		res, err := tx.ExecContext(ctx, "DELETE FROM boxes WHERE id = ?", id)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n == 0 {
			return err
		}
		return appendEvent(ctx, tx, Event{BoxID: id, Name: name, Action: "destroy"})
	}
	err := d.durably(ctx, remove)
	if d.makeRoom(err) {
		err = d.durably(ctx, remove)
	}
	return err
}

// maxEvents bounds the events table.
const maxEvents = 10000

func appendEvent(ctx context.Context, tx *sql.Tx, e Event) error {
	e.Time = now()
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	res, err := tx.ExecContext(ctx, "INSERT INTO events (data) VALUES (?)", string(data))
	if err != nil {
		return err
	}
	seq, err := res.LastInsertId()
	if err == nil && seq%100 == 0 {
		_, err = tx.ExecContext(ctx, "DELETE FROM events WHERE seq <= ?", seq-maxEvents)
	}
	return err
}

// Events returns the events after a sequence number, oldest first.
func (d *DB) Events(ctx context.Context, after int64) ([]Event, error) {
	rows, err := d.db.QueryContext(ctx, "SELECT seq, data FROM events WHERE seq > ? ORDER BY seq", after)
	if err != nil {
		return nil, d.explain("read", err)
	}
	defer rows.Close()
	var out []Event
	for rows.Next() {
		var e Event
		var seq int64
		var data string
		if err := rows.Scan(&seq, &data); err != nil {
			return nil, d.explain("read", err)
		}
		if err := json.Unmarshal([]byte(data), &e); err != nil {
			return nil, d.damaged(fmt.Errorf("event %d: %w", seq, err))
		}
		e.Seq = seq
		out = append(out, e)
	}
	return out, d.explain("read", rows.Err())
}

// lockHolder names a process that holds a lock on the database's files.
func lockHolder(dir string) string {
	inodes := map[string]bool{}
	for _, f := range []string{File, File + "-wal", File + "-shm"} {
		var st syscall.Stat_t
		if syscall.Stat(filepath.Join(dir, f), &st) == nil {
			inodes[fmt.Sprint(st.Ino)] = true
		}
	}
	b, err := os.ReadFile("/proc/locks")
	if err != nil {
		return "another process"
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 6 || f[3] != "WRITE" {
			continue
		}
		if parts := strings.Split(f[5], ":"); len(parts) == 3 && inodes[parts[2]] && f[4] != fmt.Sprint(os.Getpid()) {
			comm, _ := os.ReadFile("/proc/" + f[4] + "/comm")
			return fmt.Sprintf("process %s (%s)", f[4], strings.TrimSpace(string(comm)))
		}
	}
	return "another process"
}
