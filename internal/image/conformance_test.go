package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	gvisor "gvisor.dev/gvisor/pkg/erofs"

	writer "github.com/coffer-box/coffer/internal/erofs"
)

// seen is a file as a reader of the image sees it.
type seen struct {
	Mode     uint32
	UID, GID uint32
	Mtime    int64
	Nlink    uint32
	Rdev     string
	Target   string
	Size     int64
	Sum      string
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:8])
}

// ent is an entry of a test's layer.
type ent struct {
	name   string
	typ    byte
	mode   int64
	body   string
	link   string
	uid    int
	gid    int
	mtime  int64
	maj    int64
	min    int64
	xattrs map[string]string
}

func layerTar(t testing.TB, ents ...ent) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		typ := e.typ
		if typ == 0 {
			typ = tar.TypeReg
		}
		mode := e.mode
		if mode == 0 {
			mode = 0o644
			if typ == tar.TypeDir {
				mode = 0o755
			}
		}
		h := &tar.Header{Name: e.name, Typeflag: typ, Mode: mode, Size: int64(len(e.body)), Linkname: e.link, Uid: e.uid, Gid: e.gid,
			Devmajor: e.maj, Devminor: e.min}
		if e.mtime != 0 {
			h.ModTime = time.Unix(e.mtime, 0)
		}
		for k, v := range e.xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// buildImage merges layers into an image file.
func buildImage(t testing.TB, limits Limits, layers ...[]byte) (string, []Extra, error) {
	t.Helper()
	paths, xs, err := buildSegments(t, limits, len(layers), layers...)
	if err != nil {
		return "", nil, err
	}
	return paths[0], xs, nil
}

// begun is a tree that has nowhere to put contents.
func begun(t testing.TB) *tree {
	t.Helper()
	tr := newTree(Limits{}.withDefaults())
	tr.begin(nil)
	return tr
}

// buildSegments merges layers into image files, each of so many of them.
func buildSegments(t testing.TB, limits Limits, each int, layers ...[]byte) (paths []string, xs []Extra, err error) {
	t.Helper()
	return appendSegments(t, newTree(limits.withDefaults()), t.TempDir(), each, layers)
}

// appendSegments is buildSegments over what a tree holds already.
func appendSegments(t testing.TB, tr *tree, dir string, each int, layers [][]byte) (paths []string, xs []Extra, err error) {
	t.Helper()
	for i := 0; i == 0 || i < len(layers); i += each {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("image%d.erofs", i)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		w := writer.NewWriter(f)
		tr.begin(w)
		for _, l := range layers[i:min(i+each, len(layers))] {
			if err := tr.apply(t.Context(), bytes.NewReader(l)); err != nil {
				return nil, nil, err
			}
		}
		root, err := tr.end(t.Context())
		if err != nil {
			return nil, nil, err
		}
		if err := w.Finish(t.Context(), root, [16]byte{1}); err != nil {
			return nil, nil, err
		}
		tr.below = append(tr.below, f)
		paths = append(paths, f.Name())
	}
	err = tr.eachExtra(func(x Extra) error {
		x.Path = bytes.Clone(x.Path)
		xs = append(xs, x)
		return nil
	})
	return paths, xs, err
}

const (
	reg  = syscall.S_IFREG
	dir  = syscall.S_IFDIR
	lnk  = syscall.S_IFLNK
	chr  = syscall.S_IFCHR
	blk  = syscall.S_IFBLK
	fifo = syscall.S_IFIFO
)

func file(mode uint32, body string) seen {
	return seen{Mode: reg | mode, Nlink: 1, Size: int64(len(body)), Sum: sum([]byte(body))}
}

