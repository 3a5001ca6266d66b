package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/coffer-box/coffer/internal/erofs"
)

// Limits bound what one image may ask for. Layers come from strangers: a few kilobytes of compressed data can unfold to
// terabytes, or to more files than there is memory for. Zero fields take the defaults.
type Limits struct {
	Bytes   int64 // of unpacked layers, together
	Entries int   // in all layers, together
	Layers  int
	// Metadata bounds the bytes of names, links and attributes, which are held in memory, and of configurations.
	Metadata int64
}

// The defaults are several times what the largest images in common use need.
const (
	defaultBytes    = 128 << 30
	defaultEntries  = 4 << 20
	defaultLayers   = 512
	defaultMetadata = 512 << 20
)

func (l Limits) withDefaults() Limits {
	if l.Bytes <= 0 {
		l.Bytes = defaultBytes
	}
	if l.Entries <= 0 {
		l.Entries = defaultEntries
	}
	if l.Layers <= 0 {
		l.Layers = defaultLayers
	}
	if l.Metadata <= 0 {
		l.Metadata = defaultMetadata
	}
	return l
}

// budget is what may still be held in memory.
type budget struct{ left int64 }

func (b *budget) take(n int) error {
	if b.left -= int64(n); b.left < 0 {
		return fmt.Errorf("names, links, attributes and configurations of too many bytes: %w", ErrTooLarge)
	}
	return nil
}

const (
	maxDepth    = 2048 // directories below each other; a path of 4096 bytes cannot name more
	maxSymlinks = 40   // followed on the way to one entry, as in Linux
	maxXattrs   = 64 << 10

	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// tree merges layers, the lowest first, into one root file system. Only names and attributes are held in memory; file contents
// go straight into the image, and what a later layer hides is given back at the end. A node's tag is the layer that put it there,
// counted from 1.
type tree struct {
	segment
	limits  Limits
	root    *erofs.Node
	layer   uint32
	entries int
	bytes   int64
	meta    budget
	xattrs  map[*erofs.Node][]Xattr

	// Of the present layer: directories that hold nothing of the layers below any more, so that no number of whiteouts makes the
	// work more than once; and its names for files of the layers below, whose tags are those layers'.
	emptied map[*erofs.Node]bool
	linked  map[place]bool
}

// place is a name in a directory.
type place struct {
	dir  *erofs.Node
	name string
}

func newTree(limits Limits) *tree {
	return &tree{limits: limits, meta: budget{limits.Metadata}, root: newDir(0), xattrs: map[*erofs.Node][]Xattr{}}
}

// newDir is a directory that no layer describes: what Docker makes for a parent that is missing from an archive.
func newDir(layer uint32) *erofs.Node {
	return &erofs.Node{Mode: erofs.TypeDir | 0o755, Children: map[string]*erofs.Node{}, Tag: layer}
}

// apply merges one layer, a plain tar stream, and leaves r after the archive's end mark.
func (t *tree) apply(ctx context.Context, r io.Reader) error {
	t.layer++
	t.emptied, t.linked = map[*erofs.Node]bool{}, map[place]bool{}
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if t.entries%1024 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if t.entries++; t.entries > t.limits.Entries {
			return fmt.Errorf("more than %d entries: %w", t.limits.Entries, ErrTooLarge)
		}
		if err := t.add(ctx, hdr, tr); err != nil {
			return fmt.Errorf("entry %s: %w", quoteName(hdr.Name), err)
		}
	}
}

// quoteName makes an archive's name fit for a message: it may hold anything, and be long.
func quoteName(name string) string {
	if len(name) > 200 {
		return fmt.Sprintf("%q…", name[:200])
	}
	return fmt.Sprintf("%q", name)
}

