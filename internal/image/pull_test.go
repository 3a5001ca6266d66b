package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// fakeRemote is a repository in memory. It counts what is asked of it.
type fakeRemote struct {
	blobs map[v1.Hash][]byte
	tags  map[string]v1.Hash
	// body may change what a blob's answer is, given the offset that was asked for.
	body func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error)

	mu        sync.Mutex
	digests   int
	manifests map[v1.Hash]int
	fetched   map[v1.Hash][]int64 // offsets
}

func newRemote(t testing.TB, images map[string]testImage) *fakeRemote {
	r := &fakeRemote{blobs: map[v1.Hash][]byte{}, tags: map[string]v1.Hash{}, manifests: map[v1.Hash]int{}, fetched: map[v1.Hash][]int64{}}
	for tag, im := range images {
		r.tags[tag] = r.add(t, im).Digest
	}
	return r
}

func (r *fakeRemote) add(t testing.TB, im testImage) v1.Descriptor {
	files := map[string][]byte{}
	d := writeOCI(t, files, im)
	for _, b := range files {
		r.blobs[hashBytes(b)] = b
	}
	return d
}

// index adds an index and returns its digest.
func (r *fakeRemote) index(t testing.TB, ds ...v1.Descriptor) v1.Descriptor {
	b := toJSON(t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: ds})
	r.blobs[hashBytes(b)] = b
	return v1.Descriptor{MediaType: types.OCIImageIndex, Digest: hashBytes(b), Size: int64(len(b))}
}

var errNotThere = errors.New("not there")

func (r *fakeRemote) Digest(_ context.Context, tag string) (v1.Hash, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.digests++
	h, ok := r.tags[tag]
	if !ok {
		return h, errNotThere
	}
	return h, nil
}

func (r *fakeRemote) Manifest(_ context.Context, h v1.Hash, limit int64) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[h]++
	b, ok := r.blobs[h]
	if !ok || int64(len(b)) > limit {
		return nil, errNotThere
	}
	return b, nil
}

func (r *fakeRemote) Blob(_ context.Context, h v1.Hash, offset int64) (io.ReadCloser, int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fetched[h] = append(r.fetched[h], offset)
	b, ok := r.blobs[h]
	if !ok {
		return nil, 0, errNotThere
	}
	if r.body != nil {
		body, start, err := r.body(h, offset, b)
		return io.NopCloser(body), start, err
	}
	return io.NopCloser(bytes.NewReader(b[offset:])), offset, nil
}

func (r *fakeRemote) requests() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, f := range r.fetched {
		n += len(f)
	}
	return n
}

