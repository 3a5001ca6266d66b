// Package state keeps the records of all boxes of one home in an SQLite database that any number of processes use at once. It
// records what was intended before it is done and what was done after; it acts on nothing itself, and no transaction is held
// while something is awaited.
package state

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	_ "modernc.org/sqlite" // the database/sql driver

	"github.com/coffer-box/coffer/internal/disk"
	"github.com/coffer-box/coffer/internal/spec"
)

// Errors that callers tell apart.
var (
	ErrNotFound  = errors.New("no such box")
	ErrExists    = errors.New("already exists")
	ErrAmbiguous = errors.New("several boxes begin with it")
	ErrStale     = errors.New("the box has been started anew meanwhile")
	ErrCorrupt   = errors.New("the state database is damaged")
	ErrNewer     = errors.New("the state database was written by a newer coffer")
)

// Phase is where a box is in its life.
type Phase string

// Phases.
const (
	Creating Phase = "creating"
	Created  Phase = "created"
	Starting Phase = "starting"
	Running  Phase = "running"
	Paused   Phase = "paused"
	Stopping Phase = "stopping"
	Stopped  Phase = "stopped"
	Removing Phase = "removing"
	Failed   Phase = "failed"
)

// next is the whole state machine: which phases may follow which. A phase may always follow itself.
var next = map[Phase][]Phase{
	Creating: {Created, Failed, Removing},
	Created:  {Starting, Failed, Removing},
	Starting: {Running, Stopping, Stopped, Failed, Removing},
	Running:  {Paused, Stopping, Stopped, Failed, Removing},
	Paused:   {Running, Stopping, Stopped, Failed, Removing},
	Stopping: {Stopped, Failed, Removing},
	Stopped:  {Starting, Failed, Removing},
	Failed:   {Starting, Stopped, Removing},
	Removing: {},
}

// Live tells whether processes of the box may exist in this phase.
func (p Phase) Live() bool { return p == Starting || p == Running || p == Paused || p == Stopping }

// Health is what its health checks say of a box that runs.
type Health string

// Health of a box. A box without checks has none.
const (
	HealthStarting Health = "starting" // no check has succeeded yet, nor enough of them failed
	Healthy        Health = "healthy"
	Unhealthy      Health = "unhealthy"
)

// TransitionError says that a box cannot go from one phase to another.
type TransitionError struct {
	Name     string
	From, To Phase
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("box %s is %s and cannot become %s", e.Name, e.From, e.To)
}

// Box is one record. Times are UTC; zero times are unset.
type Box struct {
	ID            string
	Name          string
	Phase         Phase
	Generation    uint64 // 0: never started
	Spec          spec.Box
	CreatedAt     time.Time
	StartedAt     time.Time
	FinishedAt    time.Time
	ExitCode      int
	Reason        string // why the last generation ended
	OOMKilled     bool
	Error         string // what failed, for Failed
	Health        Health // of no meaning unless it is Running
	RestartCount  int
	Damaged       bool            // the record could not be read whole: the box can be ended and removed, and not started
	RemoveVolumes bool            // the anonymous volumes go too; for Removing
	Visit         bool            // a generation without a main process was opened to get at the files, and is yet to be seen gone
	ManualStop    bool            // a user stopped it: the restart policy does not apply
	Handles       json.RawMessage // the caller's: how to find the generation's processes
	Layers        json.RawMessage // the caller's: the jail's protections
}

// Event is one thing that happened.
type Event struct {
	Seq    int64             `json:"seq"`
	Time   time.Time         `json:"time"`
	BoxID  string            `json:"id"`
	Name   string            `json:"name"`
	Action string            `json:"action"`
	Attrs  map[string]string `json:"attrs,omitempty"`
}

// DB is an open database, safe for concurrent use.
type DB struct {
	db       *sql.DB
	dir      string
	instance string
}

const schemaVersion = 2

const schema = `
CREATE TABLE boxes (
	id TEXT PRIMARY KEY,
	name TEXT NOT NULL UNIQUE,
	phase TEXT NOT NULL,
	generation INTEGER NOT NULL,
	data TEXT NOT NULL
) STRICT;
CREATE TABLE events (
	seq INTEGER PRIMARY KEY AUTOINCREMENT,
	data TEXT NOT NULL
) STRICT;
` + schemaHome

// schemaHome is what version 2 added: whose records these are.
const schemaHome = `
CREATE TABLE home (instance TEXT NOT NULL, place TEXT NOT NULL) STRICT;
PRAGMA user_version = 2;
`

