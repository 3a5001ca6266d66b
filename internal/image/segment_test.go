package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	writer "github.com/coffer-box/coffer/internal/erofs"
)

// overlaid is what an overlay file system makes of segments, the lowest first, by its rules and not by ours.
func overlaid(segments []map[string]seen) map[string]seen {
	out := map[string]seen{}
	hide := func(p string) {
		maps.DeleteFunc(out, func(have string, _ seen) bool { return have == p || strings.HasPrefix(have, p+"/") })
	}
	for _, seg := range segments {
		for _, p := range sortedKeys(seg) {
			s := seg[p]
			old, there := out[p]
			if s.Mode&syscall.S_IFMT == dir && there && old.Mode&syscall.S_IFMT == dir {
				out[p] = s
				continue
			}
			hide(p)
			if s.Mode != chr || s.Rdev != "0:0" {
				out[p] = s
			}
		}
	}
	return out
}

// plain leaves out what differs between directories of one file system and of several.
func plainDirs(files map[string]seen) map[string]seen {
	for p, s := range files {
		if s.Mode&syscall.S_IFMT == dir {
			s.Size, s.Nlink = 0, 0
			files[p] = s
		}
	}
	return files
}

// randomLayers are layers of few names and many ways to give, hide and link them.
func randomLayers(t testing.TB, rnd *rand.Rand) [][]byte {
	pick := func(list ...string) string { return list[rnd.Intn(len(list))] }
	path := func() string {
		p := pick("a", "b", "c")
		for rnd.Intn(3) > 0 && len(p) < 6 {
			p += "/" + pick("a", "b", "c")
		}
		return p
	}
	var layers [][]byte
	for range 2 + rnd.Intn(4) {
		var ents []ent
		for range rnd.Intn(9) {
			p := path()
			e := ent{name: p, mtime: rnd.Int63n(1e9), uid: rnd.Intn(1e5)}
			switch rnd.Intn(9) {
			case 0, 1, 2:
				e.body = strings.Repeat(pick("x", "y"), rnd.Intn(9000))
			case 3:
				e.typ = tar.TypeDir
			case 4:
				e.typ, e.link = tar.TypeSymlink, pick("a", "../b", "/c/a", "none")
			case 5:
				e.name = filepath.Join(filepath.Dir(p), whiteoutPrefix+filepath.Base(p))
			case 6:
				e.name = filepath.Join(p, whiteoutOpaque)
			case 7:
				e.typ, e.link = tar.TypeLink, path()
			case 8:
				e.typ, e.maj, e.min = tar.TypeChar, int64(rnd.Intn(2)), int64(rnd.Intn(9)) // 0:0 among them
				e.xattrs = map[string]string{"user.x": pick("1", "2")}
			}
			ents = append(ents, e)
		}
		layers = append(layers, layerTar(t, ents...))
	}
	return layers
}

