package image

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/coffer-box/coffer/internal/erofs"
)

// A root file system is a stack of segments, each an EROFS file that holds what one or more layers in a row change of what lies below
// it, and mounted one over the other. Where one segment ends and the next begins depends on the layers up to there alone, so images that begin with
// the same layers share the files. What is deleted stands as a character device without a number, as overlay file systems have it; a
// directory that hides all that was in it has one for every name, since gVisor reads no attribute that could say it.
const (
	// segmentSize is how many bytes of contents end a segment with the layer that brings them. Below it, sharing is not worth another
	// file system for every box to mount.
	segmentSize = 16 << 20
	// maxSegments bounds the stack; the last one takes all further layers.
	maxSegments = 16
)

// segment is the one that a tree's layers go into at present. The zero value has nothing below it, and nothing to write to.
type segment struct {
	w     *erofs.Writer
	first uint32        // layer that it begins with
	files []*erofs.Node // every node that ever had contents in it
	below []io.ReaderAt // the segments below it, the lowest first

	// hidden is what the segments below have at names that stand for something else now, or for nothing.
	hidden map[*erofs.Node]map[string]*erofs.Node
	// restored are files of the segments below that this one must hold, too, since the number of their names changed; true: without
	// their contents so far.
	restored map[*erofs.Node]bool
	// white is the mark of what is deleted, one file with as many names as it takes.
	white *erofs.Node
}

// begin starts a segment over those that are there.
func (t *tree) begin(w *erofs.Writer) {
	t.segment = segment{
		w: w, first: t.layer + 1, below: t.below, white: &erofs.Node{Mode: erofs.TypeChar},
		hidden: map[*erofs.Node]map[string]*erofs.Node{}, restored: map[*erofs.Node]bool{},
	}
}

// put gives a name to a node, in place of what had it.
func (t *tree) put(dir *erofs.Node, name string, n *erofs.Node) {
	t.leave(dir, name)
	dir.Children[name] = n
}

// drop takes a name from what has it.
func (t *tree) drop(dir *erofs.Node, name string) {
	t.leave(dir, name)
	delete(dir.Children, name)
}

// leave notes that a name is about to lose what has it.
func (t *tree) leave(dir *erofs.Node, name string) {
	old := dir.Children[name]
	if old == nil || old.Below == 0 {
		return
	}
	if t.hidden[dir] == nil {
		t.hidden[dir] = map[string]*erofs.Node{}
	}
	if _, ok := t.hidden[dir][name]; !ok {
		t.hidden[dir][name] = old
	}
	t.again(old)
}

// again notes that a node of the segments below, or every file in it, has lost or won a name.
func (t *tree) again(n *erofs.Node) {
	if n.Below == 0 {
		return
	}
	if !n.IsDir() {
		t.restored[n] = true
		return
	}
	for _, c := range n.Children {
		t.again(c)
	}
}

// under returns what the segments below have at a name of a directory of theirs.
func (t *tree) under(low *erofs.Node, name string) *erofs.Node {
	if low == nil {
		return nil
	}
	if n, ok := t.hidden[low][name]; ok {
		return n
	}
	if n := low.Children[name]; n != nil && n.Below != 0 {
		return n
	}
	return nil
}

// end returns the segment's own tree, for the writer to finish with. The next may begin then.
func (t *tree) end(ctx context.Context) (*erofs.Node, error) {
	var low *erofs.Node
	if len(t.below) > 0 {
		low = t.root
	}
	root, err := t.changes(ctx, t.root, low)
	if err != nil {
		return nil, err
	}
	if root == nil {
		root = bare(t.root)
	}
	t.settle(t.root, uint32(len(t.below))+1)
	for _, n := range t.files {
		if n.Below == 0 {
			t.w.Discard(n.Data)
		}
	}
	t.files = nil
	return root, nil
}

// bare is a directory without its children.
func bare(n *erofs.Node) *erofs.Node {
	return &erofs.Node{Mode: n.Mode, UID: n.UID, GID: n.GID, ModTime: n.ModTime, Children: map[string]*erofs.Node{}}
}

