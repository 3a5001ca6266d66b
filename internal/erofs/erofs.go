// Package erofs writes EROFS images: read-only root filesystems that need neither root nor a mount to make.
//
// It writes the plain subset that gVisor's reader and the Linux kernel both take: uncompressed, blocks of 4 KiB, extended inodes,
// and the contents of regular files in whole, aligned blocks, since gVisor maps files straight from the image. Only directories
// and symbolic links keep their tails beside their inodes. The bytes depend on nothing but the input, so an image built twice is
// the same file.
//
// File contents are streamed to their place before the tree is known in full: a [Writer] takes data first, in any number of
// extents, and the tree of [Node] values last. Contents that nobody refers to in the end are given back as holes.
//
// [Read] reads the names and attributes of such an image back, so that another can be made to lie over it. The package reads no other
// images, knows nothing of tar or layers, and compresses nothing. It stores no extended attributes: gVisor's reader refuses every
// inode that has any.
package erofs

import (
	"sort"
	"time"
)

// BlockSize is the size of a block; every extent starts at a multiple of it.
const BlockSize = 4096

// Limits of the format, or of those who read it.
const (
	MaxName   = 255  // bytes in one name
	MaxTarget = 4095 // bytes in a symbolic link
)

// File types, as in the upper bits of a Unix mode.
const (
	TypeMask    = 0o170000
	TypeFIFO    = 0o010000
	TypeChar    = 0o020000
	TypeDir     = 0o040000
	TypeBlock   = 0o060000
	TypeRegular = 0o100000
	TypeSymlink = 0o120000
	TypeSocket  = 0o140000
)

// Extent is where the contents of a regular file stand in the image.
type Extent struct {
	Block uint32 // first block; meaningless when Size is 0
	Size  int64  // bytes
}

// Node is one inode. A node that is a child under several names, or of several directories, is a hard link; directories must
// have one name only.
type Node struct {
	Mode     uint16 // type and permissions, set-id and sticky bits included
	UID, GID uint32
	ModTime  time.Time // the zero time is stored as 1970
	Major    uint32    // of a device
	Minor    uint32
	Target   string           // of a symbolic link
	Data     Extent           // of a regular file
	Children map[string]*Node // of a directory
	Tag      uint32           // the caller's own; not stored
	Below    uint32           // the caller's own: which of the images below this one holds it, counted from 1; not stored

	nid    uint64
	ino    uint32 // 0: not placed yet
	nlink  uint32
	block  uint32 // first block of a directory's or long link's own data
	blocks uint32
	dir    *dirLayout
}

// Type returns the type bits of the node's mode.
func (n *Node) Type() uint16 { return n.Mode & TypeMask }

// IsDir says if the node is a directory.
func (n *Node) IsDir() bool { return n.Type() == TypeDir }

// direntType maps a node's type to the one kept in directory entries.
func (n *Node) direntType() uint8 {
	switch n.Type() {
	case TypeRegular:
		return 1
	case TypeDir:
		return 2
	case TypeChar:
		return 3
	case TypeBlock:
		return 4
	case TypeFIFO:
		return 5
	case TypeSocket:
		return 6
	case TypeSymlink:
		return 7
	}
	return 0
}

// sortedNames returns the names in the order in which readers search them: by bytes.
func (n *Node) sortedNames() []string {
	names := make([]string, 0, len(n.Children)+2)
	for name := range n.Children {
		names = append(names, name)
	}
	names = append(names, ".", "..")
	sort.Strings(names)
	return names
}
