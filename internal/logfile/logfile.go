// Package logfile keeps the output of a box's main process: one JSON value per line, in a bounded number of bounded files. One
// process writes; any number read, while it is written or after. It knows nothing of boxes.
package logfile

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// Defaults of the bounds.
const (
	DefaultMaxBytes = 16 << 20
	DefaultFiles    = 3
)

// Streams an entry may belong to.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// Entry is one piece of output. Text that is not UTF-8 is kept as bytes.
type Entry struct {
	Time   time.Time `json:"time"`
	Stream string    `json:"stream"`
	Text   string    `json:"text,omitempty"`
	Bytes  []byte    `json:"bytes,omitempty"`
}

// Data is the entry's output, whichever way it is kept.
func (e Entry) Data() []byte {
	if e.Bytes != nil {
		return e.Bytes
	}
	return []byte(e.Text)
}

// Writer appends entries. It is not safe for concurrent use.
type Writer struct {
	path  string
	max   int64
	files int
	f     *os.File
	size  int64
}

// NewWriter opens the log at path for appending. Zero bounds mean the defaults.
func NewWriter(path string, maxBytes int64, files int) (*Writer, error) {
	w := &Writer{path: path, max: maxBytes, files: files}
	if w.max <= 0 {
		w.max = DefaultMaxBytes
	}
	if w.files <= 0 {
		w.files = DefaultFiles
	}
	return w, w.open()
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("open log: %w", err)
	}
	w.f, w.size = f, st.Size()
	// A line that a crash has torn must not take the next one with it.
	last := []byte{'\n'}
	if w.size > 0 {
		if _, err := f.ReadAt(last, w.size-1); err != nil {
			f.Close()
			return fmt.Errorf("open log: %w", err)
		}
	}
	if last[0] != '\n' {
		// On a full disk the next entry is not written either.
		n, _ := f.WriteString("\n")
		w.size += int64(n)
	}
	return nil
}

// Append writes one entry.
func (w *Writer) Append(stream string, data []byte) error {
	e := Entry{Time: time.Now().UTC(), Stream: stream}
	if utf8.Valid(data) {
		e.Text = string(data)
	} else {
		e.Bytes = data
	}
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	if w.size > 0 && w.size+int64(len(line)) > w.max {
		if err := w.rotate(); err != nil {
			return err
		}
	}
	n, err := w.f.Write(line)
	if err == nil {
		w.size += int64(n)
		return nil
	}
	// A piece of a line would take the next one with it.
	if n > 0 && w.f.Truncate(w.size) != nil {
		w.size += int64(n)
	}
	return fmt.Errorf("write log: %w", err)
}

func (w *Writer) rotate() error {
	for i := w.files - 1; i > 0; i-- {
		from := w.path
		if i > 1 {
			from = numbered(w.path, i-1)
		}
		if err := os.Rename(from, numbered(w.path, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	w.f.Close()
	if w.files == 1 {
		if err := os.Remove(w.path); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	return w.open()
}

func numbered(path string, i int) string { return path + "." + strconv.Itoa(i) }

// Close closes the file.
func (w *Writer) Close() error { return w.f.Close() }

// Snapshot is everything that was logged up to a moment, held open so that a rotation cannot take it away.
type Snapshot struct {
	files []*os.File
	// headless is set in the middle of a rotation, or where there is no log.
	headless bool
	last     int64 // bytes of the newest file that belong to it
}

// snapTries is how often a snapshot is begun anew because the log was rotated meanwhile. Rotations are seconds apart.
const snapTries = 1000

// Snap takes a snapshot of the log at path.
func Snap(path string) (*Snapshot, error) {
	for try := 1; ; try++ {
		s, err := snap(path)
		if err != nil {
			return nil, err
		}
		if try == snapTries || s.current(path) {
			return s, nil
		}
		s.Close()
	}
}

// current reports whether the log has not been rotated since the snapshot was begun.
func (s *Snapshot) current(path string) bool {
	now, err := os.Stat(path)
	if err != nil || s.headless {
		return err != nil && s.headless
	}
	have, err := s.files[len(s.files)-1].Stat()
	return err == nil && os.SameFile(have, now)
}

func snap(path string) (*Snapshot, error) {
	s := &Snapshot{}
	// The newest first: a rotation meanwhile gives files higher numbers, so that some are met twice and none is missed.
	missing := 0
	for i := 0; missing < 2; i++ {
		name := path
		if i > 0 {
			name = numbered(path, i)
		}
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			missing++ // in the middle of a rotation one name is nobody's
			s.headless = s.headless || i == 0
			continue
		}
		if err == nil {
			err = s.add(f)
		}
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("read log: %w", err)
		}
	}
	slices.Reverse(s.files)
	if len(s.files) > 0 {
		st, err := s.files[len(s.files)-1].Stat()
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("read log: %w", err)
		}
		s.last = st.Size()
	}
	return s, nil
}

// add takes a file, unless it is in the snapshot already.
func (s *Snapshot) add(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	for _, have := range s.files {
		if hst, err := have.Stat(); err != nil || os.SameFile(st, hst) {
			f.Close()
			return err
		}
	}
	s.files = append(s.files, f)
	return nil
}

// Each calls fn for every entry, oldest first, and closes the snapshot. Lines that a crash has torn are passed over.
func (s *Snapshot) Each(fn func(Entry) error) error {
	defer s.Close()
	return s.Scan(fn)
}

// Scan is Each, and leaves the snapshot as it was.
func (s *Snapshot) Scan(fn func(Entry) error) error {
	for i, f := range s.files {
		// A file that was the newest when it was opened may have grown since; only of the last one has that an end here.
		n := int64(math.MaxInt64)
		if i == len(s.files)-1 {
			n = s.last
		}
		r := io.NewSectionReader(f, 0, n)
		if err := each(bufio.NewReaderSize(r, 64<<10), fn); err != nil {
			return err
		}
	}
	return nil
}

func each(r *bufio.Reader, fn func(Entry) error) error {
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		var e Entry
		if json.Unmarshal(line, &e) != nil {
			continue
		}
		if err := fn(e); err != nil {
			return err
		}
	}
}

