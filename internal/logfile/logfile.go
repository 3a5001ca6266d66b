// Package logfile keeps the output of a box's main process: one JSON value per line, in a bounded number of bounded files. One
// process writes; any number read, while it is written or after. It knows nothing of boxes.
package logfile

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
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
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("open log: %w", err)
	}
	w.f, w.size = f, st.Size()
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
	w.size += int64(n)
	if err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	return nil
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
	last  int64 // bytes of the newest file that belong to it
}

// Snap takes a snapshot of the log at path.
func Snap(path string) (*Snapshot, error) {
	s := &Snapshot{}
	names := []string{path}
	for i := 1; ; i++ {
		if _, err := os.Stat(numbered(path, i)); err != nil {
			break
		}
		names = append([]string{numbered(path, i)}, names...)
	}
	for _, n := range names {
		f, err := os.Open(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("read log: %w", err)
		}
		s.files = append(s.files, f)
	}
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

// Each calls fn for every entry, oldest first, and closes the snapshot. Lines that a crash has torn are passed over.
func (s *Snapshot) Each(fn func(Entry) error) error {
	defer s.Close()
	for i, f := range s.files {
		var r io.Reader = f
		if i == len(s.files)-1 {
			r = io.LimitReader(f, s.last)
		}
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

// Follow calls fn for every entry there is and for every one that comes, through rotations, until ended says that no more will
// come or ctx ends.
func Follow(ctx context.Context, path string, ended func() (bool, error), fn func(Entry) error) error {
	s, err := Snap(path)
	if err != nil {
		return err
	}
	defer s.Close()
	var cur *os.File
	for i, f := range s.files {
		if i == len(s.files)-1 {
			cur = f
			break
		}
		if err := each(bufio.NewReaderSize(f, 64<<10), fn); err != nil {
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
	n, err := t.f.Read(buf)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, fmt.Errorf("read log: %w", err)
	}
	if n == 0 {
		return t.next()
	}
	t.part = append(t.part, buf[:n]...)
	for {
		i := indexNewline(t.part)
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

// next moves on to the file that now has the log's name, once the one in hand is read to its end and is another.
func (t *tail) next() (int, error) {
	have, err1 := t.f.Stat()
	now, err2 := os.Stat(t.path)
	if err1 != nil || err2 != nil || os.SameFile(have, now) {
		return 0, nil
	}
	// Between the last read and the rotation something may have been added.
	if pos, err := t.f.Seek(0, io.SeekCurrent); err == nil && pos < have.Size() {
		return 1, nil
	}
	// More than one rotation may have happened: find the one after ours.
	next := t.path
	for i := 1; ; i++ {
		st, err := os.Stat(numbered(t.path, i))
		if err != nil {
			break
		}
		if os.SameFile(st, have) {
			if i > 1 {
				next = numbered(t.path, i-1)
			}
			break
		}
	}
	f, err := os.Open(next)
	if err != nil {
		return 0, nil // being rotated right now
	}
	t.close()
	t.f, t.own, t.part = f, true, nil
	return 1, nil
}

func indexNewline(b []byte) int {
	for i, c := range b {
		if c == '\n' {
			return i
		}
	}
	return -1
}