func mustName(t testing.TB, s string) Name {
	t.Helper()
	n, err := ParseName(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// checkPulls looks for what a pull may leave that has come to its end.
func checkPulls(t *testing.T, s *Store) {
	t.Helper()
	if n := countFiles(s.path("pull")); n > 0 {
		t.Errorf("%d files are left in pull", n)
	}
	checkClean(t, s)
}

func TestPull(t *testing.T) {
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one")})
	name := mustName(t, "reg.example:5000/team/app:1")
	var steps []Progress
	img, changed, err := s.Pull(t.Context(), name, r, PullOptions{Progress: func(p Progress) { steps = append(steps, p) }})
	if err != nil || !changed {
		t.Fatal(changed, err)
	}
	checkSample(t, s, img, "one")
	if want := "reg.example:5000/team/app@" + r.tags["1"].String(); !slices.Equal(img.Names, []string{name.String()}) || !slices.Equal(img.Digests, []string{want}) {
		t.Errorf("names %q, digests %q", img.Names, img.Digests)
	}
	if last := steps[len(steps)-1]; last.Status != StatusPulled || last.Layer != "" {
		t.Errorf("the last step is %+v", last)
	}
	done := 0
	for _, p := range steps {
		if p.Status == StatusDone && p.Current == p.Total && p.Total > 0 {
			done++
		}
	}
	if done != 3 {
		t.Errorf("%d layers are said to be done: %+v", done, steps)
	}
	// One configuration and three layers, each once.
	if n := r.requests(); n != 4 {
		t.Errorf("%d blobs were fetched", n)
	}
	if _, changed, err = s.Pull(t.Context(), name, r, PullOptions{}); changed || err != nil {
		t.Errorf("again: %v, %v", changed, err)
	}
	if n := r.requests(); n != 4 || r.digests != 2 || len(r.manifests) != 1 {
		t.Errorf("again: %d blobs, %d looks at the tag, %v", n, r.digests, r.manifests)
	}
	byDigest := mustName(t, img.Digests[0])
	if got, changed, err := s.Pull(t.Context(), byDigest, r, PullOptions{}); got.ID != img.ID || changed || err != nil {
		t.Errorf("by digest: %v, %v", changed, err)
	}
	if got, err := s.Resolve(t.Context(), img.Digests[0]); got.ID != img.ID || err != nil {
		t.Errorf("by digest: %v", err)
	}
	checkPulls(t, s)

	// The tag moves on. The old image stays, without it.
	r.tags["1"] = r.add(t, sampleImage(t, "two")).Digest
	next, changed, err := s.Pull(t.Context(), name, r, PullOptions{})
	if err != nil || !changed || next.ID == img.ID {
		t.Fatal(changed, err)
	}
	checkSample(t, s, next, "two")
	if old, err := s.Resolve(t.Context(), img.ID); err != nil || len(old.Names) != 0 {
		t.Errorf("the old one: %v, %v", old.Names, err)
	}
}

// A store that was made before there were pulls takes them.
func TestPullIntoAnOldStore(t *testing.T) {
	old, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one")})
	if err := os.Remove(old.path("pull")); err != nil {
		t.Fatal(err)
	}
	s, err := Open(old.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); err != nil {
		t.Error(err)
	}
}

// A second name for what is there costs no download.
func TestPullAnotherTag(t *testing.T) {
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one")})
	r.tags["2"] = r.tags["1"]
	for _, name := range []string{"h.example/app:1", "h.example/app:2", "other.example/app:1"} {
		if _, _, err := s.Pull(t.Context(), mustName(t, name), r, PullOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	img, err := s.Resolve(t.Context(), "h.example/app:1")
	if err != nil || len(img.Names) != 3 || len(img.Digests) != 2 {
		t.Errorf("%q, %q, %v", img.Names, img.Digests, err)
	}
	for h, offsets := range r.fetched {
		if len(offsets) != 1 && r.blobs[h][0] != '{' {
			t.Errorf("layer %s was fetched %d times", h, len(offsets))
		}
	}
	// Each name goes alone, and the image with the last that has no digest.
	for _, ref := range []string{img.Digests[0], "h.example/app:1", "h.example/app:2"} {
		if res, err := s.Remove(t.Context(), ref, nil); err != nil || cmp.Diff(Removed{Untagged: []string{ref}}, res) != "" {
			t.Errorf("remove %s: %+v, %v", ref, res, err)
		}
	}
	if res, err := s.Remove(t.Context(), "other.example/app:1", nil); err != nil || len(res.Deleted) != 1 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestPullPlatform(t *testing.T) {
	s, r := newStore(t), newRemote(t, nil)
	here, there := sampleImage(t, "here"), sampleImage(t, "there")
	there.arch = "s390x"
	d1, d2 := r.add(t, there), r.add(t, here)
	d1.Platform = &v1.Platform{OS: "linux", Architecture: "s390x"}
	d2.Platform = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	proof := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: d1.Digest, Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}
	r.tags["multi"] = r.index(t, d1, d2, proof).Digest
	r.tags["nested"] = r.index(t, r.index(t, d1, d2)).Digest
	r.tags["other"] = r.index(t, d1).Digest
	r.tags["alone"] = d1.Digest
	for _, tag := range []string{"multi", "nested"} {
		img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:"+tag), r, PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		checkSample(t, s, img, "here")
	}
	for _, tag := range []string{"other", "alone"} {
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:"+tag), r, PullOptions{}); err == nil || !strings.Contains(err.Error(), "linux/s390x") {
			t.Errorf("%s: got %v, want the platforms that there are", tag, err)
		}
	}
	img, changed, err := s.Pull(t.Context(), mustName(t, "h.example/app:multi"), r, PullOptions{Platform: Platform{OS: "linux", Arch: "s390x"}})
	if err != nil || !changed {
		t.Fatal(changed, err)
	}
	checkSample(t, s, img, "there")
}

// What a registry sends that is not what was asked for is never in the store, and does no lasting harm.
func TestPullOfLies(t *testing.T) {
	im := sampleImage(t, "one")
	layer := hashBytes(im.packed[0])
	lie := func(change func(b []byte) []byte) func(v1.Hash, int64, []byte) (io.Reader, int64, error) {
		return func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
			if h == layer {
				b = change(bytes.Clone(b))
			}
			return bytes.NewReader(b[min(offset, int64(len(b))):]), offset, nil
		}
	}
	for name, body := range map[string]func(v1.Hash, int64, []byte) (io.Reader, int64, error){
		"other bytes":   lie(func(b []byte) []byte { b[len(b)/2] ^= 1; return b }),
		"more bytes":    lie(func(b []byte) []byte { return append(b, 0) }),
		"another layer": lie(func(b []byte) []byte { return append(gz([]byte("x")), make([]byte, len(b)-len(gz([]byte("x"))))...) }),
		"an odd beginning": func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
			return bytes.NewReader(b), offset + 1, nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
			r.body = body
			if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); err == nil {
				t.Fatal("it was taken")
			} else if name == "other bytes" && (!errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), layer.String())) {
				t.Errorf("error %v", err)
			}
			if _, err := os.Stat(s.blobPath(layer.String())); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the layer is in the store: %v", err)
			}
			if imgs, err := s.List(t.Context()); len(imgs) != 0 || err != nil {
				t.Errorf("%v, %v", imgs, err)
			}
			checkClean(t, s)
			r.body = nil
			img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{})
			if err != nil {
				t.Fatal(err)
			}
			checkSample(t, s, img, "one")
			checkPulls(t, s)
		})
	}
}