// Close lets go of the files.
func (s *Snapshot) Close() {
	for _, f := range s.files {
		f.Close()
	}
	s.files = nil
}

// Follow calls fn for every entry of the snapshot of the log at path and for every one that comes, through rotations, until ended says
// that no more will come or ctx ends.
func (s *Snapshot) Follow(ctx context.Context, path string, ended func() (bool, error), fn func(Entry) error) error {
	var cur *os.File
	for i, f := range s.files {
		if i == len(s.files)-1 {
			cur = f
			break
		}
		if err := each(bufio.NewReaderSize(io.NewSectionReader(f, 0, math.MaxInt64), 64<<10), fn); err != nil {
			return err
		}
	}
	t := tail{path: path, f: cur, fn: fn}
	defer t.close()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		// Asked before reading: what is written before the end is then read after it.
		over, err := ended()
		if err != nil {
			return err
		}
		n, err := t.more()
		if err != nil {
			return err
		}
		if n > 0 {
			wait = time.Millisecond
			continue
		}
		if over {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// tail reads whole lines as they appear at the end of a file, and goes on with the next one after a rotation.
type tail struct {
	path string
	f    *os.File
	own  bool // not the snapshot's
	pos  int64
	part []byte
	fn   func(Entry) error
}

func (t *tail) close() {
	if t.own {
		t.f.Close()
	}
}

func (t *tail) more() (int, error) {
	if t.f == nil {
		f, err := os.Open(t.path)
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		if err != nil {
			return 0, fmt.Errorf("read log: %w", err)
		}
		t.f, t.own = f, true
	}
	buf := make([]byte, 64<<10)
	n, err := t.f.ReadAt(buf, t.pos)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read log: %w", err)
	}
	if n == 0 {
		return t.next()
	}
	t.pos += int64(n)
	t.part = append(t.part, buf[:n]...)
	for {
		i := bytes.IndexByte(t.part, '\n')
		if i < 0 {
			return n, nil
		}
		var e Entry
		line := t.part[:i]
		t.part = t.part[i+1:]
		if json.Unmarshal(line, &e) == nil {
			if err := t.fn(e); err != nil {
				return n, err
			}
		}
	}
}

// next moves on to the file that came after the one in hand, once that is read to its end.
func (t *tail) next() (int, error) {
	have, err := t.f.Stat()
	if err != nil {
		return 0, nil
	}
	if now, err := os.Stat(t.path); err != nil || os.SameFile(have, now) {
		return 0, nil
	}
	// Opened all together, and then looked at: more than one rotation may have happened, and one may happen now.
	s, err := Snap(t.path)
	if err != nil || len(s.files) == 0 {
		return 0, err
	}
	defer s.Close()
	next := 0 // the oldest, where ours is gone
	for i, f := range s.files {
		if st, err := f.Stat(); err == nil && os.SameFile(st, have) {
			next = i + 1
		}
	}
	if next == len(s.files) {
		return 0, nil // being rotated right now
	}
	// Between the last read and the rotation something may have been added. After it nothing is.
	if st, err := t.f.Stat(); err != nil || t.pos < st.Size() {
		return 1, nil
	}
	t.close()
	t.f, t.own, t.pos, t.part = s.files[next], true, 0, nil
	s.files = slices.Delete(s.files, next, next+1)
	return 1, nil
}