// add merges one entry.
func (t *tree) add(ctx context.Context, hdr *tar.Header, content io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	path, err := splitPath(hdr.Name)
	if err != nil {
		return err
	}
	if len(path) == 0 {
		if hdr.Typeflag != tar.TypeDir {
			return errors.New("the root of the file system can only be a directory")
		}
		return t.setAttrs(t.root, hdr)
	}
	// A clone, here and below, since what a header says is part of one string of up to a MiB that would be kept with it.
	base := strings.Clone(path[len(path)-1])
	if strings.HasPrefix(base, whiteoutPrefix) {
		return t.whiteout(path[:len(path)-1], base)
	}
	n, err := newNode(hdr)
	if err != nil {
		return err
	}
	if err := t.meta.take(len(base) + len(n.Target)); err != nil {
		return err
	}
	dir, err := t.walk(path[:len(path)-1], true)
	if err != nil {
		return err
	}
	old := dir.Children[base]
	switch {
	case hdr.Typeflag == tar.TypeLink:
		if n, err = t.linkTarget(hdr.Linkname); err != nil {
			return err
		}
		t.put(dir, base, n)
		t.again(n)
		if n.Tag != t.layer {
			t.linked[place{dir, base}] = true
		}
		return nil
	case isWhiteout(n):
		// Overlays take such a device for the mark of a deleted file, so that is what it is.
		t.drop(dir, base)
		return nil
	case n.IsDir() && old != nil && old.IsDir():
		// A directory that is there already keeps what it holds and takes the new attributes.
		n = old
	case n.Type() == erofs.TypeRegular:
		if err := t.takeBytes(hdr.Size); err != nil {
			return err
		}
		if n.Data, err = t.w.Append(ctx, content, hdr.Size); err != nil {
			return err
		}
		if hdr.Size > 0 {
			t.files = append(t.files, n)
		}
	}
	if n != old {
		t.put(dir, base, n)
	}
	return t.setAttrs(n, hdr)
}

// takeBytes counts contents that are about to be written.
func (t *tree) takeBytes(n int64) error {
	if n > t.limits.Bytes-t.bytes {
		return fmt.Errorf("contents exceed %d bytes in all: %w", t.limits.Bytes, ErrTooLarge)
	}
	t.bytes += n
	return nil
}

// newNode makes the node that a header describes, without its attributes; for a hard link there is none yet.
func newNode(hdr *tar.Header) (*erofs.Node, error) {
	n := &erofs.Node{}
	switch hdr.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse: // 0 is how archives from before POSIX mark a file
		n.Mode = erofs.TypeRegular
	case tar.TypeDir:
		n.Mode, n.Children = erofs.TypeDir, map[string]*erofs.Node{}
	case tar.TypeSymlink:
		if hdr.Linkname == "" || len(hdr.Linkname) > erofs.MaxTarget || strings.IndexByte(hdr.Linkname, 0) >= 0 {
			return nil, errors.New("symbolic link with an empty or overlong target")
		}
		n.Mode, n.Target = erofs.TypeSymlink, strings.Clone(hdr.Linkname)
	case tar.TypeChar:
		n.Mode = erofs.TypeChar
	case tar.TypeBlock:
		n.Mode = erofs.TypeBlock
	case tar.TypeFifo:
		n.Mode = erofs.TypeFIFO
	case tar.TypeLink:
		return n, nil
	default:
		return nil, fmt.Errorf("unknown type %q of entry", hdr.Typeflag)
	}
	if n.Type() == erofs.TypeChar || n.Type() == erofs.TypeBlock {
		// What Linux has room for: 12 bits of major number, 20 of minor.
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return nil, fmt.Errorf("device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		n.Major, n.Minor = uint32(hdr.Devmajor), uint32(hdr.Devminor)
	}
	return n, nil
}

