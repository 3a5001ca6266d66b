package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
)

// bufferSize is how much file data is gathered before it is written. A multiple of BlockSize.
const bufferSize = 1 << 20

// Writer makes one image in a file that is empty when it begins. Not safe for concurrent use.
type Writer struct {
	f *os.File

	buf  []byte // data not yet written
	off  int64  // where buf begins in the file; always on a block boundary
	dead []Extent
	err  error // first failure; the image is of no use after it
}

// NewWriter starts an image in f, which must be empty. The caller keeps f: it syncs and closes it after [Writer.Finish].
func NewWriter(f *os.File) *Writer {
	// Block 0 is the superblock's and is written last, so that a file which was cut short is no image.
	return &Writer{f: f, buf: make([]byte, 0, bufferSize), off: BlockSize}
}

// Append copies exactly size bytes of r into the image.
func (w *Writer) Append(ctx context.Context, r io.Reader, size int64) (Extent, error) {
	if w.err != nil {
		return Extent{}, w.err
	}
	if size == 0 {
		return Extent{}, nil
	}
	start := w.off + int64(len(w.buf))
	if size < 0 || size > maxImage-start-bufferSize {
		return Extent{}, fmt.Errorf("contents of %d bytes do not fit into an image", size)
	}
	for left := size; left > 0; {
		if len(w.buf) == cap(w.buf) {
			if err := ctx.Err(); err != nil {
				return Extent{}, err
			}
			if err := w.flush(); err != nil {
				return Extent{}, err
			}
		}
		n := int(min(left, int64(cap(w.buf)-len(w.buf))))
		dst := w.buf[len(w.buf) : len(w.buf)+n]
		if _, err := io.ReadFull(r, dst); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			// What was taken so far stays behind as data of no file; the writer goes on from a block boundary.
			w.err = fmt.Errorf("read contents: %w", err)
			return Extent{}, w.err
		}
		w.buf = w.buf[:len(w.buf)+n]
		left -= int64(n)
	}
	w.pad()
	return Extent{Block: uint32(start / BlockSize), Size: size}, nil
}

// Discard says that no file refers to an extent any more. Its space goes back to the host when the image is finished.
func (w *Writer) Discard(e Extent) {
	if e.Size > 0 {
		w.dead = append(w.dead, e)
	}
}

// maxImage is what 32 bits of block numbers reach.
const maxImage = int64(math.MaxUint32) * BlockSize

// zeros is what a block without data looks like.
//
//nolint:gochecknoglobals // never written to
var zeros [BlockSize]byte

// pad fills the last block with zeros: what lies behind a file's end in its last page is visible to whoever maps it.
func (w *Writer) pad() {
	if r := len(w.buf) % BlockSize; r != 0 {
		w.buf = append(w.buf, zeros[:BlockSize-r]...)
	}
}

// flush writes the buffer, which must be whole blocks, and leaves holes where blocks are zero.
func (w *Writer) flush() error {
	if w.err != nil {
		return w.err
	}
	for i := 0; i < len(w.buf); {
		if bytes.Equal(w.buf[i:i+BlockSize], zeros[:]) {
			i += BlockSize
			continue
		}
		j := i + BlockSize
		for j < len(w.buf) && !bytes.Equal(w.buf[j:j+BlockSize], zeros[:]) {
			j += BlockSize
		}
		if _, err := w.f.WriteAt(w.buf[i:j], w.off+int64(i)); err != nil {
			w.err = fmt.Errorf("write image: %w", err)
			return w.err
		}
		i = j
	}
	w.off += int64(len(w.buf))
	w.buf = w.buf[:0]
	return nil
}

// write appends metadata through the same buffer.
func (w *Writer) write(p []byte) error {
	for len(p) > 0 {
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
		n := min(len(p), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, p[:n]...)
		p = p[n:]
	}
	return w.err
}

// Finish writes the tree under root and the superblock. The uuid names the file system to those who mount it. The file is not
// synced.
func (w *Writer) Finish(ctx context.Context, root *Node, uuid [16]byte) error {
	if w.err != nil {
		return w.err
	}
	if root == nil || !root.IsDir() {
		return errors.New("the root of an image must be a directory")
	}
	l, err := w.layout(ctx, root)
	if err != nil {
		return err
	}
	if err := w.writeDirs(ctx, l); err != nil {
		return err
	}
	if err := w.writeInodes(ctx, l); err != nil {
		return err
	}
	w.pad()
	if err := w.flush(); err != nil {
		return err
	}
	if err := w.f.Truncate(w.off); err != nil {
		return fmt.Errorf("size image: %w", err)
	}
	w.punch()
	if _, err := w.f.WriteAt(w.superblock(l, uuid), 0); err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	// Another image may hold some of these nodes, too.
	for _, n := range l.nodes {
		n.nid, n.ino, n.nlink, n.block, n.blocks, n.dir = 0, 0, 0, 0, 0, nil
	}
	return nil
}

// Used returns how many bytes of the image something refers to; after [Writer.Finish], its size without the discarded extents.
func (w *Writer) Used() int64 {
	used := w.off + int64(len(w.buf))
	for _, e := range w.dead {
		used -= roundUp(e.Size)
	}
	return used
}

func roundUp(n int64) int64 { return (n + BlockSize - 1) / BlockSize * BlockSize }

// punch turns discarded extents into holes, so that data which a later layer replaced costs nothing and reads the same
// whatever host the image was built on. File systems without holes get zeros written instead.
func (w *Writer) punch() {
	for _, e := range w.dead {
		off, size := int64(e.Block)*BlockSize, roundUp(e.Size)
		if punchHole(w.f, off, size) == nil {
			continue
		}
		for ; size > 0; size -= BlockSize {
			// A failure to write is no failure of the image: nothing refers to these blocks.
			if _, err := w.f.WriteAt(zeros[:], off); err != nil {
				return
			}
			off += BlockSize
		}
	}
}