// mergeable drops the entries that no image may have, such as links to nothing.
func mergeable(t testing.TB, layers [][]byte) [][]byte {
	tr := newTree(Limits{}.withDefaults())
	f, err := os.Create(filepath.Join(t.TempDir(), "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr.begin(writer.NewWriter(f))
	var out [][]byte
	for _, l := range layers {
		var kept bytes.Buffer
		w := tar.NewWriter(&kept)
		tr.layer++
		tr.emptied, tr.linked = map[*writer.Node]bool{}, map[place]bool{}
		r := tar.NewReader(bytes.NewReader(l))
		for {
			hdr, err := r.Next()
			if err != nil {
				break
			}
			var body bytes.Buffer
			if _, err := body.ReadFrom(r); err != nil {
				t.Fatal(err)
			}
			if tr.add(t.Context(), hdr, bytes.NewReader(body.Bytes())) != nil {
				continue
			}
			if err := errors.Join(w.WriteHeader(hdr), func() error { _, err := w.Write(body.Bytes()); return err }()); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		out = append(out, kept.Bytes())
	}
	return out
}

// checkSegments builds an image in one piece, in one for every layer, and from each of those on anew, and sees that all are the same.
func checkSegments(t *testing.T, limits Limits, layers [][]byte) {
	t.Helper()
	whole, wantExtras, err := buildImage(t, limits, layers...)
	if err != nil {
		return
	}
	want := plainDirs(readGoErofs(t, whole))
	paths, extras, err := buildSegments(t, limits, 1, layers...)
	if err != nil {
		t.Fatal(err)
	}
	var segs []map[string]seen
	for _, p := range paths {
		segs = append(segs, plainDirs(readGoErofs(t, p)))
	}
	if diff := cmp.Diff(want, overlaid(segs)); diff != "" {
		t.Fatalf("segments differ from one image (-one +segments)\n%s", diff)
	}
	if diff := cmp.Diff(wantExtras, extras); diff != "" {
		t.Fatalf("(-one +segments)\n%s", diff)
	}
	for n := 1; n < len(layers); n++ {
		_, lower, err := buildSegments(t, limits, 1, layers[:n]...)
		if err != nil {
			t.Fatal(err)
		}
		again, extras := resumeSegments(t, limits, paths[:n], lower, layers[n:])
		for i, p := range again {
			if !bytes.Equal(mustRead(t, p), mustRead(t, paths[n+i])) {
				t.Fatalf("segment %d is another over %d segments that were there", n+i, n)
			}
		}
		if diff := cmp.Diff(wantExtras, extras); diff != "" {
			t.Fatalf("over %d segments that were there (-one +resumed)\n%s", n, diff)
		}
	}
}

// resumeSegments makes further segments over those in files.
func resumeSegments(t *testing.T, limits Limits, below []string, lower []Extra, layers [][]byte) (paths []string, xs []Extra) {
	t.Helper()
	tr, dir := newTree(limits.withDefaults()), t.TempDir()
	for _, p := range below {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		fi, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		root, err := writer.Read(f, fi.Size())
		if err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		if err := tr.resume(root, f, len(below)); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range lower {
		if err := tr.resumeExtra(x); err != nil {
			t.Fatal(err)
		}
	}
	paths, xs, err := appendSegments(t, tr, dir, 1, layers)
	if err != nil {
		t.Fatal(err)
	}
	return paths, xs
}

func TestSegments(t *testing.T) {
	for name, tc := range mergeCases() {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range tc.layers {
				layers = append(layers, layerTar(t, l...))
			}
			checkSegments(t, Limits{}, layers)
		})
	}
	for seed := range int64(150) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			checkSegments(t, Limits{}, mergeable(t, randomLayers(t, rand.New(rand.NewSource(seed)))))
		})
	}
}

func FuzzSegments(f *testing.F) {
	for _, tc := range mergeCases() {
		if len(tc.layers) > 1 {
			f.Add(layerTar(f, tc.layers[0]...), layerTar(f, tc.layers[1]...))
		}
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		checkSegments(t, Limits{Bytes: 1 << 20, Entries: 1000}, [][]byte{a, b})
	})
}

// The kernel's own overlay is the judge, names of one file included.
func TestSegmentsInKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting an image takes root")
	}
	mount := func(args ...string) error {
		out, err := exec.Command("mount", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mount %v: %w: %s", args, err, out)
		}
		at := args[len(args)-1]
		t.Cleanup(func() {
			if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
				t.Errorf("umount %s: %v: %s", at, err, out)
			}
		})
		return nil
	}
	for seed := range int64(20) {
		layers := mergeable(t, randomLayers(t, rand.New(rand.NewSource(seed))))
		whole, _, err := buildImage(t, Limits{}, layers...)
		if err != nil {
			t.Fatal(err)
		}
		paths, _, err := buildSegments(t, Limits{}, 1, layers...)
		if err != nil {
			t.Fatal(err)
		}
		var dirs []string
		for _, p := range append(paths, whole) {
			at := t.TempDir()
			if err := mount("-t", "erofs", "-o", "loop,ro", p, at); err != nil {
				t.Skipf("this host does not mount the image: %v", err)
			}
			dirs = append([]string{at}, dirs...)
		}
		one, at := dirs[0], t.TempDir()
		if err := mount("-t", "overlay", "-o", "ro,lowerdir="+strings.Join(dirs[1:], ":"), "overlay", at); err != nil {
			t.Skipf("this host does not mount one over the other: %v", err)
		}
		if diff := cmp.Diff(plainDirs(walkHost(t, one)), plainDirs(walkHost(t, at))); diff != "" {
			t.Errorf("seed %d (-one +segments)\n%s", seed, diff)
		}
		if diff := cmp.Diff(sameFiles(t, one), sameFiles(t, at)); diff != "" {
			t.Errorf("seed %d: names of one file (-one +segments)\n%s", seed, diff)
		}
	}
}

