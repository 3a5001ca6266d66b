package e2e

import (
	"database/sql"
	"encoding/json"
	"path/filepath"

	_ "modernc.org/sqlite" // to see records the moment they are written, and to damage them
)

// records opens the home's database behind the product's back.
func (h *home) records(mode string) *sql.DB {
	h.t.Helper()
	db, err := sql.Open("sqlite", "file:"+filepath.Join(h.dir, "state.db")+"?mode="+mode+"&_pragma=busy_timeout(5000)")
	if err != nil {
		h.t.Fatal(err)
	}
	return db
}

// change runs a statement on the home's database.
func (h *home) change(query string, args ...any) {
	h.t.Helper()
	db := h.records("rw")
	defer db.Close()
	if _, err := db.Exec(query, args...); err != nil {
		h.t.Fatalf("%s: %v", query, err)
	}
}

// edit changes a box's record.
func (h *home) edit(id string, fn func(map[string]any)) {
	h.t.Helper()
	db := h.records("rw")
	defer db.Close()
	var data string
	if err := db.QueryRow("SELECT data FROM boxes WHERE id = ?", id).Scan(&data); err != nil {
		h.t.Fatal(err)
	}
	var rec map[string]any
	if err := json.Unmarshal([]byte(data), &rec); err != nil {
		h.t.Fatal(err)
	}
	fn(rec)
	b, err := json.Marshal(rec)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := db.Exec("UPDATE boxes SET data = ?, phase = ? WHERE id = ?", string(b), rec["Phase"], id); err != nil {
		h.t.Fatal(err)
	}
}