func TestPullOfOtherManifests(t *testing.T) {
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one"), "2": sampleImage(t, "two")})
	r.blobs[r.tags["1"]] = r.blobs[r.tags["2"]]
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); !errors.Is(err, ErrDigest) {
		t.Errorf("a manifest of another digest: %v", err)
	}
	r.tags["cycle"] = hashBytes([]byte("cycle"))
	r.blobs[r.tags["cycle"]] = []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:cycle"), r, PullOptions{}); !errors.Is(err, ErrDigest) {
		t.Errorf("an index of another digest: %v", err)
	}
	sub := r.index(t)
	for range maxIndexDepth + 2 {
		sub = r.index(t, sub)
	}
	r.tags["deep"] = sub.Digest
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:deep"), r, PullOptions{}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a deep index: %v", err)
	}
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:none"), r, PullOptions{}); !errors.Is(err, errNotThere) {
		t.Errorf("an unknown tag: %v", err)
	}
}

// cutter lets each answer bring so many bytes.
func cutter(n int64, ranges bool) func(v1.Hash, int64, []byte) (io.Reader, int64, error) {
	return func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
		start := offset
		if !ranges {
			start = 0
		}
		if b[0] == '{' {
			return bytes.NewReader(b), 0, nil
		}
		return io.MultiReader(bytes.NewReader(b[start:min(offset+n, int64(len(b)))]), endWith{io.ErrUnexpectedEOF}), start, nil
	}
}

type endWith struct{ err error }

func (e endWith) Read([]byte) (int, error) { return 0, e.err }

// A download that is cut off is gone on with: at once, as long as something comes, and by the next pull.
func TestPullIsGoneOnWith(t *testing.T) {
	for name, ranges := range map[string]bool{"with ranges": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				im := sampleImage(t, "one")
				last := hashBytes(im.packed[2])
				s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
				r.body = cutter(30000, ranges)
				img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{})
				if err != nil {
					t.Fatal(err)
				}
				checkSample(t, s, img, "one")
				if n := len(r.fetched[last]); n < 5 {
					t.Errorf("%d answers for %d bytes", n, len(im.packed[2]))
				}
				checkPulls(t, s)
			})
		})
	}
}

func TestPullGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		im := sampleImage(t, "one")
		last := hashBytes(im.packed[2])
		s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
		// The last layer comes to its middle, and no further.
		half := int64(len(im.packed[2]) / 2)
		r.body = func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
			if h == last {
				return io.MultiReader(bytes.NewReader(b[offset:max(offset, half)]), endWith{io.ErrUnexpectedEOF}), offset, nil
			}
			return bytes.NewReader(b[offset:]), offset, nil
		}
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); err == nil || !strings.Contains(err.Error(), "cut off") {
			t.Fatalf("error %v", err)
		}
		checkClean(t, s)
		r.body, r.fetched = nil, map[v1.Hash][]int64{}
		img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		checkSample(t, s, img, "one")
		// Two layers had come, and half of the third.
		if got := r.fetched[last]; !slices.Equal(got, []int64{half}) || r.requests() != 2 {
			t.Errorf("fetched again: %v", r.fetched)
		}
		checkPulls(t, s)
	})
}

// A download that does not move is taken for one that is cut off.
func TestPullStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		im := sampleImage(t, "one")
		s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
		first := true
		var pr *io.PipeReader
		r.body = func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
			if h == hashBytes(im.packed[2]) && first {
				first = false
				var pw *io.PipeWriter
				pr, pw = io.Pipe()
				go pw.Write(b[:1000])
				return closingReader{pr}, 0, nil
			}
			return bytes.NewReader(b[offset:]), offset, nil
		}
		var told string
		img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), closingRemote{r}, PullOptions{Progress: func(p Progress) {
			if p.Status == StatusRetrying {
				told = p.Error
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		checkSample(t, s, img, "one")
		if !strings.Contains(told, errStalled.Error()) {
			t.Errorf("told: %q", told)
		}
	})
}

