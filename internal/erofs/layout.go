package erofs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"strings"
)

const (
	inodeSize  = 64
	slotSize   = 32 // inodes are counted in these
	direntSize = 12

	formatExtended = 1
	layoutPlain    = 0 << 1
	layoutInline   = 2 << 1

	superMagic  = 0xe0f5e1e2
	superOffset = 1024

	compatChecksum = 1
	compatMtime    = 2
)

// placed is where everything goes.
type placed struct {
	nodes    []*Node // every inode once, the root first, in the order of their numbers
	dirStart int64   // file offset of directory blocks and long links
	meta     int64   // file offset of the inodes
}

// dirLayout is a directory's names in order and how they are cut into blocks.
type dirLayout struct {
	names  []string
	cuts   []int // cuts[i] is the first name of block i
	tail   int   // bytes used in the last block
	parent *Node
}

// layout numbers the inodes and decides where each stands.
func (w *Writer) layout(ctx context.Context, root *Node) (*placed, error) {
	w.pad()
	l := &placed{dirStart: w.off + int64(len(w.buf))}
	next := l.dirStart / BlockSize // next free block

	visit := func(n *Node) { n.ino = uint32(len(l.nodes) + 1); l.nodes = append(l.nodes, n) }
	root.nlink = 0
	visit(root)
	root.dir = &dirLayout{parent: root}
	for i := 0; i < len(l.nodes); i++ {
		n := l.nodes[i]
		if i&0xfff == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if n.IsDir() {
			n.dir.fill(n)
			n.nlink += 2 // its own "." and the name in its parent; the root is its own parent
			for _, name := range n.dir.names {
				if name == "." || name == ".." {
					continue
				}
				if err := checkName(name); err != nil {
					return nil, err
				}
				c := n.Children[name]
				switch {
				case c.IsDir() && c.ino != 0:
					return nil, fmt.Errorf("directory %q has more than one name", name)
				case c.IsDir():
					c.dir = &dirLayout{parent: n}
					n.nlink++
				case c.ino != 0:
					c.nlink++
					continue
				default:
					c.nlink = 1
				}
				if len(l.nodes) == math.MaxUint32-1 {
					return nil, errors.New("too many inodes")
				}
				visit(c)
			}
		}
	}

	// The first slots stay empty: number 0 would be an inode number that some programs take for "deleted".
	off := int64(2 * slotSize)
	for _, n := range l.nodes {
		size, tail := n.ownData()
		need := int64(inodeSize)
		whole := size / BlockSize
		if tail > 0 {
			if need+int64(tail) <= BlockSize {
				need += int64(tail)
			} else {
				whole++
			}
		}
		if whole > 0 {
			n.block, n.blocks = uint32(next), uint32(whole)
			next += whole
			if next > math.MaxUint32 {
				return nil, errors.New("image too large")
			}
		}
		// An inode and what follows it stay in one block, which readers may rely on for inline data.
		if in := off % BlockSize; in+need > BlockSize && in != 0 {
			off += BlockSize - in
		}
		n.nid = uint64(off / slotSize)
		off += (need + slotSize - 1) / slotSize * slotSize
	}
	l.meta = next * BlockSize
	if l.meta+off > maxImage {
		return nil, errors.New("image too large")
	}
	return l, nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%q cannot be a file's name", name)
	}
	return nil
}

// ownData returns the size of what a directory or symbolic link stores, and how much of it is in the last, partial block.
func (n *Node) ownData() (size int64, tail int) {
	switch n.Type() {
	case TypeDir:
		size = int64(len(n.dir.cuts)-1)*BlockSize + int64(n.dir.tail)
	case TypeSymlink:
		size = int64(len(n.Target))
	}
	return size, int(size % BlockSize)
}

// fill sorts a directory's names and cuts them into blocks.
func (d *dirLayout) fill(n *Node) {
	d.names = n.sortedNames()
	d.cuts, d.tail = []int{0}, 0
	for i, name := range d.names {
		need := direntSize + len(name)
		if d.tail+need > BlockSize {
			d.cuts, d.tail = append(d.cuts, i), 0
		}
		d.tail += need
	}
}

