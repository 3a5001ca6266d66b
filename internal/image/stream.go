package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Sizes of what a layer is read ahead by while the previous part is merged and written.
const (
	aheadChunk  = 256 << 10
	aheadChunks = 8
)

// readAhead reads from another stream in a goroutine of its own, so that decompressing and building use two processors, and so that
// who reads from it need not wait for that stream when its context has ended.
type readAhead struct {
	ctx        context.Context
	full, free chan chunk
	stop       chan struct{}
	stopped    chan struct{}
	once       sync.Once
	cur        chunk
	off        int
}

type chunk struct {
	buf []byte
	n   int
	err error
}

func newReadAhead(ctx context.Context, r io.Reader) *readAhead {
	a := &readAhead{
		ctx:     ctx,
		full:    make(chan chunk, aheadChunks),
		free:    make(chan chunk, aheadChunks),
		stop:    make(chan struct{}),
		stopped: make(chan struct{}),
	}
	for range aheadChunks {
		a.free <- chunk{}
	}
	go func() {
		defer close(a.stopped)
		for {
			var c chunk
			select {
			case c = <-a.free:
			case <-a.stop:
				return
			}
			if c.buf == nil {
				c.buf = make([]byte, aheadChunk)
			}
			c.n, c.err = io.ReadFull(r, c.buf)
			if errors.Is(c.err, io.ErrUnexpectedEOF) && c.n > 0 {
				// ReadFull says so of a short last chunk; a stream that really was cut off says it again, with nothing read.
				c.err = nil
			}
			a.full <- c // never blocks: there are no more chunks than room
			if c.err != nil {
				return
			}
		}
	}()
	return a
}

func (a *readAhead) Read(p []byte) (int, error) {
	for a.off == a.cur.n {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.buf != nil {
			a.free <- a.cur
		}
		select {
		case a.cur = <-a.full:
		case <-a.stop:
			return 0, io.ErrClosedPipe
		case <-a.ctx.Done():
			return 0, a.ctx.Err()
		}
		a.off = 0
	}
	n := copy(p, a.cur.buf[a.off:a.cur.n])
	a.off += n
	return n, nil
}

// close ends the goroutine and waits for it; its last read must come to an end, as reads of files do.
func (a *readAhead) close() {
	a.once.Do(func() { close(a.stop) })
	<-a.stopped
}

// leave is close for a stream that may stall: when the context has ended, the last read is left behind.
func (a *readAhead) leave() {
	a.once.Do(func() { close(a.stop) })
	select {
	case <-a.stopped:
	case <-a.ctx.Done():
	}
}

// countingReader counts and bounds what is read.
type countingReader struct {
	r    io.Reader
	n    int64
	left int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if c.left -= int64(n); c.left < 0 {
		return 0, fmt.Errorf("it unfolds to more than the limit: %w", ErrTooLarge)
	}
	return n, err
}

// drain reads to the end.
func drain(ctx context.Context, r io.Reader) error {
	buf := make([]byte, 64<<10)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := r.Read(buf); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}