// A configuration that does not come ends the pull.
func TestPullStallsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one")})
		r.body = func(_ v1.Hash, _ int64, b []byte) (io.Reader, int64, error) {
			pr, pw := io.Pipe()
			go pw.Write(b[:10])
			return closingReader{pr}, 0, nil
		}
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), closingRemote{r}, PullOptions{}); !errors.Is(err, errStalled) {
			t.Errorf("%v", err)
		}
		checkClean(t, s)
	})
}

type closingReader struct{ *io.PipeReader }

// closingRemote is a fakeRemote whose answers can be closed.
type closingRemote struct{ *fakeRemote }

func (r closingRemote) Blob(ctx context.Context, h v1.Hash, offset int64) (io.ReadCloser, int64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	body, start, err := r.body(h, offset, r.blobs[h])
	if c, ok := body.(closingReader); ok {
		return c, start, err
	}
	return io.NopCloser(body), start, err
}

// A layer that has been damaged in the store is fetched again.
func TestPullMendsTheStore(t *testing.T) {
	im := sampleImage(t, "one")
	for name, damage := range map[string]func(path string) error{
		"cut": func(path string) error { return os.Truncate(path, 10) },
		"changed": func(path string) error {
			b, err := os.ReadFile(path)
			if err == nil {
				b[len(b)/2] ^= 1
				err = errors.Join(os.Remove(path), os.WriteFile(path, b, 0o600))
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
			img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(damage(s.blobPath(hashBytes(im.packed[0]).String())), os.Remove(rootfsOf(t, s, img))); err != nil {
				t.Fatal(err)
			}
			if img, _, err = s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); err != nil {
				t.Fatal(err)
			}
			checkSample(t, s, img, "one")
			checkPulls(t, s)
		})
	}
}

// What earlier pulls have left of several layers may be wrong of all of them: one pull gets over that.
func TestPullOfWrongParts(t *testing.T) {
	im := sampleImage(t, "one")
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
	for _, l := range im.packed {
		if err := os.WriteFile(s.path("pull", hashBytes(l).Hex+".part"), []byte("wrong"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// The first is found to be wrong while the others still wait for more.
	r.body = func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
		if offset > 0 && h != hashBytes(im.packed[0]) {
			return endWith{io.ErrUnexpectedEOF}, offset, nil
		}
		return bytes.NewReader(b[offset:]), offset, nil
	}
	img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	checkSample(t, s, img, "one")
	checkPulls(t, s)
}

// A pull that fails takes nothing away from images that are there, and what an earlier one left and was damaged does not fail a next.
func TestPullThatFails(t *testing.T) {
	one, two := sampleImage(t, "one"), sampleImage(t, "two")
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": one, "2": two})
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	gone := r.blobs[hashBytes(two.packed[2])]
	delete(r.blobs, hashBytes(two.packed[2]))
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:2"), r, PullOptions{}); !errors.Is(err, errNotThere) {
		t.Fatalf("error %v", err)
	}
	if b, err := os.ReadFile(s.blobPath(hashBytes(one.packed[0]).String())); err != nil || hashBytes(b) != hashBytes(one.packed[0]) {
		t.Errorf("the layer that both have: %v", err)
	}
	if n := len(r.fetched[hashBytes(one.packed[0])]); n != 1 {
		t.Errorf("it was fetched %d times", n)
	}
	r.blobs[hashBytes(two.packed[2])] = gone
	// Half of it is there, and not what it should be; or more of it than there is.
	part := s.path("pull", hashBytes(gone).Hex+".part")
	for name, left := range map[string][]byte{"other bytes": make([]byte, len(gone)/2), "more": append(bytes.Clone(gone), "more"...)} {
		if err := os.WriteFile(part, left, 0o600); err != nil {
			t.Fatal(err)
		}
		img, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:2"), r, PullOptions{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		checkSample(t, s, img, "two")
		if _, err := s.Remove(t.Context(), img.ID, nil); err != nil {
			t.Fatal(err)
		}
	}
	checkPulls(t, s)
}

// What a manifest says of the sizes of its layers is believed only within the limits.
func TestPullOfHugeLayers(t *testing.T) {
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one")})
	for _, size := range []int64{-1, defaultBytes, 1 << 62} {
		m, err := parseManifest(r.blobs[r.tags["1"]])
		if err != nil {
			t.Fatal(err)
		}
		m.Layers[0].Size, m.Layers[1].Size = size, size
		b := toJSON(t, m)
		r.blobs[hashBytes(b)], r.tags["huge"] = b, hashBytes(b)
		before := r.requests()
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:huge"), r, PullOptions{}); err == nil {
			t.Fatal("it was taken")
		}
		if n := r.requests() - before; n > 1 { // the configuration
			t.Errorf("%d blobs were asked for", n)
		}
	}
}