// mergeCases are images and what they must look like, worked out by hand.
func mergeCases() map[string]struct {
	layers [][]ent
	want   map[string]seen // besides the root
} {
	long := strings.Repeat("n", 255)
	deep := strings.TrimSuffix(strings.Repeat("directory-with-a-long-name/", 12), "/")
	target := strings.Repeat("t/", 2040)
	big := strings.Repeat("0123456789abcdef", 300<<10/16) + "tail"
	type c = struct {
		layers [][]ent
		want   map[string]seen
	}
	d := func(mode, nlink uint32) seen { return seen{Mode: dir | mode, Nlink: nlink} }
	cases := map[string]c{
		"whiteout": {
			[][]ent{{{name: "a", body: "1"}, {name: "d/x", body: "x"}, {name: "d/y", body: "y"}}, {{name: ".wh.a"}, {name: "d/.wh.x"}, {name: ".wh.none"}}},
			map[string]seen{"d": d(0o755, 2), "d/y": file(0o644, "y")},
		},
		"whiteout after the entry that replaces it": {
			[][]ent{{{name: "d/old", body: "o"}}, {{name: "d", typ: tar.TypeDir, mode: 0o700}, {name: "d/new", body: "n"}, {name: ".wh.d"}}},
			map[string]seen{"d": d(0o700, 2), "d/new": file(0o644, "n")},
		},
		"opaque, whatever the order": {
			[][]ent{{{name: "d/a", body: "a"}, {name: "d/s/b", body: "b"}}, {{name: "d/c", body: "c"}, {name: "d/.wh..wh..opq"}, {name: "d/e", body: "e"}}},
			map[string]seen{"d": d(0o755, 2), "d/c": file(0o644, "c"), "d/e": file(0o644, "e")},
		},
		"opaque, after a link to a file below": {
			[][]ent{{{name: "a", body: "1"}, {name: "d/old", body: "o"}, {name: "d/same", typ: tar.TypeLink, link: "a"}},
				{{name: "d/l", typ: tar.TypeLink, link: "a"}, {name: "d/same", typ: tar.TypeLink, link: "a"}, {name: "d/.wh..wh..opq"}, {name: "d/.wh.l"}}},
			map[string]seen{"a": {Mode: reg | 0o644, Nlink: 3, Size: 1, Sum: sum([]byte("1"))}, "d": d(0o755, 2),
				"d/l": {Mode: reg | 0o644, Nlink: 3, Size: 1, Sum: sum([]byte("1"))}, "d/same": {Mode: reg | 0o644, Nlink: 3, Size: 1, Sum: sum([]byte("1"))}},
		},
		"opaque twice, with a restated directory between": {
			[][]ent{{{name: "d/a", body: "a"}, {name: "d/s/b", body: "b"}}, {{name: "d/.wh..wh..opq"}, {name: "d", typ: tar.TypeDir, mode: 0o700}, {name: "d/s/c", body: "c"},
				{name: "d/.wh..wh..opq"}, {name: ".wh.d"}}, {{name: "d/s/.wh.c"}, {name: "e"}}},
			map[string]seen{"d": d(0o700, 3), "d/s": d(0o755, 2), "e": file(0o644, "")},
		},
		"aufs metadata means nothing": {
			[][]ent{{{name: "a", body: "1"}, {name: ".wh..wh.aufs", body: ""}, {name: ".wh..wh.plnk", typ: tar.TypeDir}}},
			map[string]seen{"a": file(0o644, "1")},
		},
		"file becomes directory and back": {
			[][]ent{{{name: "a", body: "1"}, {name: "b/c", body: "2"}}, {{name: "a", typ: tar.TypeDir}, {name: "a/in", body: "3"}, {name: "b", body: "4"}}},
			map[string]seen{"a": d(0o755, 2), "a/in": file(0o644, "3"), "b": file(0o644, "4")},
		},
		"last entry wins": {
			[][]ent{{{name: "a", body: "first"}, {name: "./a", body: "second", mode: 0o600}}},
			map[string]seen{"a": file(0o600, "second")},
		},
		"directory restated keeps its contents": {
			[][]ent{{{name: "d/", typ: tar.TypeDir}, {name: "d/f", body: "f"}}, {{name: "d/", typ: tar.TypeDir, mode: 0o1777, uid: 5, gid: 6, mtime: 77}}},
			map[string]seen{"d": {Mode: dir | 0o1777, UID: 5, GID: 6, Mtime: 77, Nlink: 2}, "d/f": file(0o644, "f")},
		},
		"hard links, across layers, of links": {
			[][]ent{{{name: "a", body: "one"}, {name: "s", typ: tar.TypeSymlink, link: "a"}}, {{name: "b", typ: tar.TypeLink, link: "a"}, {name: "d/c", typ: tar.TypeLink, link: "/b"}, {name: "s2", typ: tar.TypeLink, link: "s"}}},
			map[string]seen{
				"a": {Mode: reg | 0o644, Nlink: 3, Size: 3, Sum: sum([]byte("one"))}, "b": {Mode: reg | 0o644, Nlink: 3, Size: 3, Sum: sum([]byte("one"))},
				"d": d(0o755, 2), "d/c": {Mode: reg | 0o644, Nlink: 3, Size: 3, Sum: sum([]byte("one"))},
				"s": {Mode: lnk | 0o777, Nlink: 2, Size: 1, Target: "a"}, "s2": {Mode: lnk | 0o777, Nlink: 2, Size: 1, Target: "a"},
			},
		},
		"hard link survives the whiteout of its first name": {
			[][]ent{{{name: "a", body: "one"}, {name: "b", typ: tar.TypeLink, link: "a"}}, {{name: ".wh.a"}}},
			map[string]seen{"b": file(0o644, "one")},
		},
		"modes, owners, times": {
			[][]ent{{{name: "suid", mode: 0o4755, body: "x", uid: 70000, gid: 4000000000, mtime: 1700000000}, {name: "sgid", mode: 0o2755}, {name: "none", mode: 0o1000}, {name: "old", mtime: -86400}}},
			map[string]seen{"suid": {Mode: reg | 0o4755, UID: 70000, GID: 4000000000, Mtime: 1700000000, Nlink: 1, Size: 1, Sum: sum([]byte("x"))},
				"sgid": file(0o2755, ""), "none": file(0o1000, ""), "old": {Mode: reg | 0o644, Mtime: -86400, Nlink: 1, Sum: sum(nil)}},
		},
		"devices and pipes": {
			[][]ent{{{name: "dev/null", typ: tar.TypeChar, mode: 0o666, maj: 1, min: 3}, {name: "dev/big", typ: tar.TypeBlock, mode: 0o660, maj: 259, min: 70000}, {name: "p", typ: tar.TypeFifo, mode: 0o600}}},
			map[string]seen{"dev": d(0o755, 2), "dev/null": {Mode: chr | 0o666, Nlink: 1, Rdev: "1:3"}, "dev/big": {Mode: blk | 0o660, Nlink: 1, Rdev: "259:70000"}, "p": {Mode: fifo | 0o600, Nlink: 1}},
		},
		"long names and links": {
			[][]ent{{{name: long, body: "l"}, {name: deep + "/f", body: "f"}, {name: "ln", typ: tar.TypeSymlink, link: target[:4000]}, {name: "ln2", typ: tar.TypeSymlink, link: target[:4035]}}},
			func() map[string]seen {
				m := map[string]seen{long: file(0o644, "l"), deep + "/f": file(0o644, "f"), "ln": {Mode: lnk | 0o777, Nlink: 1, Size: 4000, Target: target[:4000]},
					"ln2": {Mode: lnk | 0o777, Nlink: 1, Size: 4035, Target: target[:4035]}}
				for p := deep; p != "."; p = filepath.Dir(p) {
					m[p] = d(0o755, 3)
				}
				m[deep] = d(0o755, 2)
				return m
			}(),
		},
		"sizes around a block": {
			[][]ent{{{name: "0"}, {name: "4095", body: big[:4095]}, {name: "4096", body: big[:4096]}, {name: "4097", body: big[:4097]}, {name: "big", body: big}, {name: "zeros", body: strings.Repeat("\x00", 20000) + "end"}}},
			map[string]seen{"0": file(0o644, ""), "4095": file(0o644, big[:4095]), "4096": file(0o644, big[:4096]), "4097": file(0o644, big[:4097]), "big": file(0o644, big), "zeros": file(0o644, strings.Repeat("\x00", 20000)+"end")},
		},
		"through a link that an earlier layer has": {
			[][]ent{{{name: "usr/lib/", typ: tar.TypeDir}, {name: "lib", typ: tar.TypeSymlink, link: "usr/lib"}, {name: "abs", typ: tar.TypeSymlink, link: "/../usr"}}, {{name: "lib/x", body: "x"}, {name: "abs/lib/y", body: "y"}, {name: "z", typ: tar.TypeLink, link: "lib/x"}}},
			map[string]seen{"usr": d(0o755, 3), "usr/lib": d(0o755, 2), "lib": {Mode: lnk | 0o777, Nlink: 1, Size: 7, Target: "usr/lib"}, "abs": {Mode: lnk | 0o777, Nlink: 1, Size: 7, Target: "/../usr"},
				"usr/lib/x": {Mode: reg | 0o644, Nlink: 2, Size: 1, Sum: sum([]byte("x"))}, "usr/lib/y": file(0o644, "y"), "z": {Mode: reg | 0o644, Nlink: 2, Size: 1, Sum: sum([]byte("x"))}},
		},
		"absolute names and inner dots": {
			[][]ent{{{name: "/etc/../etc/./passwd", body: "p"}}},
			map[string]seen{"etc": d(0o755, 2), "etc/passwd": file(0o644, "p")},
		},
	}
	// A directory of several blocks.
	many := c{layers: [][]ent{nil}, want: map[string]seen{"m": d(0o755, 2)}}
	rnd := rand.New(rand.NewSource(1))
	for i := range 1500 {
		name := fmt.Sprintf("m/%s%d", strings.Repeat(string(rune('!'+rnd.Intn(80))), 1+rnd.Intn(20)), i)
		name = "m/" + strings.ReplaceAll(name[2:], "/", "_")
		if strings.HasPrefix(name, "m/.wh.") {
			continue
		}
		many.layers[0] = append(many.layers[0], ent{name: name, body: name})
		many.want[name] = file(0o644, name)
	}
	cases["large directory"] = many
	return cases
}

