package state

import (
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// contents is everything below a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(p)
		out[p] = fmt.Sprintf("%x", sha256.Sum256(b))
		return err
	}))
	return out
}

// read uses a database as a command does: it opens it, and lists the boxes.
func read(t *testing.T, home string) ([]*Box, error) {
	t.Helper()
	db, err := Open(t.Context(), home)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return db.List(t.Context())
}

// TestDamaged damages the database of a home with boxes in every way that disks and people do. It is never taken for good, never
// for an empty one, and what is there stays there.
func TestDamaged(t *testing.T) {
	overwrite := func(at int64, with string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			t.Helper()
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte(with), at)
			must(t, err)
			must(t, f.Close())
		}
	}
	truncate := func(size int64) func(*testing.T, string) {
		return func(t *testing.T, path string) { t.Helper(); must(t, os.Truncate(path, size)) }
	}
	for name, damage := range map[string]func(*testing.T, string){
		"lost":            func(t *testing.T, path string) { must(t, os.Remove(path)) },
		"empty":           truncate(0),
		"cut in header":   truncate(50),
		"cut in page":     truncate(4096 + 100),
		"first page only": truncate(4096),
		"half": func(t *testing.T, path string) {
			st, err := os.Stat(path)
			must(t, err)
			truncate(st.Size()/2&^4095)(t, path)
		},
		"text": func(t *testing.T, path string) {
			must(t, os.WriteFile(path, []byte(strings.Repeat("not a database\n", 2000)), 0o600))
		},
		"zeros": func(t *testing.T, path string) { must(t, os.WriteFile(path, make([]byte, 64<<10), 0o600)) },
		"another, new": func(t *testing.T, path string) {
			must(t, os.Remove(path))
			db, err := sql.Open("sqlite", path)
			must(t, err)
			_, err = db.ExecContext(t.Context(), "PRAGMA journal_mode(WAL)")
			must(t, errors.Join(err, db.Close()))
		},
		"garbled header": overwrite(0, strings.Repeat("\xff", 100)),
		"garbled tables": overwrite(100, strings.Repeat("\xff", 3000)),
	} {
		t.Run(name, func(t *testing.T) {
			home := withBoxes(t, 15)
			path := filepath.Join(home, File)
			damage(t, path)
			before := contents(t, home)
			for range 2 { // the second must not find what the first made
				boxes, err := read(t, home)
				if !errors.Is(err, ErrCorrupt) || len(boxes) > 0 {
					t.Fatalf("%d boxes, %v", len(boxes), err)
				}
				if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "coffer doctor --fix") {
					t.Errorf("the error names no next step: %v", err)
				}
			}
			after := contents(t, home)
			for p, sum := range before {
				if after[p] != sum {
					t.Errorf("%s changed or went", p)
				}
			}
			// The way out keeps it too, and then works.
			to, err := Recover(home)
			must(t, err)
			if sum, ok := before[path]; ok && contents(t, home)[to] != sum {
				t.Errorf("%s is not what was damaged", to)
			}
			db, err := OpenFresh(t.Context(), home)
			must(t, err)
			defer db.Close()
			create(t, db, "new", "new")
			if boxes, err := db.List(t.Context()); err != nil || len(boxes) != 1 {
				t.Errorf("afterwards: %v, %v", boxes, err)
			}
		})
	}
}

// TestLostBesideItsLog: a killed writer leaves what it has committed in the log. If the database beside it is lost, the log is the
// last thing that knows of the boxes.
func TestLostBesideItsLog(t *testing.T) {
	home := t.TempDir()
	w := start(t, "write", home, "w")
	for line := w.line(); line != "updated w-20"; line = w.line() {
		if i := strings.TrimPrefix(line, "created "); i != line {
			must(t, os.MkdirAll(filepath.Join(home, "boxes", i), 0o700))
		}
	}
	w.kill()
	must(t, os.Remove(filepath.Join(home, File)))
	wal := filepath.Join(home, File+"-wal")
	before, err := os.ReadFile(wal)
	must(t, err)
	if len(before) == 0 {
		t.Fatal("nothing in the log")
	}
	if _, err := read(t, home); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if after, err := os.ReadFile(wal); err != nil || string(after) != string(before) {
		t.Errorf("the log changed: %d bytes, were %d, %v", len(after), len(before), err)
	}
	to, err := Recover(home)
	must(t, err)
	if after, err := os.ReadFile(to + "-wal"); err != nil || string(after) != string(before) {
		t.Errorf("the log was not kept: %v", err)
	}
}

func TestNewerSchema(t *testing.T) {
	home := withBoxes(t, 3)
	db := mustOpen(t, home)
	if _, err := db.db.ExecContext(t.Context(), fmt.Sprintf("PRAGMA user_version = %d", schemaVersion+1)); err != nil {
		t.Fatal(err)
	}
	must(t, db.Close())
	before := contents(t, home)
	for _, open := range []func() (*DB, error){
		func() (*DB, error) { return Open(t.Context(), home) },
		func() (*DB, error) { return OpenFresh(t.Context(), home) },
	} {
		db, err := open()
		if err == nil {
			db.Close()
		}
		if !errors.Is(err, ErrNewer) || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "use that coffer") {
			t.Errorf("%v", err)
		}
	}
	for p, sum := range contents(t, home) {
		if before[p] != sum {
			t.Errorf("%s changed", p)
		}
	}
}