// setAttrs copies owner, permissions, time and extended attributes.
func (t *tree) setAttrs(n *erofs.Node, hdr *tar.Header) error {
	// The highest number means "no id" to the system calls that take one.
	if hdr.Uid < 0 || int64(hdr.Uid) >= math.MaxUint32 || hdr.Gid < 0 || int64(hdr.Gid) >= math.MaxUint32 {
		return fmt.Errorf("owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	n.Mode = n.Type() | uint16(hdr.Mode&0o7777)
	if n.Type() == erofs.TypeSymlink {
		n.Mode = erofs.TypeSymlink | 0o777
	}
	n.UID, n.GID = uint32(hdr.Uid), uint32(hdr.Gid)
	n.ModTime = hdr.ModTime
	n.Tag = t.layer
	xs, err := tarXattrs(hdr)
	if err != nil {
		return err
	}
	return t.setXattrs(n, xs)
}

func (t *tree) setXattrs(n *erofs.Node, xs []Xattr) error {
	delete(t.xattrs, n)
	for _, x := range xs {
		if err := t.meta.take(xattrCost + len(x.Name) + len(x.Value)); err != nil {
			return err
		}
	}
	if len(xs) > 0 {
		t.xattrs[n] = xs
	}
	return nil
}

// xattrCost is what an attribute takes beside its name and value.
const xattrCost = 64

// labelXattr is a label of its host's policy, and means nothing elsewhere.
const labelXattr = "security.selinux"

// tarXattrs reads the extended attributes of a header. Those of overlay file systems are left out: they would not describe this
// file but change what the box's own overlay makes of it.
func tarXattrs(hdr *tar.Header) ([]Xattr, error) {
	const pax = "SCHILY.xattr."
	var xs []Xattr
	size := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, pax)
		if !ok || name == labelXattr || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		if name == "" || len(name) > 255 {
			return nil, fmt.Errorf("extended attribute with a name of %d bytes", len(name))
		}
		if size += len(name) + len(value); size > maxXattrs {
			return nil, fmt.Errorf("more than %d bytes of extended attributes: %w", maxXattrs, ErrTooLarge)
		}
		xs = append(xs, Xattr{Name: strings.Clone(name), Value: []byte(value)})
	}
	slices.SortFunc(xs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return xs, nil
}

// splitPath cuts an entry's name into components as seen from the root. Names may be absolute or relative and contain dots, but
// may not climb out.
func splitPath(name string) ([]string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return nil, errors.New("name holds a zero byte")
	}
	var path []string
	for c := range strings.SplitSeq(name, "/") {
		switch {
		case c == "" || c == ".":
		case c == "..":
			if len(path) == 0 {
				return nil, errors.New("name leads out of the root")
			}
			path = path[:len(path)-1]
		case len(c) > erofs.MaxName:
			return nil, fmt.Errorf("name has a part of %d bytes, %d are allowed", len(c), erofs.MaxName)
		default:
			path = append(path, c)
		}
	}
	if len(path) > maxDepth {
		return nil, fmt.Errorf("more than %d directories deep: %w", maxDepth, ErrTooLarge)
	}
	return path, nil
}