// File is the database's name in the home directory.
const File = "state.db"

// instanceFile keeps a copy of the home's identity outside the database, so that a lost database does not lose the names of resources,
// under which the processes of a home with boxes are found.
const instanceFile = "instance"

// busy is how long a writer waits for another.
const busy = 5 * time.Second

// Open opens the database of a home directory, creating both. A home that has boxes and an empty or no database is [ErrCorrupt]:
// nothing is ever silently replaced by something fresh.
func Open(ctx context.Context, home string) (*DB, error) { return open(ctx, home, false) }

// OpenFresh is Open after [Recover]: boxes without a record are expected.
func OpenFresh(ctx context.Context, home string) (*DB, error) { return open(ctx, home, true) }

func open(ctx context.Context, home string, fresh bool) (*DB, error) {
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, homeError(home, err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(home, &st); err != nil {
		return nil, homeError(home, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("state directory %s belongs to user %d, not to you (%d): choose another with --home or COFFER_HOME", home, st.Uid, os.Geteuid())
	}
	path := filepath.Join(home, File)
	if !fresh {
		if err := lost(home); err != nil {
			return nil, err
		}
	}
	if err := keepPrivate(home, path); err != nil {
		return nil, err
	}
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {
		fmt.Sprintf("busy_timeout(%d)", busy.Milliseconds()), "journal_mode(WAL)", "synchronous(NORMAL)",
		// The log stays between commands, and is read by the first that opens it: keep it short. The unit is pages of 4 KiB.
		"wal_autocheckpoint(100)",
	}}
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+"?"+q.Encode())
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	// One connection: the work is short, and a second one would only contend for the same lock.
	db.SetMaxOpenConns(1)
	d := &DB{db: db, dir: home}
	// SQLite waits for other writers, but not for others that make the same database at the same moment.
	for deadline := time.Now().Add(busy); ; {
		err := d.migrate(ctx, fresh, place(&st))
		if err == nil {
			err = d.identify(ctx, place(&st))
		}
		if err == nil {
			d.keepRoom()
			return d, nil
		}
		if d.makeRoom(err) {
			continue
		}
		if primaryCode(err) != codeBusy || time.Now().After(deadline) {
			db.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			db.Close()
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func homeError(home string, err error) error {
	return fmt.Errorf("state directory %s cannot be used: %w: choose another with --home or COFFER_HOME", home, err)
}

// keepPrivate sees to it that only the owner can read the records, which hold the boxes' environments, even in a directory that
// others may enter. SQLite gives its other files the mode of the database. The file is not opened for that: closing it would end the
// locks of this process' other connections.
func keepPrivate(home, path string) error {
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		tmp, err := os.CreateTemp(home, ".db-*")
		if err != nil {
			return homeError(home, err)
		}
		defer os.Remove(tmp.Name())
		if err := errors.Join(tmp.Close(), os.Link(tmp.Name(), path)); err != nil && !errors.Is(err, fs.ErrExist) {
			return homeError(home, err)
		}
		return nil
	}
	if err != nil {
		return homeError(home, err)
	}
	if st.Mode().Perm()&0o077 == 0 {
		return nil
	}
	for _, name := range []string{path, path + "-wal", path + "-shm"} {
		if err := os.Chmod(name, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make %s private: %w", name, err)
		}
	}
	return nil
}

// place identifies the home's directory, so that a copy of a home is told from the home.
func place(st *syscall.Stat_t) string { return fmt.Sprintf("%x:%x", st.Dev, st.Ino) }

// readInstance returns the home's identity by its file; "" where there is no file, or one that holds none.
func readInstance(home string) (string, error) {
	b, err := os.ReadFile(filepath.Join(home, instanceFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", homeError(home, err)
	}
	id := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 8 {
		return "", nil
	}
	return id, nil
}

func newInstance() string {
	raw := make([]byte, 8)
	_, _ = rand.Read(raw) // never fails
	return hex.EncodeToString(raw)
}

// identify learns which home this is. A home that was copied or restored to another place gets an identity of its own: under the old one
// it would find the boxes of the home that it is a copy of, and end them.
func (d *DB) identify(ctx context.Context, place string) error {
	read := func(q interface {
		QueryRowContext(context.Context, string, ...any) *sql.Row
	}) (at string, err error) {
		err = q.QueryRowContext(ctx, "SELECT instance, place FROM home").Scan(&d.instance, &at)
		if errors.Is(err, sql.ErrNoRows) {
			return "", d.damaged(errors.New("it does not say which home it is of"))
		}
		return at, err
	}
	at, err := read(d.db)
	if err != nil {
		return d.explain("open", err)
	}
	if at != place {
		err := d.tx(ctx, func(tx *sql.Tx) error {
			// Another process may have done it while this one waited.
			if at, err := read(tx); err != nil || at == place {
				return err
			}
			d.instance = newInstance()
			if _, err := tx.ExecContext(ctx, "UPDATE home SET instance = ?, place = ?", d.instance, place); err != nil {
				return err
			}
			return forget(ctx, tx)
		})
		if err != nil {
			return err
		}
	}
	if have, err := readInstance(d.dir); err != nil || have == d.instance {
		return err
	}
	if err := disk.Replace(filepath.Join(d.dir, instanceFile), []byte(d.instance+"\n")); err != nil {
		return homeError(d.dir, err)
	}
	return nil
}

// forget marks boxes as ended whose processes, if any live, are another home's.
func forget(ctx context.Context, tx *sql.Tx) error {
	rows, err := tx.QueryContext(ctx, selectBox)
	if err != nil {
		return err
	}
	defer rows.Close()
	var live []*Box
	for rows.Next() {
		b, err := scanBox(rows)
		if err != nil {
			return err
		}
		if b.Phase.Live() || b.Visit || len(b.Handles) > 0 {
			live = append(live, b)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for _, b := range live {
		if b.Phase.Live() {
			b.Phase, b.ExitCode, b.Reason, b.FinishedAt = Stopped, codeElsewhere, "copied", now()
			b.ManualStop = true // nothing is started because a home was copied
		}
		b.Visit, b.Handles = false, nil
		data, err := json.Marshal(b)
		if err != nil {
			return err
		}
		if _, err := tx.ExecContext(ctx, "UPDATE boxes SET phase = ?, data = ? WHERE id = ?", b.Phase, string(data), b.ID); err != nil {
			return err
		}
	}
	return nil
}

// codeElsewhere is the exit code of a box that ran when its home was copied: what became of it here cannot be known.
const codeElsewhere = 137

// lost tells a home with boxes whose database is not there or has nothing in it. It looks before the database is opened: that would
// make a new one, and delete the log of the old.
func lost(home string) error {
	// The directories first: a box's is made after the database.
	n := boxDirs(home)
	if n == 0 {
		return nil
	}
	st, err := os.Stat(filepath.Join(home, File))
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() == 0 {
		return emptyError(home, n)
	}
	return nil
}

func boxDirs(home string) int {
	entries, _ := os.ReadDir(filepath.Join(home, "boxes"))
	return len(entries)
}

func emptyError(home string, boxes int) error {
	return fmt.Errorf("%s: %w: it is lost or empty, and there are files of %d boxes; `coffer doctor --fix` moves it aside and ends what still runs",
		filepath.Join(home, File), ErrCorrupt, boxes)
}

func (d *DB) migrate(ctx context.Context, fresh bool, place string) error {
	var v int
	if err := d.db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&v); err != nil {
		return d.explain("open", err)
	}
	switch {
	case v == schemaVersion:
		return nil
	case v > schemaVersion:
		return fmt.Errorf("%s: %w (schema %d, this one knows %d): use that coffer", filepath.Join(d.dir, File), ErrNewer, v, schemaVersion)
	}
	if n := boxDirs(d.dir); v == 0 && !fresh && n > 0 {
		// Unless another process has made it, and a box, since.
		if err := d.db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&v); err == nil && v == schemaVersion {
			return nil
		}
		return emptyError(d.dir, n)
	}
	return d.tx(ctx, func(tx *sql.Tx) error {
		// Another process may have done it while this one waited.
		if err := tx.QueryRowContext(ctx, "PRAGMA user_version").Scan(&v); err != nil || v == schemaVersion {
			return err
		}
		step := schema
		if v == 1 {
			step = schemaHome
		}
		if _, err := tx.ExecContext(ctx, step); err != nil {
			return err
		}
		// A database that was lost and made anew is still of the same home.
		id, err := readInstance(d.dir)
		if err != nil {
			return err
		}
		if id == "" {
			id = newInstance()
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO home (instance, place) VALUES (?, ?)", id, place)
		return err
	})
}

// Close closes the database.
func (d *DB) Close() error { return d.db.Close() }

// Instance is the home's identity, 16 hexadecimal digits; it stands in the name of everything outside the home.
func (d *DB) Instance() string { return d.instance }

// durably is tx for what must outlive a power failure: that a box exists. What its processes do is of no
// meaning after one, and is kept without waiting for the disk; it survives everything else.
func (d *DB) durably(ctx context.Context, fn func(*sql.Tx) error) (err error) {
	// The setting is a connection's, so that one must be this call's alone.
	conn, err := d.db.Conn(ctx)
	if err != nil {
		return d.explain("open", err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "PRAGMA synchronous = FULL"); err != nil {
		return d.explain("open", err)
	}
	defer func() {
		_, perr := conn.ExecContext(context.WithoutCancel(ctx), "PRAGMA synchronous = NORMAL")
		err = errors.Join(err, perr)
	}()
	return d.txOn(ctx, conn, fn)
}

func (d *DB) tx(ctx context.Context, fn func(*sql.Tx) error) error { return d.txOn(ctx, d.db, fn) }

func (d *DB) txOn(ctx context.Context, on interface {
	BeginTx(context.Context, *sql.TxOptions) (*sql.Tx, error)
}, fn func(*sql.Tx) error) error {
	tx, err := on.BeginTx(ctx, nil)
	if err != nil {
		return d.explain("begin", err)
	}
	if err := fn(tx); err != nil {
		_ = tx.Rollback()
		return d.explain("write", err)
	}
	if err := tx.Commit(); err != nil {
		return d.explain("commit", err)
	}
	return nil
}

// reserve is a file that takes room on the disk, and gives it back when a box is to be ended and there is none: what cannot be recorded
// cannot be ended, and removing boxes is how people make room.
const (
	reserve     = "reserve"
	reserveSize = 1 << 20
)

// keepRoom makes the reserve where there is none, if the disk has the room. Whoever is killed at it leaves a smaller one.
func (d *DB) keepRoom() {
	path := filepath.Join(d.dir, reserve)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err := os.WriteFile(path, make([]byte, reserveSize), 0o600); err != nil {
		_ = os.Remove(path)
	}
}

// makeRoom gives the reserve up if err says that the disk is full, and tells whether to try again.
func (d *DB) makeRoom(err error) bool {
	switch primaryCode(err) {
	case codeFull:
	case codeIO, codeCantOpen: // what its shared memory finds on a full disk, or over a quota
	default:
		return false
	}
	return os.Remove(filepath.Join(d.dir, reserve)) == nil
}

// SQLite's primary result codes.
const (
	codeNone     = -1 // the error is not the database's
	codeBusy     = 5
	codeIO       = 10
	codeFull     = 13
	codeCantOpen = 14
)

func primaryCode(err error) int {
	var code interface{ Code() int }
	if !errors.As(err, &code) {
		return codeNone
	}
	return code.Code() & 0xff
}

// explain turns the database's own errors into what a user can act on.
func (d *DB) explain(op string, err error) error {
	path := filepath.Join(d.dir, File)
	switch primaryCode(err) {
	case codeNone:
		return err
	case codeBusy, 6: // SQLITE_LOCKED
		return fmt.Errorf("%s is in use by %s for over %v: %w; continue or end that process and try again", path, lockHolder(d.dir), busy, err)
	case 11, 26: // SQLITE_CORRUPT, SQLITE_NOTADB
		return d.damaged(err)
	case codeFull:
		return fmt.Errorf("no space left on the disk of %s: %w", path, err)
	case 8, codeCantOpen, codeIO: // SQLITE_READONLY
		return fmt.Errorf("%s cannot be written: %w: make its directory writable, or choose another with --home or COFFER_HOME", path, err)
	}
	return fmt.Errorf("%s state: %w", op, err)
}

func (d *DB) damaged(err error) error {
	return fmt.Errorf("%s: %w: %w; `coffer doctor --fix` moves it aside and lists what is still running", filepath.Join(d.dir, File), ErrCorrupt, err)
}

// Recover moves a damaged database aside and returns where to. Nothing is deleted.
func Recover(home string) (string, error) {
	to := filepath.Join(home, fmt.Sprintf("state.db.damaged-%d", time.Now().Unix()))
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Rename(filepath.Join(home, File+suffix), to+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("move damaged database aside: %w", err)
		}
	}
	return to, nil
}
