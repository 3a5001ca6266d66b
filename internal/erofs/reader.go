package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
)

// ErrDamaged says that a file is no image that a [Writer] of this package has made.
var ErrDamaged = errors.New("damaged image")

// maxMeta bounds the inodes of an image, in bytes, which are held in memory while it is read.
const maxMeta = 4 << 30

// Read reads the tree of an image of size bytes that a [Writer] has made; those of others it need not understand. Contents stay where
// they are: a node's extent says where. Whatever the file holds, the answer is a tree or an error.
func Read(f io.ReaderAt, size int64) (*Node, error) {
	r := &reader{f: f, size: size, nodes: map[uint64]*Node{}}
	root, err := r.open()
	if err != nil {
		return nil, err
	}
	// Breadth first, so that no depth is too much for the stack.
	for dirs := []uint64{root}; len(dirs) > 0; dirs = dirs[1:] {
		if dirs, err = r.fill(dirs[0], dirs); err != nil {
			return nil, err
		}
	}
	return r.nodes[root], nil
}

type reader struct {
	f     io.ReaderAt
	size  int64
	meta  []byte // the inodes, up to the end of the image
	nodes map[uint64]*Node
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrDamaged, fmt.Sprintf(format, args...))
}

// open reads the superblock and the inodes, and returns the root's number.
func (r *reader) open() (root uint64, err error) {
	b := make([]byte, BlockSize)
	if err := r.read(b, 0); err != nil {
		return 0, err
	}
	le := binary.LittleEndian
	s := b[superOffset:]
	want := le.Uint32(s[4:])
	clear(s[4:8])
	if le.Uint32(s) != superMagic || s[12] != 12 || want != ^crc32.Checksum(s, crc32.MakeTable(crc32.Castagnoli)) {
		return 0, damaged("no superblock")
	}
	at := int64(le.Uint32(s[40:])) * BlockSize
	if at > r.size || r.size-at > maxMeta {
		return 0, damaged("inodes at %d", at)
	}
	r.meta = make([]byte, r.size-at)
	if err := r.read(r.meta, at); err != nil {
		return 0, err
	}
	root = uint64(le.Uint16(s[14:]))
	n, err := r.node(root)
	if err == nil && !n.IsDir() {
		err = damaged("the root is no directory")
	}
	return root, err
}

func (r *reader) read(b []byte, at int64) error {
	if _, err := r.f.ReadAt(b, at); errors.Is(err, io.EOF) {
		return damaged("it ends too early")
	} else if err != nil {
		return fmt.Errorf("read image: %w", err)
	}
	return nil
}

// node returns the node with a number. A directory's has no children yet.
func (r *reader) node(nid uint64) (*Node, error) {
	if n := r.nodes[nid]; n != nil {
		return n, nil
	}
	b, err := r.inode(nid)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	n := &Node{
		Mode: le.Uint16(b[4:]), UID: le.Uint32(b[24:]), GID: le.Uint32(b[28:]),
		ModTime: time.Unix(int64(le.Uint64(b[32:])), int64(le.Uint32(b[40:]))),
	}
	size, where := int64(le.Uint64(b[8:])), le.Uint32(b[16:])
	switch n.Type() {
	case TypeRegular:
		if size < 0 || size > r.size || size > 0 && int64(where)*BlockSize > r.size-size {
			return nil, damaged("contents beyond its end")
		}
		if size > 0 {
			n.Data = Extent{Block: where, Size: size}
		}
	case TypeDir:
		n.Children = map[string]*Node{}
	case TypeSymlink:
		if size <= 0 || size > MaxTarget {
			return nil, damaged("a link of %d bytes", size)
		}
		target, err := r.data(nid, b)
		if err != nil {
			return nil, err
		}
		n.Target = string(target)
	case TypeChar, TypeBlock:
		n.Major, n.Minor = where>>8&0xfff, where&0xff|where>>12&^0xff
	case TypeFIFO, TypeSocket:
	default:
		return nil, damaged("inode of type %o", n.Type())
	}
	r.nodes[nid] = n
	return n, nil
}

// inode returns an inode's own bytes.
func (r *reader) inode(nid uint64) ([]byte, error) {
	if nid > uint64(len(r.meta))/slotSize || len(r.meta)-int(nid*slotSize) < inodeSize {
		return nil, damaged("inode %d beyond its end", nid)
	}
	b := r.meta[nid*slotSize:][:inodeSize]
	if format := binary.LittleEndian.Uint16(b); format != formatExtended|layoutPlain && format != formatExtended|layoutInline {
		return nil, damaged("inode %d of format %#x", nid, format)
	}
	return b, nil
}

// data returns what a directory or link stores, of which the tail may stand beside its inode.
func (r *reader) data(nid uint64, inode []byte) ([]byte, error) {
	le := binary.LittleEndian
	size, where := le.Uint64(inode[8:]), int64(le.Uint32(inode[16:]))*BlockSize
	if size > uint64(r.size) {
		return nil, damaged("inode %d has %d bytes", nid, size)
	}
	b := make([]byte, size)
	blocks := b
	if le.Uint16(inode) == formatExtended|layoutInline {
		blocks = b[:size/BlockSize*BlockSize]
		tail := r.meta[nid*slotSize+inodeSize:]
		if len(tail) < len(b)-len(blocks) {
			return nil, damaged("inode %d ends too early", nid)
		}
		copy(b[len(blocks):], tail)
	}
	if len(blocks) == 0 {
		return b, nil
	}
	return b, r.read(blocks, where)
}

// fill reads a directory, and adds those in it to the ones that are still to be read.
func (r *reader) fill(nid uint64, dirs []uint64) ([]uint64, error) {
	inode, err := r.inode(nid)
	if err != nil {
		return nil, err
	}
	b, err := r.data(nid, inode)
	if err != nil {
		return nil, err
	}
	dir := r.nodes[nid]
	for len(b) > 0 {
		block := b[:min(len(b), BlockSize)]
		b = b[len(block):]
		if err := eachEntry(block, func(name string, child uint64) error {
			_, seen := r.nodes[child]
			n, err := r.node(child)
			if err != nil {
				return err
			}
			if n.IsDir() {
				if seen {
					return damaged("directory %q has more than one name", name)
				}
				dirs = append(dirs, child)
			}
			if dir.Children[name] != nil {
				return damaged("%q twice in a directory", name)
			}
			dir.Children[name] = n
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return dirs, nil
}

// eachEntry calls fn for the names in a block of a directory, but for "." and "..".
func eachEntry(block []byte, fn func(name string, nid uint64) error) error {
	le := binary.LittleEndian
	if len(block) < direntSize {
		return damaged("a directory of %d bytes", len(block))
	}
	names := int(le.Uint16(block[8:])) // where the first name begins is where the entries end
	if names < direntSize || names%direntSize != 0 || names > len(block) {
		return damaged("a directory's names at %d", names)
	}
	for i := 0; i < names; i += direntSize {
		begin, end := int(le.Uint16(block[i+8:])), len(block)
		if i+direntSize < names {
			end = int(le.Uint16(block[i+direntSize+8:]))
		}
		if begin < names || begin > end || end > len(block) {
			return damaged("a directory's name at %d", begin)
		}
		// The last name of a whole block may be followed by zeros.
		raw, _, _ := bytes.Cut(block[begin:end], []byte{0})
		name := string(raw)
		if name == "." || name == ".." {
			continue
		}
		if err := checkName(name); err != nil {
			return damaged("%v", err)
		}
		if err := fn(name, le.Uint64(block[i:])); err != nil {
			return err
		}
	}
	return nil
}