// changes returns what this segment must hold of a directory when low is the directory that those below have in its place, or nil where
// they have none. The result is nil when that is nothing. Depth is bounded by walk.
func (t *tree) changes(ctx context.Context, n, low *erofs.Node) (*erofs.Node, error) {
	out := bare(n)
	names := slices.AppendSeq(make([]string, 0, len(n.Children)), maps.Keys(n.Children))
	if len(t.restored) > 0 {
		slices.Sort(names) // the order in which contents are written
	}
	for _, name := range names {
		c := n.Children[name]
		empty, again := t.restored[c]
		switch {
		case c.IsDir():
			under := t.under(low, name)
			if under != nil && !under.IsDir() {
				under = nil // nothing shines through
			}
			sub, err := t.changes(ctx, c, under)
			if err != nil {
				return nil, err
			}
			if sub != nil {
				out.Children[name] = sub
			}
			continue
		case c.Below == 0:
		case !again:
			continue
		case empty && c.Data.Size > 0:
			// A large file could win a name in every segment.
			if err := t.takeBytes(c.Data.Size); err != nil {
				return nil, err
			}
			old := io.NewSectionReader(t.below[c.Below-1], int64(c.Data.Block)*erofs.BlockSize, c.Data.Size)
			var err error
			if c.Data, err = t.w.Append(ctx, old, c.Data.Size); err != nil {
				return nil, err
			}
			t.restored[c] = false
		}
		out.Children[name] = c
	}
	t.eachUnder(low, func(name string) {
		if n.Children[name] == nil {
			out.Children[name] = t.white
		}
	})
	if n == low && n.Tag < t.first && len(out.Children) == 0 {
		return nil, nil
	}
	return out, nil
}

// eachUnder calls fn for the names that the segments below have in a directory of theirs.
func (t *tree) eachUnder(low *erofs.Node, fn func(name string)) {
	if low == nil {
		return
	}
	for name, n := range low.Children {
		if n.Below != 0 {
			fn(name)
		}
	}
	for name := range t.hidden[low] {
		fn(name)
	}
}

func isWhiteout(n *erofs.Node) bool {
	return n.Type() == erofs.TypeChar && n.Major == 0 && n.Minor == 0
}

// settle notes of everything that is in the tree which segment holds it now.
func (t *tree) settle(n *erofs.Node, segment uint32) {
	if _, again := t.restored[n]; again || n.Below == 0 {
		n.Below = segment
	}
	for _, c := range n.Children {
		t.settle(c, segment)
	}
}

// resume puts the next segment, as it was read from its file, over those of a tree that no layer has been applied to. layers is how many
// they hold together.
func (t *tree) resume(seg *erofs.Node, f io.ReaderAt, layers int) error {
	t.below = append(t.below, f)
	t.layer = uint32(layers)
	return t.lay(t.root, seg)
}

// lay merges a directory of a segment into the one of the tree that it lies over.
func (t *tree) lay(n, seg *erofs.Node) error {
	n.Mode, n.UID, n.GID, n.ModTime = seg.Mode, seg.UID, seg.GID, seg.ModTime
	n.Tag, n.Below = t.layer, uint32(len(t.below))
	for name, c := range seg.Children {
		if isWhiteout(c) {
			delete(n.Children, name)
			continue
		}
		if t.entries++; t.entries > t.limits.Entries {
			return ErrTooLarge
		}
		if err := t.meta.take(len(name) + len(c.Target)); err != nil {
			return err
		}
		if c.IsDir() {
			d := n.Children[name]
			if d == nil || !d.IsDir() {
				d = bare(c)
			}
			n.Children[name] = d
			if err := t.lay(d, c); err != nil {
				return err
			}
			continue
		}
		c.Tag, c.Below = t.layer, uint32(len(t.below))
		n.Children[name] = c
	}
	return nil
}

// resumeExtra gives a file of the tree what its segment does not hold.
func (t *tree) resumeExtra(x Extra) error {
	n := t.root
	for part := range strings.SplitSeq(string(x.Path), "/") {
		if part == "" {
			continue
		}
		if n = n.Children[part]; n == nil {
			return fmt.Errorf("attributes of %q, which is not there", x.Path)
		}
	}
	if len(x.Xattrs) == 0 {
		return nil // those of a device are told with the first of its names
	}
	return t.setXattrs(n, x.Xattrs)
}