func TestMerge(t *testing.T) {
	readers := map[string]func(*testing.T, string) map[string]seen{"gvisor": readGvisor, "go-erofs": readGoErofs, "kernel": readKernel}
	for name, tc := range mergeCases() {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range tc.layers {
				layers = append(layers, layerTar(t, l...))
			}
			path, _, err := buildImage(t, Limits{}, layers...)
			if err != nil {
				t.Fatal(err)
			}
			again, _, err := buildImage(t, Limits{}, layers...)
			if err != nil {
				t.Fatal(err)
			}
			if a, b := mustRead(t, path), mustRead(t, again); !bytes.Equal(a, b) {
				t.Error("two builds of one image differ")
			}
			checkFsck(t, path)
			for rname, read := range readers {
				t.Run(rname, func(t *testing.T) {
					got := read(t, path)
					delete(got, ".")
					want := map[string]seen{}
					for k, v := range tc.want {
						if rname == "gvisor" {
							v.Rdev = "" // its reader has none
							if len(v.Target) > 4095 {
								v.Target = v.Target[:4095]
							}
						}
						if rname == "go-erofs" {
							v.Mode &^= 0o7000 // its reader drops the set-id and sticky bits
						}
						want[k] = v
					}
					for k, v := range got {
						if v.Mode&syscall.S_IFMT == dir {
							v.Size = 0
							got[k] = v
						}
					}
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("(-want +got)\n%s", diff)
					}
				})
			}
		})
	}
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func checkFsck(t *testing.T, path string) {
	t.Helper()
	bin, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Log("fsck.erofs is not installed: the image is not checked by it")
		return
	}
	if out, err := exec.Command(bin, "--extract", path).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

