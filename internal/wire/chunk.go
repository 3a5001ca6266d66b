package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// maxChunk bounds one chunk of a chunked body.
const maxChunk = 1 << 20

// ChunkWriter frames a body of unknown length, so that its end differs from an abort: [ChunkWriter.Finish] marks it, with an
// error for the reader or without.
type ChunkWriter struct {
	w   io.Writer
	buf []byte
}

// NewChunkWriter writes chunks to w.
func NewChunkWriter(w io.Writer) *ChunkWriter { return &ChunkWriter{w: w} }

func (c *ChunkWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n := min(len(p)-done, copyBuffer)
		c.buf = binary.BigEndian.AppendUint32(c.buf[:0], uint32(n))
		c.buf = append(c.buf, p[done:done+n]...)
		if _, err := c.w.Write(c.buf); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// Finish ends the body.
func (c *ChunkWriter) Finish(err error) error {
	if _, werr := c.w.Write(make([]byte, 4)); werr != nil {
		return werr
	}
	return WriteMsg(c.w, reply{Error: asError(err)}, MaxMessage)
}

// ChunkReader reads what a ChunkWriter wrote. It returns io.EOF only after the mark of the end, and the writer's error where
// there was one.
type ChunkReader struct {
	r    io.Reader
	left uint32
	end  error
}

// NewChunkReader reads chunks from r.
func NewChunkReader(r io.Reader) *ChunkReader { return &ChunkReader{r: r} }

func (c *ChunkReader) Read(p []byte) (int, error) {
	if c.end != nil {
		return 0, c.end
	}
	if len(p) == 0 {
		return 0, nil
	}
	if c.left == 0 {
		if c.end = c.next(); c.end != nil {
			return 0, c.end
		}
	}
	n, err := c.r.Read(p[:min(uint64(len(p)), uint64(c.left))])
	c.left -= uint32(n)
	if err != nil {
		c.end = cut(err)
		return n, c.end
	}
	return n, nil
}

func (c *ChunkReader) next() error {
	var n [4]byte
	if _, err := io.ReadFull(c.r, n[:]); err != nil {
		return cut(err)
	}
	c.left = binary.BigEndian.Uint32(n[:])
	if c.left > maxChunk {
		return fmt.Errorf("read chunk of %d bytes: %w", c.left, ErrTooLarge)
	}
	if c.left > 0 {
		return nil
	}
	var r reply
	if err := ReadMsg(c.r, &r, MaxMessage); err != nil {
		return cut(err)
	}
	if r.Error != nil {
		return r.Error
	}
	return io.EOF
}

// cut turns an end where none belongs into an error.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
