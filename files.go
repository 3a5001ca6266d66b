package coffer

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"time"

	"github.com/coffer-box/coffer/internal/lifecycle"
	"github.com/coffer-box/coffer/internal/logfile"
	"github.com/coffer-box/coffer/internal/shim"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
	"github.com/coffer-box/coffer/internal/wire"
)

// FileInfo describes a file in a box.
type FileInfo = wire.FileInfo

// ProcessInfo is one process of a box.
type ProcessInfo = wire.ProcessInfo

// CopyOut writes a tar archive of a file or directory of the box to w. Names begin with the last element of path. Like CopyIn and
// Stat it also works on a box that does not run: its kernel is started for it, its main process is not.
func (b *Box) CopyOut(ctx context.Context, path string, follow bool, w io.Writer) error {
	begun := false
	return b.withFiles(ctx, &begun, func(c *wire.Client) error {
		// What is small comes whole or can be begun again.
		buf := bufio.NewWriterSize(beginWriter{w, &begun}, 64<<10)
		if err := c.TarOut(ctx, path, follow, buf); err != nil {
			return err
		}
		return buf.Flush()
	})
}

// CopyIn unpacks a tar archive into a directory of the box.
func (b *Box) CopyIn(ctx context.Context, dir string, r io.Reader) error {
	begun := false
	return b.withFiles(ctx, &begun, func(c *wire.Client) error {
		return c.TarIn(ctx, dir, beginReader{r, &begun}, wire.TarInOptions{NoOverwriteDir: true})
	})
}

// beginWriter and beginReader note that the first byte has passed.
type beginWriter struct {
	io.Writer
	begun *bool
}

func (w beginWriter) Write(p []byte) (int, error) {
	*w.begun = true
	return w.Writer.Write(p)
}

type beginReader struct {
	io.Reader
	begun *bool
}

func (r beginReader) Read(p []byte) (int, error) {
	*r.begun = true
	return r.Reader.Read(p)
}

// Stat describes a file of the box.
func (b *Box) Stat(ctx context.Context, path string, follow bool) (FileInfo, error) {
	var fi FileInfo
	err := b.withFiles(ctx, new(bool), func(c *wire.Client) error {
		var err error
		fi, err = c.Stat(ctx, path, follow)
		return err
	})
	return fi, err
}

// withFiles runs fn with a connection to the agent of the box, or of a generation that is opened only for that. It runs fn again if the
// box ended meanwhile, as one does that crashes and is restarted, unless fn had begun with what cannot be done twice.
func (b *Box) withFiles(ctx context.Context, begun *bool, fn func(*wire.Client) error) error {
	const tries = 10 // each meets another run of the box; what ends every one of them is not a matter of chance
	ended := func(err error) bool { return !*begun && errors.Is(err, wire.ErrClosed) }
	var err error
	for range tries {
		if err = b.withAgent(ctx, fn); !ended(err) && !errors.Is(err, ErrNotRunning) {
			return err
		}
		live := false
		xerr := b.exclusive(ctx, func(rec *state.Box) error {
			// A run that is at its end is waited for, so that it is not met again.
			rec, err := b.carryOn(ctx, rec)
			if err != nil {
				return err
			}
			if live = rec.Phase.Live(); live {
				return nil
			}
			return b.visit(ctx, rec, fn)
		})
		if xerr == nil && live {
			continue
		}
		if err = xerr; !ended(err) {
			return err
		}
	}
	return err
}

// visit opens a generation without a main process for fn, and ends it. The caller holds the operation lock.
func (b *Box) visit(ctx context.Context, rec *state.Box, fn func(*wire.Client) error) error {
	rec, launched, err := b.open(ctx, rec, shim.Files, func(s *state.Box) { s.Visit = true })
	var failed *StartError
	switch {
	case errors.As(err, &failed):
		err = fmt.Errorf("open the files of box %s: %s", b.name, failed.Msg)
	case err != nil:
		err = fmt.Errorf("open the files of box %s: %w", b.name, err)
	default:
		var c *wire.Client
		if c, err = b.rt.dial(ctx, rec); err == nil {
			err = errors.Join(fn(c), c.Close())
		}
		launched.Close()
	}
	// The shim writes everything out and ends; what it leaves undone is ended here.
	ctx = context.WithoutCancel(ctx)
	patience, cancel := context.WithTimeout(ctx, 2*grace)
	defer cancel()
	_ = supervise.WaitFree(patience, b.rt.home.Box(b.id).ShimLock())
	now, gerr := b.rt.db.Get(ctx, b.id)
	if gerr == nil && now.Visit {
		now, gerr = b.rt.keeper.EndVisit(ctx, now)
	}
	if gerr == nil && lifecycle.WantsRestart(now) {
		// Its shim was waiting to do that.
		gerr = b.launch(ctx, now, now.RestartCount+1)
	}
	return errors.Join(err, gerr)
}