// Any number of processes may pull at once: nothing is fetched twice.
func TestPullTogether(t *testing.T) {
	one, two := sampleImage(t, "one"), sampleImage(t, "two")
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": one, "2": two})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			mine, err := Open(s.dir, nil) // as another process has it
			if err == nil {
				_, _, err = mine.Pull(t.Context(), mustName(t, fmt.Sprintf("h.example/app:%d", 1+i%2)), r, PullOptions{})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for h, offsets := range r.fetched {
		if len(offsets) != 1 {
			t.Errorf("blob %s was fetched %d times", h, len(offsets))
		}
	}
	for i, cmd := range []string{"one", "two"} {
		img, err := s.Resolve(t.Context(), fmt.Sprintf("h.example/app:%d", i+1))
		if err != nil {
			t.Fatal(err)
		}
		checkSample(t, s, img, cmd)
	}
	checkPulls(t, s)
}

// Who gives up, or has a bomb, leaves nothing that anybody waits for.
func TestPullIsCutShort(t *testing.T) {
	im := sampleImage(t, "one")
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": im})
	ctx, cancel := context.WithCancel(t.Context())
	r.body = func(h v1.Hash, offset int64, b []byte) (io.Reader, int64, error) {
		if b[0] != '{' {
			cancel()
			return endWith{ctx.Err()}, offset, nil
		}
		return bytes.NewReader(b), 0, nil
	}
	if _, _, err := s.Pull(ctx, mustName(t, "h.example/app:1"), r, PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	r.body = nil
	if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:1"), r, PullOptions{Limits: Limits{Bytes: 1000}}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a bomb: %v", err)
	}
	checkClean(t, s)
	if _, err := s.Prune(t.Context(), true, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"pull", "tmp", "rootfs", "blobs"} {
		if n := countFiles(s.path(d)); n > 0 {
			t.Errorf("%d files are left in %s", n, d)
		}
	}
}

func TestSave(t *testing.T) {
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": sampleImage(t, "one"), "2": sampleImage(t, "two")})
	for _, tag := range []string{"1", "2"} {
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:"+tag), r, PullOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Tag(t.Context(), "h.example/app:1", "mine:1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Tag(t.Context(), "none", "mine:2"); !errors.Is(err, ErrNotFound) {
		t.Errorf("tag of no image: %v", err)
	}
	var b bytes.Buffer
	if err := s.Save(t.Context(), &b, "mine:1", "h.example/app:2"); err != nil {
		t.Fatal(err)
	}
	path := asFile(t, b.Bytes())
	for name, drop := range map[string]string{"both": "", "docker": fileIndex, "oci": fileManifest} {
		t.Run(name, func(t *testing.T) {
			files := map[string][]byte{}
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			a, err := readArchive(t.Context(), f, &budget{1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			for member := range a.members {
				if b, err := readFile(a, member, 1<<20); err == nil && member != drop {
					files[member] = b
				}
			}
			other := newStore(t)
			imgs, err := other.Load(t.Context(), Source{Path: asDir(t, files)}, Options{})
			if err != nil || len(imgs) != 2 {
				t.Fatal(len(imgs), err)
			}
			for name, cmd := range map[string]string{"mine:1": "one", "h.example/app:2": "two"} {
				img, err := other.Resolve(t.Context(), name)
				if err != nil {
					t.Fatal(err)
				}
				checkSample(t, other, img, cmd)
				if was, err := s.Resolve(t.Context(), name); err != nil || was.Manifest != img.Manifest && drop != fileIndex {
					t.Errorf("%s: manifest %s was %s", name, img.Manifest, was.Manifest)
				}
			}
			if _, err := other.Resolve(t.Context(), "h.example/app:1"); !errors.Is(err, ErrNotFound) {
				t.Errorf("a name that was not asked for: %v", err)
			}
		})
	}
	if err := s.Save(t.Context(), io.Discard, "none"); !errors.Is(err, ErrNotFound) {
		t.Errorf("save of no image: %v", err)
	}
	if left, _ := filepath.Glob(s.path("tmp", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