func TestHomeThatCannotBeUsed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	homes := map[string]string{"a file": file, "below a file": filepath.Join(file, "x")}
	if os.Geteuid() == 0 {
		other := t.TempDir()
		must(t, os.Chown(other, 48231, 48231))
		homes["another's"] = other
	} else {
		closed := t.TempDir()
		must(t, os.Chmod(closed, 0o500))
		homes["read-only"] = closed
		homes["another's"] = "/"
	}
	for name, home := range homes {
		db, err := Open(t.Context(), home)
		if err == nil {
			db.Close()
			t.Errorf("%s: opened", name)
			continue
		}
		if !strings.Contains(err.Error(), home) || !strings.Contains(err.Error(), ": ") || errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if !strings.Contains(err.Error(), "COFFER_HOME") {
			t.Errorf("%s: the error names no next step: %v", name, err)
		}
	}
}

// TestIdentityOutlivesTheDatabase: the names of everything outside the home are made of it.
func TestIdentityOutlivesTheDatabase(t *testing.T) {
	home := t.TempDir()
	db := mustOpen(t, home)
	id := db.Instance()
	must(t, db.Close())
	if _, err := Recover(home); err != nil {
		t.Fatal(err)
	}
	db, err := OpenFresh(t.Context(), home)
	must(t, err)
	defer db.Close()
	if len(id) != 16 || db.Instance() != id {
		t.Errorf("was %q, is %q", id, db.Instance())
	}
}

// TestLostIdentity: under a new identity a home would find none of its processes.
func TestLostIdentity(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"gone":    os.Remove,
		"empty":   func(path string) error { return os.Truncate(path, 0) },
		"cut off": func(path string) error { return os.Truncate(path, 7) },
		"no hex":  func(path string) error { return os.WriteFile(path, []byte("0123456789abcdeX\n"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			db := mustOpen(t, home)
			id := db.Instance()
			must(t, db.Close())
			must(t, damage(filepath.Join(home, instanceFile)))
			db = mustOpen(t, home)
			if db.Instance() != id {
				t.Errorf("was %q, is %q", id, db.Instance())
			}
			must(t, db.Close())
			if b, err := os.ReadFile(filepath.Join(home, instanceFile)); err != nil || string(b) != id+"\n" {
				t.Errorf("the file now holds %q, %v", b, err)
			}

			// Nor does it take one when both are lost and there are boxes.
			must(t, damage(filepath.Join(home, instanceFile)))
			must(t, os.Remove(filepath.Join(home, File)))
			must(t, os.MkdirAll(filepath.Join(home, "boxes", "x"), 0o700))
			if db, err := Open(t.Context(), home); !errors.Is(err, ErrCorrupt) {
				t.Errorf("opened: %v, %v", db, err)
			}
		})
	}
}

// TestDamagedRecord: of a record that cannot be read remains what is needed to end and remove its box; it hides no other, and stays
// marked after it was written again.
func TestDamagedRecord(t *testing.T) {
	for name, damage := range map[string]string{
		"no JSON":       "data = 'x'",
		"empty":         "data = ''",
		"cut off":       "data = substr(data, 1, 30)",
		"another type":  "data = '[]'",
		"no phase":      "data = '{}'",
		"unknown phase": `data = replace(data, '"Phase":"', '"Phase":"un'), phase = 'unknown'`,
		"another box":   `data = replace(data, '"ID":"', '"ID":"z')`,
	} {
		t.Run(name, func(t *testing.T) {
			db, err := Open(t.Context(), t.TempDir())
			must(t, err)
			defer db.Close()
			create(t, db, "bad", "b")
			create(t, db, "good", "g")
			_, err = db.Update(t.Context(), "bad", Change{}, func(b *Box) error { b.Phase, b.Generation = Created, 7; return nil })
			must(t, err)
			_, err = db.db.ExecContext(t.Context(), "UPDATE boxes SET "+damage+" WHERE id = 'bad'")
			must(t, err)
			boxes, err := db.List(t.Context())
			if err != nil || len(boxes) != 2 {
				t.Fatalf("%v, %v", boxes, err)
			}
			b, err := db.Get(t.Context(), "b")
			must(t, err)
			if !b.Damaged || b.ID != "bad" || b.Generation != 7 || b.Phase.Live() {
				t.Errorf("read as %+v", b)
			}
			b, err = db.Update(t.Context(), "bad", Change{Generation: 7}, func(b *Box) error { b.Phase = Removing; return nil })
			if err != nil || !b.Damaged || b.Phase != Removing {
				t.Errorf("updated to %+v, %v", b, err)
			}
			must(t, db.Delete(t.Context(), "bad", "b"))
			if g, err := db.Get(t.Context(), "g"); err != nil || g.Damaged {
				t.Errorf("the other one: %+v, %v", g, err)
			}
		})
	}
}