// Processes lists what runs in the box.
func (b *Box) Processes(ctx context.Context) ([]ProcessInfo, error) {
	var out []ProcessInfo
	err := b.withAgent(ctx, func(c *wire.Client) error {
		var err error
		out, err = c.Processes(ctx)
		return err
	})
	return out, err
}

// LogOptions say what of the output is wanted.
type LogOptions struct {
	Follow bool
	Since  time.Time // zero: from the beginning
	Tail   int       // the last lines; negative: everything
}

// LogEntry is one piece of the main process' output, as it came.
type LogEntry struct {
	Time   time.Time
	Stderr bool
	Data   []byte
}

// Logs calls fn for every piece of output of the main process, of all starts of the box that are still kept, oldest first. With
// Follow it goes on until the box does not run any more.
func (b *Box) Logs(ctx context.Context, o LogOptions, fn func(LogEntry) error) error {
	rec, err := b.rt.db.Get(ctx, b.id)
	if err != nil {
		return err
	}
	path := b.rt.home.Box(b.id).Log()
	// One for counting and reading: between two of them the log may have been rotated.
	s, err := logfile.Snap(path)
	if err != nil {
		return err
	}
	defer s.Close()
	skip := 0
	if o.Tail >= 0 {
		n, err := countLines(s, o.Since)
		if err != nil {
			return err
		}
		skip = max(0, n-o.Tail)
	}
	var lines lineCounter
	emit := func(e logfile.Entry) error {
		if e.Time.Before(o.Since) {
			return nil
		}
		data := e.Data()
		if skip > 0 {
			if data = lines.after(skip, e); len(data) == 0 {
				return nil
			}
		}
		return fn(LogEntry{Time: e.Time, Stderr: e.Stream == logfile.Stderr, Data: data})
	}
	if !o.Follow {
		return s.Each(emit)
	}
	w, err := supervise.Watch(b.rt.home.Box(rec.ID).ShimLock())
	if err != nil {
		return err
	}
	defer w.Close()
	return s.Follow(ctx, path, func() (bool, error) {
		if w == nil {
			return true, nil
		}
		held, err := w.Held()
		return !held, err
	}, emit)
}

func countLines(s *logfile.Snapshot, since time.Time) (int, error) {
	var lines lineCounter
	err := s.Scan(func(e logfile.Entry) error {
		if !e.Time.Before(since) {
			lines.after(math.MaxInt, e)
		}
		return nil
	})
	return lines.begun, err
}

// lineCounter numbers the lines of a log, in the order in which they were begun. A line may come in several pieces, with pieces
// of the other stream between them.
type lineCounter struct {
	begun int
	open  map[string]int // number of the unfinished line of a stream
}

// after counts an entry's lines and returns what of them belongs to later ones than the first skip.
func (c *lineCounter) after(skip int, e logfile.Entry) []byte {
	if c.open == nil {
		c.open = map[string]int{}
	}
	var out []byte
	for line := range bytes.Lines(e.Data()) {
		n, within := c.open[e.Stream]
		if !within {
			c.begun++
			n = c.begun
		}
		if bytes.HasSuffix(line, []byte("\n")) {
			delete(c.open, e.Stream)
		} else {
			c.open[e.Stream] = n
		}
		if n > skip {
			out = append(out, line...)
		}
	}
	return out
}

// Event is one thing that happened to a box.
type Event = state.Event

// Events yields what happened after a time and, with follow, what happens, until ctx ends.
func (r *Runtime) Events(ctx context.Context, since time.Time, follow bool) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		var after int64
		for {
			events, err := r.db.Events(ctx, after)
			for _, e := range events {
				after = e.Seq
				if !e.Time.Before(since) && !yield(e, nil) {
					return
				}
			}
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				yield(Event{}, err)
				return
			}
			if !follow {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}