func readGvisor(t *testing.T, path string) map[string]seen {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	img, err := gvisor.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := map[string]seen{}
	var walk func(p string, nid uint64)
	walk = func(p string, nid uint64) {
		n, err := img.Inode(nid)
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		s := seen{Mode: uint32(n.Mode()), UID: n.UID(), GID: n.GID(), Mtime: int64(n.Mtime()), Nlink: n.Nlink(), Size: int64(n.Size())}
		switch {
		case n.IsSymlink():
			if s.Target, err = n.Readlink(); err != nil {
				t.Fatalf("%s: %v", p, err)
			}
		case n.IsRegular():
			off, err := n.DataOffset()
			if err != nil || off%4096 != 0 {
				t.Fatalf("%s: data at %d: %v", p, off, err)
			}
			var data []byte
			if n.Size() > 0 {
				if data, err = img.BytesAt(off, (n.Size()+4095)/4096*4096); err != nil {
					t.Fatalf("%s: %v", p, err)
				}
			}
			if bytes.Trim(data[n.Size():], "\x00") != nil {
				t.Errorf("%s: bytes behind its end", p)
			}
			s.Sum = sum(data[:n.Size()])
		case n.IsDir():
			if err := n.IterDirents(func(name string, _ uint8, child uint64) error {
				if found, err := n.Lookup(name); err != nil || found != child {
					t.Errorf("lookup of %s/%s: %d, %v", p, name, found, err)
				}
				if name != "." && name != ".." {
					walk(filepath.Join(p, name), child)
				}
				return nil
			}); err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			if _, err := n.Lookup("~none~"); err == nil {
				t.Errorf("%s: lookup of a missing name succeeds", p)
			}
		}
		got[p] = s
	}
	walk(".", img.RootNid())
	return got
}

