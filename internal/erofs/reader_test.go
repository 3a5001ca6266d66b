package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// sample is an image with something of everything in it, and its file.
func sample(t testing.TB) (*Node, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f)
	at := time.Unix(1e9, 123)
	file := func(body string) *Node {
		e, err := w.Append(context.Background(), strings.NewReader(body), int64(len(body)))
		if err != nil {
			t.Fatal(err)
		}
		return &Node{Mode: TypeRegular | 0o4755, UID: 70000, GID: math.MaxUint32 - 1, ModTime: at, Data: e}
	}
	dir := func(children map[string]*Node) *Node {
		return &Node{Mode: TypeDir | 0o1777, ModTime: at, Children: children}
	}
	many := map[string]*Node{}
	for i := range 1000 {
		many[fmt.Sprintf("%s%d", strings.Repeat("n", i%200), i)] = &Node{Mode: TypeFIFO, ModTime: at}
	}
	linked := file("linked")
	root := dir(map[string]*Node{
		"empty": file(""), "file": file(strings.Repeat("x", 10000)), "a": linked, "dir": dir(map[string]*Node{"b": linked, "none": dir(map[string]*Node{})}),
		"many": dir(many), strings.Repeat("l", MaxName): file("x"), "\xff": file("y"),
		"link": {Mode: TypeSymlink | 0o777, Target: "../x", ModTime: at}, "long": {Mode: TypeSymlink | 0o777, Target: strings.Repeat("t", MaxTarget), ModTime: at},
		"c": {Mode: TypeChar | 0o600, Major: 4095, Minor: 1<<20 - 1, ModTime: at}, "d": {Mode: TypeBlock, Major: 8, Minor: 300, ModTime: at}, "s": {Mode: TypeSocket, ModTime: at},
	})
	if err := w.Finish(context.Background(), root, [16]byte{1}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	return root, b
}

func TestRead(t *testing.T) {
	want, b := sample(t)
	got, err := Read(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Node{})); diff != "" {
		t.Errorf("(-written +read)\n%s", diff)
	}
	if got.Children["a"] != got.Children["dir"].Children["b"] {
		t.Error("two names of one file became two files")
	}
}

// Every answer to a damaged file is a tree or an error.
func TestReadDamaged(t *testing.T) {
	_, b := sample(t)
	for _, n := range []int{0, 100, 4096, len(b) / 2, len(b) - 4096} {
		if _, err := Read(bytes.NewReader(b[:n]), int64(n)); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	b[superOffset]++
	if _, err := Read(bytes.NewReader(b), int64(len(b))); !errors.Is(err, ErrDamaged) {
		t.Errorf("another magic number: %v", err)
	}
}

// FuzzRead changes an image behind its superblock, whose checksum would refuse most changes.
func FuzzRead(f *testing.F) {
	_, b := sample(f)
	f.Add(uint32(len(b)-5000), []byte{1, 2, 3}, uint32(len(b)))
	f.Fuzz(func(t *testing.T, at uint32, with []byte, size uint32) {
		c := bytes.Clone(b)
		if at %= uint32(len(c)); at >= BlockSize {
			copy(c[at:], with)
		}
		c = c[:min(int(size), len(c))]
		root, err := Read(bytes.NewReader(c), int64(len(c)))
		if err != nil {
			return
		}
		seen := map[*Node]bool{}
		var walk func(*Node)
		walk = func(n *Node) {
			if n.IsDir() && seen[n] {
				t.Fatal("a directory with two names")
			}
			seen[n] = true
			if end := int64(n.Data.Block)*BlockSize + n.Data.Size; end > int64(len(c)) {
				t.Fatalf("contents up to %d of %d", end, len(c))
			}
			for _, child := range n.Children {
				walk(child)
			}
		}
		walk(root)
	})
}