// sameFiles lists names that are the same file.
func sameFiles(t *testing.T, root string) [][]string {
	t.Helper()
	type id struct{ dev, ino uint64 }
	names := map[id][]string{}
	if err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		rel, err := filepath.Rel(root, p)
		k := id{st.Dev, st.Ino}
		names[k] = append(names[k], rel)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var out [][]string
	for _, list := range names {
		if len(list) > 1 {
			slices.Sort(list)
			out = append(out, list)
		}
	}
	slices.SortFunc(out, slices.Compare)
	return out
}

const testSegment = 64 << 10

// segmentStore is a store whose segments end early.
func segmentStore(t *testing.T) *Store {
	s := newStore(t)
	s.segment = testSegment
	return s
}

// big is a layer that ends a segment.
func big(t testing.TB, ents ...ent) []byte {
	return layerTar(t, append(ents, ent{name: "big", body: string(make([]byte, testSegment))})...)
}

// loadLayers loads an image of plain layers.
func loadLayers(t *testing.T, s *Store, name string, layers ...[]byte) Image {
	t.Helper()
	im := testImage{layers: layers, cmd: name}
	for _, l := range layers {
		im.packed = append(im.packed, zst(l))
	}
	imgs, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, im, name))}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return imgs[0]
}

// segmentsOf are the files of an image's root.
func segmentsOf(t *testing.T, s *Store, img Image) []string {
	t.Helper()
	paths, err := s.RootfsPaths(img)
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// checkRoot sees that the segments of an image make what its layers do.
func checkRoot(t *testing.T, s *Store, img Image, layers ...[]byte) {
	t.Helper()
	whole, xs, err := buildImage(t, Limits{}, layers...)
	if err != nil {
		t.Fatal(err)
	}
	var segs []map[string]seen
	for _, p := range segmentsOf(t, s, img) {
		segs = append(segs, plainDirs(readGoErofs(t, p)))
	}
	if diff := cmp.Diff(plainDirs(readGoErofs(t, whole)), overlaid(segs)); diff != "" {
		t.Errorf("(-one +stored)\n%s", diff)
	}
	if got, err := allExtras(s, img); err != nil || cmp.Diff(xs, got) != "" {
		t.Errorf("extras: %v, %v", got, err)
	}
}

// Images that begin with the same layers share what is made of those, whichever comes first, for as long as one of them is there or a box
// is that was made of it.
func TestSharedSegments(t *testing.T) {
	base := big(t, ent{name: "etc/a", body: "1", xattrs: map[string]string{"user.k": "v"}}, ent{name: "etc/b", body: "2"}, ent{name: "x", typ: tar.TypeLink, link: "etc/b"})
	mid := layerTar(t, ent{name: "etc/c", body: "3"}, ent{name: "etc/.wh.a"})
	top := big(t, ent{name: "opt/app", body: "4"}, ent{name: ".wh.x"})
	for name, alone := range map[string]bool{"alone": true, "over another": false} {
		t.Run(name, func(t *testing.T) {
			s := segmentStore(t)
			if !alone {
				img := loadLayers(t, s, "base:1", base)
				checkRoot(t, s, img, base)
			}
			a := loadLayers(t, s, "a:1", base, mid, top)
			b := loadLayers(t, s, "b:1", base, mid)
			as, bs := segmentsOf(t, s, a), segmentsOf(t, s, b)
			if len(as) != 2 || len(bs) != 2 || as[0] != bs[0] || as[1] == bs[1] {
				t.Fatalf("segments\n%v\n%v", as, bs)
			}
			checkRoot(t, s, a, base, mid, top)
			checkRoot(t, s, b, base, mid)
			c, err := s.Commit(t.Context(), "a:1", bytes.NewReader(layerTar(t, ent{name: "etc/d", body: "5"})), CommitOptions{Name: "c:1"})
			if err != nil {
				t.Fatal(err)
			}
			if cs := segmentsOf(t, s, c); len(cs) != 3 || !slices.Equal(cs[:2], as) {
				t.Fatalf("segments of a commit\n%v\n%v", as, cs)
			}
			checkRoot(t, s, c, base, mid, top, layerTar(t, ent{name: "etc/d", body: "5"}))
			for _, u := range usageOf(t, s) {
				if u.Shared == 0 || u.Shared > u.Size {
					t.Errorf("%v shares %d of %d bytes", u.Names, u.Shared, u.Size)
				}
			}
			// A box of the first holds all that it lies on.
			boxes := func(context.Context) (Needs, error) { return Needs{Rootfs: []string{a.RootfsID}}, nil }
			for _, ref := range []string{a.ID, c.ID} {
				if _, err := s.Remove(t.Context(), ref, boxes); err != nil {
					t.Fatal(err)
				}
			}
			checkRoot(t, s, a, base, mid, top)
			if _, err := s.Prune(t.Context(), true, nil, nil); err != nil {
				t.Fatal(err)
			}
			if left, err := os.ReadDir(s.path("rootfs")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}

func usageOf(t *testing.T, s *Store) []Usage {
	t.Helper()
	list, _, _, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// What is damaged or missing of the segments below is made anew.
func TestDamagedSegments(t *testing.T) {
	base, top := big(t, ent{name: "a", body: "1", xattrs: map[string]string{"user.k": "v"}}), layerTar(t, ent{name: "b", body: "2"})
	for name, hurt := range map[string]func(s *Store, id string) error{
		"no files":      func(s *Store, id string) error { return os.Remove(s.rootfsPath(id)) },
		"no attributes": func(s *Store, id string) error { return os.Remove(s.extraPath(id)) },
		"cut files":     func(s *Store, id string) error { return os.Truncate(s.rootfsPath(id), 5000) },
		"cut attributes": func(s *Store, id string) error {
			fi, err := os.Stat(s.extraPath(id))
			if err != nil {
				return err
			}
			return os.Truncate(s.extraPath(id), fi.Size()-5)
		},
		"other attributes": func(s *Store, id string) error {
			return errors.Join(os.Chmod(s.extraPath(id), 0o600), os.WriteFile(s.extraPath(id), []byte(`{"below":["../../x"],"closed":true}`), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := segmentStore(t)
			below := loadLayers(t, s, "base:1", base)
			if err := hurt(s, below.RootfsID); err != nil {
				t.Fatal(err)
			}
			img := loadLayers(t, s, "a:1", base, top)
			checkRoot(t, s, img, base, top)
			checkRoot(t, s, below, base)
			checkClean(t, s)
		})
	}
}

// What has to be written again counts, or a large file with many names would be more than any image may hold.
func TestRestoredContentsCount(t *testing.T) {
	layers := [][]byte{layerTar(t, ent{name: "f", body: strings.Repeat("x", 60000)})}
	for i := range 4 {
		layers = append(layers, layerTar(t, ent{name: fmt.Sprint("l", i), typ: tar.TypeLink, link: "f"}))
	}
	if _, _, err := buildSegments(t, Limits{Bytes: 200000}, 1, layers...); !errors.Is(err, ErrTooLarge) {
		t.Errorf("%v", err)
	}
	if _, _, err := buildImage(t, Limits{Bytes: 200000}, layers...); err != nil {
		t.Error(err)
	}
}

// The number of segments is bounded, whatever the number of layers.
func TestManySegments(t *testing.T) {
	var layers [][]byte
	for i := range maxSegments + 4 {
		layers = append(layers, big(t, ent{name: fmt.Sprint("f", i), body: "x"}))
	}
	s := segmentStore(t)
	img := loadLayers(t, s, "a:1", layers...)
	if n := len(segmentsOf(t, s, img)); n != maxSegments {
		t.Errorf("%d segments", n)
	}
	checkRoot(t, s, img, layers...)
}

// A list of segments that cannot be read is no reason to take any away.
func TestUnreadableSegments(t *testing.T) {
	s := segmentStore(t)
	loadLayers(t, s, "base:1", big(t, ent{name: "a", body: "1"}))
	img, err := s.Commit(t.Context(), "base:1", bytes.NewReader(layerTar(t, ent{name: "b", body: "2"})), CommitOptions{Name: "c:1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Remove(t.Context(), "base:1", nil); err != nil {
		t.Fatal(err)
	}
	path := s.extraPath(img.RootfsID)
	if err := errors.Join(os.Rename(path, path+".aside"), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), false, nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.Rename(path+".aside", path)); err != nil {
		t.Fatal(err)
	}
	checkRoot(t, s, img, big(t, ent{name: "a", body: "1"}), layerTar(t, ent{name: "b", body: "2"}))
}

// A root that was made before there were segments is one file, with a list beside it.
func TestRootOfOneFile(t *testing.T) {
	s := newStore(t)
	img := loadLayers(t, s, "a:1", layerTar(t, ent{name: "a", body: "1"}))
	path := s.extraPath(img.RootfsID)
	if err := os.WriteFile(path, []byte(`[{"path":"L2E=","xattrs":[{"Name":"user.k","Value":"dg=="}]}`+"\n]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if segs := segmentsOf(t, s, img); len(segs) != 1 {
		t.Errorf("%v", segs)
	}
	want := []Extra{{Path: []byte("/a"), Xattrs: []Xattr{{Name: "user.k", Value: []byte("v")}}}}
	if got, err := allExtras(s, img); err != nil || cmp.Diff(want, got) != "" {
		t.Errorf("%v, %v", got, err)
	}
	if err := os.Truncate(path, 30); err != nil {
		t.Fatal(err)
	}
	if _, err := allExtras(s, img); err == nil {
		t.Error("a list that was cut is taken for whole")
	}
}

// Images of one archive share as those of several do.
func TestSegmentsOfOneLoad(t *testing.T) {
	s := segmentStore(t)
	base := big(t, ent{name: "a", body: "1"})
	var list []testImage
	for _, name := range []string{"1", "2"} {
		top := layerTar(t, ent{name: name, body: name})
		list = append(list, testImage{layers: [][]byte{base, top}, packed: [][]byte{base, top}, cmd: name})
	}
	st := stageOf(t, s)
	for i, im := range list {
		b := newBuilder(st, Options{}, im.config().RootFS.DiffIDs, true)
		defer b.close()
		if b.known != i {
			t.Errorf("image %d: %d layers are known", i, b.known)
		}
		for _, l := range im.layers {
			if err := b.add(t.Context(), bytes.NewReader(l), layerSpec{plain: true}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := b.finish(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Attributes stand beside every segment, so they count for each.
func TestExtrasCount(t *testing.T) {
	var layers [][]byte
	for i := range 10 {
		ents := []ent{{name: fmt.Sprint("f", i), body: "x"}}
		if i == 0 {
			ents = append(ents, ent{name: "d", typ: tar.TypeDir, xattrs: map[string]string{"user.k": strings.Repeat("v", 60000)}})
		}
		layers = append(layers, big(t, ents...))
	}
	im := testImage{layers: layers, packed: layers}
	for limit, want := range map[int64]error{1 << 20: ErrTooLarge, 4 << 20: nil} {
		if _, err := segmentStore(t).Load(t.Context(), Source{Path: asDir(t, ociFiles(t, im, "a:1"))}, Options{Limits: Limits{Bytes: limit}}); !errors.Is(err, want) {
			t.Errorf("limit of %d: %v", limit, err)
		}
	}
}