// walk finds the directory at path. Symbolic links on the way are followed inside the tree, where ".." ends at the root, since
// some builders write archives that rely on it. With create, what is missing is made and what is no directory gives way to one;
// without, the result is nil when there is no such directory.
func (t *tree) walk(path []string, create bool) (*erofs.Node, error) {
	stack := make([]*erofs.Node, 1, len(path)+1)
	stack[0] = t.root
	links := 0
	for len(path) > 0 {
		name := path[0]
		path = path[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		dir := stack[len(stack)-1]
		n := dir.Children[name]
		if n != nil && n.Type() == erofs.TypeSymlink {
			if links++; links > maxSymlinks {
				return nil, errors.New("too many symbolic links on the way to it")
			}
			if strings.HasPrefix(n.Target, "/") {
				stack = stack[:1]
			}
			path = append(strings.Split(n.Target, "/"), path...)
			continue
		}
		if n == nil || !n.IsDir() {
			if !create {
				return nil, nil
			}
			if len(name) > erofs.MaxName {
				return nil, fmt.Errorf("a symbolic link on the way to it has a part of %d bytes", len(name))
			}
			if t.entries++; t.entries > t.limits.Entries {
				return nil, fmt.Errorf("more than %d entries: %w", t.limits.Entries, ErrTooLarge)
			}
			if err := t.meta.take(len(name)); err != nil {
				return nil, err
			}
			n = newDir(t.layer)
			n.ModTime = time.Time{}
			t.put(dir, strings.Clone(name), n)
		}
		if len(stack) > maxDepth {
			return nil, fmt.Errorf("more than %d directories deep: %w", maxDepth, ErrTooLarge)
		}
		stack = append(stack, n)
	}
	return stack[len(stack)-1], nil
}

// linkTarget finds what a hard link points to: something that an earlier entry or layer put into the tree, and nothing else.
func (t *tree) linkTarget(name string) (*erofs.Node, error) {
	path, err := splitPath(name)
	if err != nil {
		return nil, fmt.Errorf("hard link to %s: %w", quoteName(name), err)
	}
	if len(path) > 0 {
		dir, err := t.walk(path[:len(path)-1], false)
		if err != nil {
			return nil, fmt.Errorf("hard link to %s: %w", quoteName(name), err)
		}
		if dir != nil {
			if n := dir.Children[path[len(path)-1]]; n != nil && !n.IsDir() {
				return n, nil
			}
		}
	}
	return nil, fmt.Errorf("hard link to %s, which is no file of this image", quoteName(name))
}

// whiteout hides something of the layers below.
func (t *tree) whiteout(dirPath []string, base string) error {
	if base != whiteoutOpaque && strings.HasPrefix(base, whiteoutMeta) {
		return nil // what the aufs of old left in its layers; means nothing
	}
	dir, err := t.walk(dirPath, false)
	if err != nil {
		return err
	}
	if base == whiteoutOpaque {
		if dir != nil {
			t.hideChildren(dir)
		}
		return nil
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return errors.New("whiteout of nothing")
	}
	if dir != nil {
		t.hide(dir, name)
	}
	return nil
}

// hide removes a name unless this very layer put it there. Whiteouts speak of the layers below wherever they stand in the
// archive, so a directory that holds anything of this layer stays, without the rest.
func (t *tree) hide(dir *erofs.Node, name string) {
	n := dir.Children[name]
	if n == nil {
		return
	}
	if n.IsDir() {
		t.hideChildren(n)
	}
	if n.Tag != t.layer && len(n.Children) == 0 && !t.linked[place{dir, name}] {
		t.drop(dir, name)
	}
}

// hideChildren empties a directory of what the layers below put there. Depth is bounded by walk.
func (t *tree) hideChildren(dir *erofs.Node) {
	if t.emptied[dir] {
		return
	}
	t.emptied[dir] = true
	for name := range dir.Children {
		t.hide(dir, name)
	}
}

// eachExtra tells what gVisor does not read of the tree, in the order of a walk.
func (t *tree) eachExtra(fn func(Extra) error) error {
	defer func(left int64) { t.meta.left = left }(t.meta.left)
	return t.extras(t.root, nil, map[*erofs.Node]bool{}, fn)
}

// extras is eachExtra below one node. The path is one buffer for all of it: below a long one, a path for each file would be more than
// memory holds.
func (t *tree) extras(n *erofs.Node, path []byte, told map[*erofs.Node]bool, fn func(Extra) error) error {
	x := Extra{}
	if !told[n] {
		// An attribute is set on one name of a file only: the others are the same file.
		if x.Xattrs = t.xattrs[n]; len(x.Xattrs) > 0 {
			told[n] = true
		}
	}
	if typ := n.Type(); typ == erofs.TypeChar || typ == erofs.TypeBlock {
		x.Device = &Device{Mode: uint32(n.Mode), UID: n.UID, GID: n.GID, Major: n.Major, Minor: n.Minor}
		if !n.ModTime.IsZero() {
			x.Device.Sec, x.Device.Nsec = n.ModTime.Unix(), int64(n.ModTime.Nanosecond())
		}
	}
	if len(x.Xattrs) > 0 || x.Device != nil {
		x.Path = path
		if len(path) == 0 {
			x.Path = []byte("/")
		}
		if err := t.meta.take(len(x.Path)); err != nil {
			return err
		}
		if err := fn(x); err != nil {
			return err
		}
	}
	for _, name := range sortedKeys(n.Children) {
		if err := t.extras(n.Children[name], append(append(path, '/'), name...), told, fn); err != nil {
			return err
		}
	}
	return nil
}