func readGoErofs(t *testing.T, path string) map[string]seen {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]seen{}
	if err := fs.WalkDir(img, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := fi.Sys().(*erofs.Stat)
		if !ok {
			return fmt.Errorf("unexpected %T", fi.Sys())
		}
		s := seen{Mode: unixMode(fi.Mode()), UID: st.UID, GID: st.GID, Mtime: int64(st.Mtime), Nlink: uint32(st.Nlink), Size: fi.Size()}
		switch {
		case fi.Mode()&fs.ModeSymlink != 0:
			s.Target, err = fs.ReadLink(img, p)
		case fi.Mode().IsRegular():
			var b []byte
			b, err = fs.ReadFile(img, p)
			s.Sum = sum(b)
		case fi.Mode()&fs.ModeDevice != 0:
			s.Rdev = devString(uint64(st.Rdev))
		}
		got[p] = s
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return got
}

func devString(d uint64) string {
	return fmt.Sprintf("%d:%d", d>>8&0xfff, d&0xff|d>>12&0xfff00)
}

func unixMode(m fs.FileMode) uint32 {
	u := uint32(m.Perm())
	for bit, v := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			u |= v
		}
	}
	switch {
	case m.IsDir():
		return u | dir
	case m&fs.ModeSymlink != 0:
		return u | lnk
	case m&fs.ModeCharDevice != 0:
		return u | chr
	case m&fs.ModeDevice != 0:
		return u | blk
	case m&fs.ModeNamedPipe != 0:
		return u | fifo
	}
	return u | reg
}

func readKernel(t *testing.T, path string) map[string]seen {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounting an image takes root")
	}
	at := t.TempDir()
	if out, err := exec.CommandContext(context.Background(), "mount", "-t", "erofs", "-o", "loop,ro", path, at).CombinedOutput(); err != nil {
		t.Skipf("this host does not mount the image: %v: %s", err, out)
	}
	defer func() {
		if out, err := exec.CommandContext(context.Background(), "umount", at).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	return walkHost(t, at)
}

// walkHost lists what is below a directory.
func walkHost(t *testing.T, at string) map[string]seen {
	t.Helper()
	got := map[string]seen{}
	if err := filepath.WalkDir(at, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := os.Lstat(p)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		s := seen{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Mtime: st.Mtim.Sec, Nlink: uint32(st.Nlink), Size: st.Size}
		switch st.Mode & syscall.S_IFMT {
		case lnk:
			s.Target, err = os.Readlink(p)
		case reg:
			var b []byte
			b, err = os.ReadFile(p)
			s.Sum = sum(b)
		case chr, blk:
			s.Rdev = devString(uint64(st.Rdev))
		}
		rel, rerr := filepath.Rel(at, p)
		got[rel] = s
		return errors.Join(err, rerr)
	}); err != nil {
		t.Fatal(err)
	}
	return got
}