// block encodes one block of a directory: entries first, names after them.
func (d *dirLayout) block(n *Node, i int, dst []byte) []byte {
	names := d.names[d.cuts[i]:]
	if i+1 < len(d.cuts) {
		names = d.names[d.cuts[i]:d.cuts[i+1]]
	}
	nameOff := len(names) * direntSize
	for _, name := range names {
		c := n.Children[name]
		switch name {
		case ".":
			c = n
		case "..":
			c = d.parent
		}
		dst = binary.LittleEndian.AppendUint64(dst, c.nid)
		dst = binary.LittleEndian.AppendUint16(dst, uint16(nameOff))
		dst = append(dst, c.direntType(), 0)
		nameOff += len(name)
	}
	for _, name := range names {
		dst = append(dst, name...)
	}
	return dst
}

// writeDirs writes what does not stand beside its inode, in the order of the inodes.
func (w *Writer) writeDirs(ctx context.Context, l *placed) error {
	var b []byte
	for i, n := range l.nodes {
		if i&0xfff == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		for k := range int(n.blocks) {
			b = b[:0]
			if n.IsDir() {
				b = n.dir.block(n, k, b)
			} else {
				b = append(b, n.Target...)
			}
			if err := w.write(b); err != nil {
				return err
			}
			w.pad()
		}
	}
	return nil
}

// writeInodes writes the inodes and what follows each.
func (w *Writer) writeInodes(ctx context.Context, l *placed) error {
	var b []byte
	pos := int64(0)
	for i, n := range l.nodes {
		if i&0xfff == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		at := int64(n.nid) * slotSize
		if err := w.write(zeros[:at-pos]); err != nil {
			return err
		}
		b = n.inode(b[:0])
		if err := w.write(b); err != nil {
			return err
		}
		pos = at + int64(len(b))
	}
	return nil
}

// inode encodes one inode and its inline data.
func (n *Node) inode(b []byte) []byte {
	le := binary.LittleEndian
	size, tail := n.ownData()
	where, layout := n.block, uint16(layoutPlain)
	switch n.Type() {
	case TypeRegular:
		size, where = n.Data.Size, n.Data.Block
	case TypeChar, TypeBlock:
		where = n.Minor&0xff | n.Major<<8 | n.Minor&^0xff<<12
	case TypeDir, TypeSymlink:
		if tail > 0 && int64(n.blocks) == size/BlockSize {
			layout = layoutInline
		}
	}
	sec, nsec := n.ModTime.Unix(), n.ModTime.Nanosecond()
	if n.ModTime.IsZero() {
		sec, nsec = 0, 0
	}
	b = le.AppendUint16(b, formatExtended|layout)
	b = le.AppendUint16(b, 0) // no attributes
	b = le.AppendUint16(b, n.Mode)
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, uint64(size))
	b = le.AppendUint32(b, where)
	b = le.AppendUint32(b, n.ino)
	b = le.AppendUint32(b, n.UID)
	b = le.AppendUint32(b, n.GID)
	b = le.AppendUint64(b, uint64(sec)) // Linux and gVisor read it as signed
	b = le.AppendUint32(b, uint32(nsec))
	b = le.AppendUint32(b, n.nlink)
	b = append(b, zeros[:16]...)
	if layout == layoutInline {
		if n.IsDir() {
			b = n.dir.block(n, len(n.dir.cuts)-1, b)
		} else {
			b = append(b, n.Target[size-int64(tail):]...)
		}
	}
	return b
}

// superblock encodes block 0.
func (w *Writer) superblock(l *placed, uuid [16]byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, BlockSize)
	s := b[superOffset:]
	le.PutUint32(s[0:], superMagic)
	le.PutUint32(s[8:], compatChecksum|compatMtime)
	s[12] = 12 // block size in bits
	le.PutUint16(s[14:], uint16(l.nodes[0].nid))
	le.PutUint64(s[16:], uint64(len(l.nodes)))
	le.PutUint32(s[36:], uint32(w.off/BlockSize))
	le.PutUint32(s[40:], uint32(l.meta/BlockSize))
	copy(s[48:], uuid[:])
	// The checksum covers the rest of the block and is stored without the final inversion that Go's crc32 applies.
	le.PutUint32(s[4:], ^crc32.Checksum(s, crc32.MakeTable(crc32.Castagnoli)))
	return b
}
