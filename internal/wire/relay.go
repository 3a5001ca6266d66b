package wire

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

const copyBuffer = 64 << 10

// bufferPool lends the buffers of bulk copies.
//
//nolint:gochecknoglobals // a pool is of use only when all share it
var bufferPool = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// plain hides everything of a reader or writer but its one method, so that io.CopyBuffer uses the buffer it is given.
type plainWriter struct{ io.Writer }
type plainReader struct{ io.Reader }

// Copy copies like io.Copy, with a buffer that is lent and not made. It says which of the two sides failed.
func Copy(dst io.Writer, src io.Reader) (n int64, werr, rerr error) {
	buf := bufferPool.Get().(*[]byte)
	defer bufferPool.Put(buf)
	rec := &errReader{r: src}
	n, err := io.CopyBuffer(plainWriter{dst}, plainReader{rec}, *buf)
	if err == nil {
		return n, nil, nil
	}
	if rec.err != nil && errors.Is(err, rec.err) {
		return n, nil, err
	}
	return n, err, nil
}

type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil && err != io.EOF {
		e.err = err
	}
	return n, err
}

// Relay splices two streams, both ways, until both directions have ended; then it closes them. The end of one direction is
// passed on as the end of that direction. When one side can no longer be written to, its other half is told, and what still
// comes is thrown away. The end of ctx ends both streams.
func Relay(ctx context.Context, a, b *Stream) error {
	stop := context.AfterFunc(ctx, func() {
		past := time.Unix(1, 0)
		for _, s := range []*Stream{a, b} {
			s.CloseWrite()
			s.SetReadDeadline(past)
			s.SetWriteDeadline(past)
		}
	})
	defer stop()
	var wg sync.WaitGroup
	half := func(dst, src *Stream) {
		_, werr, rerr := Copy(dst, src)
		if werr != nil && rerr == nil {
			src.CloseWrite()
			if ctx.Err() == nil {
				io.Copy(io.Discard, src)
			}
		}
		dst.CloseWrite()
	}
	wg.Go(func() { half(a, b) })
	half(b, a)
	wg.Wait()
	a.Close()
	b.Close()
	return ctx.Err()
}
