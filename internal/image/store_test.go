package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("COFFER_TEST_LOAD_INTO"); dir != "" {
		// This process is one that TestLoadKilled kills.
		s, err := Open(dir, nil)
		if err == nil {
			_, err = s.Load(background(), Source{Path: os.Getenv("COFFER_TEST_LOAD_FROM")}, Options{})
		}
		if err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// background is the context of the helper process, which has no test.
func background() context.Context { return context.Background() }

func newStore(t *testing.T) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "images"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func gz(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func half(b []byte) []byte { return b[:len(b)/2] }

func zst(b []byte) []byte {
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer enc.Close()
	return enc.EncodeAll(b, nil)
}

func toJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testImage is an image to be written in several formats.
type testImage struct {
	layers [][]byte // plain
	packed [][]byte
	arch   string
	cmd    string
}

func (im testImage) config() v1.ConfigFile {
	c := v1.ConfigFile{OS: "linux", Architecture: im.arch, Config: v1.Config{Cmd: []string{im.cmd}}, RootFS: v1.RootFS{Type: "layers"}}
	if c.Architecture == "" {
		c.Architecture = runtime.GOARCH
	}
	for _, l := range im.layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, hashBytes(l))
	}
	return c
}

func sampleImage(t testing.TB, cmd string) testImage {
	a := layerTar(t, ent{name: "etc/name", body: "lower"}, ent{name: "gone", body: "x"}, ent{name: "bin/ping", mode: 0o755, body: "p", xattrs: map[string]string{"user.k": "v"}})
	b := layerTar(t, ent{name: ".wh.gone"}, ent{name: "etc/name", body: "upper " + cmd})
	c := layerTar(t, ent{name: "data", body: strings.Repeat(cmd, 100000)})
	return testImage{layers: [][]byte{a, b, c}, packed: [][]byte{gz(a), zst(b), c}, cmd: cmd}
}

// writeOCI adds the blobs of an image and returns its descriptor.
func writeOCI(t testing.TB, files map[string][]byte, im testImage) v1.Descriptor {
	t.Helper()
	put := func(b []byte, mt types.MediaType) v1.Descriptor {
		h := hashBytes(b)
		files[blobName(h)] = b
		return v1.Descriptor{MediaType: mt, Digest: h, Size: int64(len(b))}
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: put(toJSON(t, im.config()), types.OCIConfigJSON)}
	for i, l := range im.packed {
		m.Layers = append(m.Layers, put(l, []types.MediaType{types.OCILayer, types.OCILayerZStd, types.OCIUncompressedLayer}[i%3]))
	}
	return put(toJSON(t, m), types.OCIManifestSchema1)
}

func ociFiles(t testing.TB, im testImage, name string) map[string][]byte {
	files := map[string][]byte{"oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)}
	d := writeOCI(t, files, im)
	d.Annotations = map[string]string{annotationRef: name}
	files[fileIndex] = toJSON(t, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{d}})
	return files
}

func dockerFiles(t testing.TB, images map[string]testImage) map[string][]byte {
	files := map[string][]byte{}
	var list []dockerManifest
	for _, name := range sortedKeys(images) {
		im := images[name]
		conf := toJSON(t, im.config())
		m := dockerManifest{Config: hashBytes(conf).Hex + ".json", RepoTags: strings.Split(name, " ")}
		files[m.Config] = conf
		for _, l := range im.layers {
			p := hashBytes(l).Hex + "/layer.tar"
			files[p] = l
			m.Layers = append(m.Layers, p)
		}
		list = append(list, m)
	}
	files[fileManifest] = toJSON(t, list)
	return files
}

func asDir(t testing.TB, files map[string][]byte) string {
	dir := t.TempDir()
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func asTar(t testing.TB, files map[string][]byte) []byte {
	var ents []ent
	for _, name := range sortedKeys(files) {
		ents = append(ents, ent{name: name, body: string(files[name])})
	}
	return layerTar(t, ents...)
}

func asFile(t testing.TB, b []byte) string {
	p := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(p, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func allExtras(s *Store, img Image) ([]Extra, error) {
	var all []Extra
	for x, err := range s.Extras(img) {
		if err != nil {
			return nil, err
		}
		all = append(all, x)
	}
	return all, nil
}

func checkSample(t *testing.T, s *Store, img Image, cmd string) {
	t.Helper()
	files := readGvisor(t, rootfsOf(t, s, img))
	if _, ok := files["gone"]; ok {
		t.Error("a file that was whited out is there")
	}
	if want := sum([]byte("upper " + cmd)); files["etc/name"].Sum != want {
		t.Errorf("etc/name: %+v", files["etc/name"])
	}
	if files["data"].Size != int64(len(cmd)*100000) {
		t.Errorf("data: %+v", files["data"])
	}
	if diff := cmp.Diff([]string{cmd}, img.Config.Config.Cmd); diff != "" {
		t.Error(diff)
	}
	xs, err := allExtras(s, img)
	if err != nil || len(xs) != 1 || string(xs[0].Path) != "/bin/ping" || string(xs[0].Xattrs[0].Value) != "v" {
		t.Errorf("attributes: %+v, %v", xs, err)
	}
	m, err := s.manifest(&entry{ID: img.ID, Manifest: img.Manifest})
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range m.Layers {
		b := mustRead(t, s.blobPath(l.Digest.String()))
		if hashBytes(b) != l.Digest || int64(len(b)) != l.Size {
			t.Errorf("blob of layer %d does not match the manifest", i+1)
		}
	}
}

func TestLoadFormats(t *testing.T) {
	im := sampleImage(t, "one")
	two := sampleImage(t, "two")
	oci := ociFiles(t, im, "example.com/a/one:v1")
	docker := dockerFiles(t, map[string]testImage{"one:v1 one:latest": im, "reg.example:5000/two:v2": two})
	for name, tc := range map[string]struct {
		src   Source
		names [][]string
	}{
		"OCI layout":               {Source{Path: asDir(t, oci)}, [][]string{{"example.com/a/one:v1"}}},
		"OCI tar":                  {Source{Path: asFile(t, asTar(t, oci))}, [][]string{{"example.com/a/one:v1"}}},
		"OCI tar.gz":               {Source{Path: asFile(t, gz(asTar(t, oci)))}, [][]string{{"example.com/a/one:v1"}}},
		"docker archive":           {Source{Path: asFile(t, asTar(t, docker))}, [][]string{{"one:latest", "one:v1"}, {"reg.example:5000/two:v2"}}},
		"docker archive, zstd":     {Source{Path: asFile(t, zst(asTar(t, docker)))}, [][]string{{"one:latest", "one:v1"}, {"reg.example:5000/two:v2"}}},
		"docker archive, stream":   {Source{Reader: bytes.NewReader(asTar(t, docker))}, [][]string{{"one:latest", "one:v1"}, {"reg.example:5000/two:v2"}}},
		"docker archive, unpacked": {Source{Path: asDir(t, docker)}, [][]string{{"one:latest", "one:v1"}, {"reg.example:5000/two:v2"}}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			imgs, err := s.Load(t.Context(), tc.src, Options{})
			if err != nil {
				t.Fatal(err)
			}
			var names [][]string
			for i, img := range imgs {
				names = append(names, img.Names)
				checkSample(t, s, img, []string{"one", "two"}[i])
				if got, err := s.Resolve(t.Context(), img.Names[0]); err != nil || got.ID != img.ID {
					t.Errorf("resolve %s: %v, %v", img.Names[0], got.ID, err)
				}
			}
			if diff := cmp.Diff(tc.names, names); diff != "" {
				t.Error(diff)
			}
			checkClean(t, s)
		})
	}
}

// checkClean looks for what a load must not leave.
func checkClean(t *testing.T, s *Store) {
	t.Helper()
	if left, err := os.ReadDir(s.path("tmp")); err != nil || len(left) > 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

func TestSameLayersSameRootfs(t *testing.T) {
	s := newStore(t)
	im := sampleImage(t, "one")
	first, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, im, "x:1"))}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := mustRead(t, rootfsOf(t, s, first[0]))
	im.cmd = "other"
	second, err := s.Load(t.Context(), Source{Path: asFile(t, asTar(t, dockerFiles(t, map[string]testImage{"x:1": im})))}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if first[0].ID == second[0].ID || first[0].RootfsID != second[0].RootfsID || first[0].Size != second[0].Size {
		t.Errorf("%+v\n%+v", first[0], second[0])
	}
	if !bytes.Equal(before, mustRead(t, rootfsOf(t, s, second[0]))) {
		t.Error("the root file system changed")
	}
	// The name moved; the first image lost it, and goes with a prune. What they share stays.
	if got, err := s.Resolve(t.Context(), "x:1"); err != nil || got.ID != second[0].ID {
		t.Errorf("x:1 is %s, %v", got.ID, err)
	}
	res, err := s.Prune(t.Context(), false, nil, nil)
	if err != nil || len(res.Deleted) != 1 || res.Deleted[0] != first[0].ID {
		t.Errorf("prune: %+v, %v", res, err)
	}
	if !exists(rootfsOf(t, s, second[0])) {
		t.Error("prune took a root file system in use")
	}
}

// One file of a root is all there is when a load was killed between the two, or a removal is at work: the root is not taken as known.
func TestHalfARootfs(t *testing.T) {
	for name, lost := range map[string]func(*Store, string) string{"attributes": (*Store).extraPath, "files": (*Store).rootfsPath} {
		for _, again := range []string{"one", "another of its layers"} {
			t.Run(name+" lost, then "+again, func(t *testing.T) {
				s := newStore(t)
				im := sampleImage(t, "one")
				imgs, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, im, "x:1"))}, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(lost(s, imgs[0].RootfsID)); err != nil {
					t.Fatal(err)
				}
				if _, err := allExtras(s, imgs[0]); err == nil && name == "attributes" {
					t.Error("lost attributes are taken for none")
				}
				im.cmd = again
				if imgs, err = s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, im, "x:1"))}, Options{}); err != nil {
					t.Fatal(err)
				}
				if xs, err := allExtras(s, imgs[0]); err != nil || len(xs) != 1 || string(xs[0].Path) != "/bin/ping" {
					t.Errorf("attributes: %+v, %v", xs, err)
				}
				if files := readGvisor(t, rootfsOf(t, s, imgs[0])); files["data"].Size != 300000 {
					t.Errorf("%+v", files)
				}
			})
		}
	}
}

// What an older program made of an image is made anew when the image is loaded.
func TestRootfsOfAnotherVersion(t *testing.T) {
	s := newStore(t)
	path := asDir(t, ociFiles(t, sampleImage(t, "one"), "x:1"))
	imgs, err := s.Load(t.Context(), Source{Path: path}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	now := imgs[0].RootfsID
	old := strings.Repeat("0", 64)
	index := bytes.ReplaceAll(mustRead(t, s.path("index.json")), []byte(now), []byte(old))
	if err := errors.Join(os.WriteFile(s.path("index.json"), index, 0o600), os.Rename(s.rootfsPath(now), s.rootfsPath(old)),
		os.Rename(s.extraPath(now), s.extraPath(old))); err != nil {
		t.Fatal(err)
	}
	if imgs, err = s.Load(t.Context(), Source{Path: path}, Options{}); err != nil || imgs[0].RootfsID != now {
		t.Fatalf("%+v, %v", imgs, err)
	}
	checkSample(t, s, imgs[0], "one")
	// Imported ones, too, are known by their layers.
	img, err := s.Import(t.Context(), Source{Reader: bytes.NewReader(layerTar(t, ent{name: "a"}))}, "y", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := s.haveAll(stageOf(t, s), img.ID); !ok {
		t.Error("an imported image is not known again")
	}
}

func TestNoExtras(t *testing.T) {
	s := newStore(t)
	img, err := s.Import(t.Context(), Source{Reader: bytes.NewReader(layerTar(t, ent{name: "a"}))}, "x", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if xs, err := allExtras(s, img); err != nil || len(xs) != 0 {
		t.Errorf("%v, %v", xs, err)
	}
}

func TestBadSources(t *testing.T) {
	im := sampleImage(t, "one")
	change := func(files map[string][]byte, name string, b []byte) map[string][]byte {
		for n := range files {
			if strings.Contains(n, name) {
				if b == nil {
					delete(files, n)
				} else {
					files[n] = b
				}
			}
		}
		return files
	}
	foreign := im
	foreign.arch = "s390x"
	other := sampleImage(t, "other")
	swapped := ociFiles(t, im, "x:1")
	swapped[blobName(hashBytes(im.packed[0]))] = gz(other.layers[2])
	wrongDiff := im
	wrongDiff.packed = [][]byte{im.packed[0], im.packed[1], other.layers[2]}
	loop := map[string][]byte{}
	self := v1.Hash{Algorithm: "sha256", Hex: strings.Repeat("a", 64)}
	loop[fileIndex] = toJSON(t, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{{MediaType: types.OCIImageIndex, Digest: self}}})
	loop[blobName(self)] = loop[fileIndex]
	fifoDir := asDir(t, map[string][]byte{"x": nil})
	linkDir := asDir(t, change(ociFiles(t, im, "x:1"), hashBytes(im.packed[0]).Hex, nil))
	if err := os.Symlink(asFile(t, im.packed[0]), filepath.Join(linkDir, blobName(hashBytes(im.packed[0])))); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		src  Source
		want string
	}{
		"missing":            {Source{Path: "/nonexistent"}, "no such file"},
		"text":               {Source{Path: asFile(t, []byte(strings.Repeat("hello ", 200)))}, "no tar archive"},
		"empty file":         {Source{Path: asFile(t, nil)}, "neither"},
		"directory":          {Source{Path: fifoDir}, "import"},
		"root file system":   {Source{Path: asFile(t, im.layers[0])}, "import"},
		"changed blob":       {Source{Path: asDir(t, swapped)}, "content does not match its digest"},
		"changed config":     {Source{Path: asDir(t, change(dockerFiles(t, map[string]testImage{"x:1": im}), ".json", []byte("{}")))}, ""},
		"wrong diff id":      {Source{Path: asDir(t, ociFiles(t, wrongDiff, "x:1"))}, "the configuration says"},
		"missing layer":      {Source{Path: asFile(t, asTar(t, change(dockerFiles(t, map[string]testImage{"x:1": im}), "layer.tar", nil)))}, "not in the archive"},
		"other platform":     {Source{Path: asDir(t, ociFiles(t, foreign, "x:1"))}, "linux/s390x"},
		"bad JSON":           {Source{Path: asDir(t, map[string][]byte{fileIndex: []byte("{")})}, "not an image"},
		"no manifests":       {Source{Path: asDir(t, map[string][]byte{fileIndex: []byte("{}")})}, "lists no image"},
		"path for a digest":  {Source{Path: asDir(t, map[string][]byte{fileIndex: []byte(`{"manifests":[{"digest":"sha256:../../../etc/passwd"}]}`)})}, "not an image"},
		"index of itself":    {Source{Path: asDir(t, loop)}, "digest"},
		"link out of layout": {Source{Path: linkDir}, "layer 1"},
		"bad tag":            {Source{Path: asDir(t, dockerFiles(t, map[string]testImage{"X Y": im}))}, "lower case"},
		"truncated gzip":     {Source{Path: asFile(t, half(gz(asTar(t, ociFiles(t, im, "x:1")))))}, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Load(t.Context(), tc.src, Options{})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
			checkClean(t, s)
			if imgs, err := s.List(t.Context()); err != nil || len(imgs) > 0 {
				t.Errorf("images after a failed load: %v, %v", imgs, err)
			}
		})
	}
}

func TestMultiArch(t *testing.T) {
	here, there := sampleImage(t, "here"), sampleImage(t, "there")
	there.arch = "s390x"
	files := map[string][]byte{}
	d1, d2 := writeOCI(t, files, there), writeOCI(t, files, here)
	d1.Platform = &v1.Platform{OS: "linux", Architecture: "s390x"}
	d2.Platform = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	proof := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: d1.Digest, Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"}}
	write := func(ds ...v1.Descriptor) string {
		sub := toJSON(t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: ds})
		files[blobName(hashBytes(sub))] = sub
		files[fileIndex] = toJSON(t, v1.IndexManifest{SchemaVersion: 2, Manifests: []v1.Descriptor{{MediaType: types.OCIImageIndex, Digest: hashBytes(sub),
			Annotations: map[string]string{annotationName: "docker.io/library/multi:1"}}}})
		return asDir(t, files)
	}
	s := newStore(t)
	imgs, err := s.Load(t.Context(), Source{Path: write(d1, d2, proof)}, Options{})
	if err != nil || len(imgs) != 1 || imgs[0].Names[0] != "multi:1" {
		t.Fatalf("%+v, %v", imgs, err)
	}
	checkSample(t, s, imgs[0], "here")
	if _, err := s.Load(t.Context(), Source{Path: write(d1)}, Options{}); err == nil || !strings.Contains(err.Error(), "linux/s390x") {
		t.Errorf("got %v, want the platforms that there are", err)
	}
}

// `docker save` of two tags of one image for several platforms names one index twice.
func TestTwoNamesOfOneIndex(t *testing.T) {
	files := map[string][]byte{}
	d := writeOCI(t, files, sampleImage(t, "here"))
	d.Platform = &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	sub := toJSON(t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{d}})
	files[blobName(hashBytes(sub))] = sub
	top := v1.IndexManifest{SchemaVersion: 2}
	for _, name := range []string{"multi:1", "multi:latest"} {
		top.Manifests = append(top.Manifests, v1.Descriptor{MediaType: types.OCIImageIndex, Digest: hashBytes(sub), Annotations: map[string]string{annotationName: name}})
	}
	files[fileIndex] = toJSON(t, top)
	s := newStore(t)
	imgs, err := s.Load(t.Context(), Source{Path: asDir(t, files)}, Options{})
	if err != nil || len(imgs) != 1 || cmp.Diff([]string{"multi:1", "multi:latest"}, imgs[0].Names) != "" {
		t.Fatalf("%+v, %v", imgs, err)
	}
	// Indexes that hold the next one many times over would be read without an end.
	for range maxIndexDepth {
		next := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
		for range 100 {
			next.Manifests = append(next.Manifests, v1.Descriptor{MediaType: types.OCIImageIndex, Digest: hashBytes(sub)})
		}
		sub = toJSON(t, next)
		files[blobName(hashBytes(sub))] = sub
	}
	files[fileIndex] = sub
	if _, err := s.Load(t.Context(), Source{Path: asDir(t, files)}, Options{}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a hundred to the power of eight indexes: %v", err)
	}
}

// What is no image keeps no image from being loaded, and is told of where there is nothing else.
func TestArtifacts(t *testing.T) {
	for name, change := range map[string]func(*v1.Manifest){
		"list of parts": func(m *v1.Manifest) {
			m.ArtifactType, m.Config.MediaType = "application/spdx+json", "application/vnd.oci.empty.v1+json"
		},
		"own word":              func(m *v1.Manifest) { m.ArtifactType = "application/x.own" },
		"foreign configuration": func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" },
		"signature": func(m *v1.Manifest) {
			m.Layers = m.Layers[:1]
			m.Layers[0].MediaType = "application/vnd.dev.cosign.simplesigning.v1+json"
		},
	} {
		t.Run(name, func(t *testing.T) {
			files := ociFiles(t, sampleImage(t, "one"), "one:1")
			var idx v1.IndexManifest
			if err := json.Unmarshal(files[fileIndex], &idx); err != nil {
				t.Fatal(err)
			}
			var m v1.Manifest
			if err := json.Unmarshal(files[blobName(idx.Manifests[0].Digest)], &m); err != nil {
				t.Fatal(err)
			}
			change(&m)
			b := toJSON(t, m)
			files[blobName(hashBytes(b))] = b
			other := v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: hashBytes(b), Annotations: map[string]string{annotationRef: "sha256-12.sig"}}
			idx.Manifests = []v1.Descriptor{other, idx.Manifests[0], other}
			files[fileIndex] = toJSON(t, idx)
			s := newStore(t)
			imgs, err := s.Load(t.Context(), Source{Path: asDir(t, files)}, Options{})
			if err != nil || len(imgs) != 1 || len(imgs[0].Names) != 1 {
				t.Fatalf("%+v, %v", imgs, err)
			}
			checkSample(t, s, imgs[0], "one")
			idx.Manifests = []v1.Descriptor{other}
			files[fileIndex] = toJSON(t, idx)
			if _, err := s.Load(t.Context(), Source{Path: asDir(t, files)}, Options{}); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "artifact of type") {
				t.Errorf("nothing else: %v", err)
			}
		})
	}
}

func TestImport(t *testing.T) {
	layer := layerTar(t, ent{name: "bin/sh", mode: 0o4755, body: "sh", uid: 7}, ent{name: "l", typ: tar.TypeSymlink, link: "/etc/passwd"})
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "bin"), 0o755), os.WriteFile(filepath.Join(dir, "bin/sh"), []byte("sh"), 0o755),
		os.Link(filepath.Join(dir, "bin/sh"), filepath.Join(dir, "sh2")), os.Symlink("/etc/passwd", filepath.Join(dir, "l"))); err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]Source{
		"tar": {Path: asFile(t, layer)}, "tar.gz": {Path: asFile(t, gz(layer))}, "tar.zst": {Path: asFile(t, zst(layer))}, "stream": {Reader: bytes.NewReader(layer)}, "directory": {Path: dir},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			conf, err := NewConfig([]string{`CMD ["/bin/sh","-l"]`, "ENV A=1", "WORKDIR /x", `LABEL k="v w"`})
			if err != nil {
				t.Fatal(err)
			}
			img, err := s.Import(t.Context(), src, "mine", Options{Config: conf})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]string{"mine:latest"}, img.Names); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(v1.Config{Cmd: []string{"/bin/sh", "-l"}, Env: []string{"A=1"}, WorkingDir: "/x", Labels: map[string]string{"k": "v w"}}, img.Config.Config.Config); diff != "" {
				t.Error(diff)
			}
			files := readGvisor(t, rootfsOf(t, s, img))
			if files["bin/sh"].Size != 2 || files["l"].Target != "/etc/passwd" || files["l"].Mode != lnk|0o777 {
				t.Errorf("%+v", files)
			}
			if name == "directory" && files["sh2"].Nlink != 2 {
				t.Errorf("hard link: %+v", files["sh2"])
			}
			checkClean(t, s)
		})
	}
	s := newStore(t)
	if _, err := s.Import(t.Context(), Source{Path: asFile(t, asTar(t, ociFiles(t, sampleImage(t, "x"), "x:1")))}, "x", Options{}); err == nil || !strings.Contains(err.Error(), "load") {
		t.Errorf("an archive of images is imported as a root file system: %v", err)
	}
	if _, err := s.Import(t.Context(), Source{Reader: strings.NewReader("")}, "x", Options{}); !errors.Is(err, ErrFormat) {
		t.Errorf("nothing is imported: %v", err)
	}
}

// The layer of a directory depends on what is in it and on nothing else, and names may be any bytes.
func TestImportDirectory(t *testing.T) {
	var ids []string
	var imgs []Image
	s := newStore(t)
	for range 2 {
		dir := t.TempDir()
		sub := filepath.Join(dir, "\xff\xfe dir")
		if err := errors.Join(os.Mkdir(sub, 0o755), os.WriteFile(filepath.Join(sub, "\xc0"), []byte("x"), 0o644),
			os.Symlink("\xc1", filepath.Join(sub, "z")), os.Link(filepath.Join(sub, "\xc0"), filepath.Join(sub, "a"))); err != nil {
			t.Fatal(err)
		}
		old := time.Unix(1e9, 5)
		for _, p := range []string{filepath.Join(sub, "\xc0"), sub, dir} {
			// Each tree has a time of access of its own; the time of change is the present one.
			if err := os.Chtimes(p, time.Unix(1e9+int64(len(ids)), 0), old); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Lutimes(filepath.Join(sub, "z"), []unix.Timeval{{Sec: 1e9 + int64(len(ids))}, {Sec: 1e9}}); err != nil {
			t.Fatal(err)
		}
		img, err := s.Import(t.Context(), Source{Path: dir}, "x", Options{})
		if err != nil {
			t.Fatal(err)
		}
		ids, imgs = append(ids, img.RootfsID), append(imgs, img)
	}
	if ids[0] != ids[1] {
		t.Errorf("one tree gave two root file systems: %v", ids)
	}
	files := readGvisor(t, rootfsOf(t, s, imgs[0]))
	if f := files["\xff\xfe dir/\xc0"]; f.Size != 1 || f.Nlink != 2 || f.Mtime != 1e9 || files["\xff\xfe dir/z"].Target != "\xc1" {
		t.Errorf("%+v", files)
	}
}

// What a layer is stored as is what its manifest says, however it came.
func TestImportCompressions(t *testing.T) {
	layer := layerTar(t, ent{name: "a", body: "x"})
	packed := map[string][]byte{"": layer, "gzip": gz(layer), "zstd": zst(layer)}
	if bin, err := exec.LookPath("bzip2"); err != nil {
		t.Log("bzip2 is not installed: what it makes is not imported")
	} else {
		c := exec.Command(bin, "-c")
		c.Stdin = bytes.NewReader(layer)
		if packed["bzip2"], err = c.Output(); err != nil {
			t.Fatal(err)
		}
	}
	for kind, b := range packed {
		s := newStore(t)
		img, err := s.Import(t.Context(), Source{Path: asFile(t, b)}, "x", Options{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := s.manifest(&entry{ID: img.ID, Manifest: img.Manifest})
		if err != nil {
			t.Fatal(err)
		}
		desc := m.Layers[0]
		blob := mustRead(t, s.blobPath(desc.Digest.String()))
		got, err := compressionOf(bufio.NewReader(bytes.NewReader(blob)))
		want := map[types.MediaType]string{types.OCILayer: "gzip", types.OCILayerZStd: "zstd"}[desc.MediaType]
		if err != nil || got != want || hashBytes(blob) != desc.Digest || int64(len(blob)) != desc.Size {
			t.Errorf("%q: a blob of %q is stored as %s, %v", kind, got, desc.MediaType, err)
		}
		if kind == "gzip" && !bytes.Equal(blob, b) {
			t.Error("a layer that could be kept was packed anew")
		}
	}
}

func TestEnsureBase(t *testing.T) {
	s := newStore(t)
	opened := 0
	open := func(body string) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) {
			opened++
			return io.NopCloser(bytes.NewReader(layerTar(t, ent{name: "bin/sh", body: body}))), nil
		}
	}
	first, err := s.EnsureBase(t.Context(), "sha256:1", open("a"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.EnsureBase(t.Context(), "sha256:1", open("a"))
	if err != nil || opened != 1 || again.ID != first.ID {
		t.Errorf("opened %d times, %v", opened, err)
	}
	if err := os.Remove(s.extraPath(first.RootfsID)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.EnsureBase(t.Context(), "sha256:1", open("a")); err != nil || opened != 2 {
		t.Errorf("half of it is lost: opened %d times, %v", opened, err)
	}
	if err := os.Remove(s.blobPath(first.ID)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.EnsureBase(t.Context(), "sha256:1", open("a")); err != nil || opened != 3 {
		t.Errorf("its configuration is lost: opened %d times, %v", opened, err)
	}
	newer, err := s.EnsureBase(t.Context(), "sha256:2", open("b"))
	if err != nil || newer.ID == first.ID {
		t.Errorf("%v, %v", newer.ID, err)
	}
	if got, err := s.Resolve(t.Context(), "base"); err != nil || got.ID != newer.ID {
		t.Errorf("base is %v, %v", got.ID, err)
	}
	if old, err := s.Resolve(t.Context(), first.ID); err != nil || len(old.Names) > 0 {
		t.Errorf("the older one, which boxes may use: %+v, %v", old.Names, err)
	}
}

func TestRemove(t *testing.T) {
	s := newStore(t)
	imgs, err := s.Load(t.Context(), Source{Path: asDir(t, dockerFiles(t, map[string]testImage{"a:1 b:1": sampleImage(t, "x")}))}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	id := imgs[0].ID
	boxes := func(context.Context) (Needs, error) { return Needs{Images: map[string][]string{id: {"box"}}}, nil }
	res, err := s.Remove(t.Context(), "b:1", boxes)
	if err != nil || cmp.Diff(Removed{Untagged: []string{"b:1"}}, res) != "" {
		t.Errorf("%+v, %v", res, err)
	}
	var inUse *InUseError
	if _, err := s.Remove(t.Context(), "a:1", boxes); !errors.As(err, &inUse) || inUse.Boxes[0] != "box" {
		t.Errorf("in use: %v", err)
	}
	if _, err := s.Remove(t.Context(), "nosuch", nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: %v", err)
	}
	res, err = s.Remove(t.Context(), ShortID(id), nil)
	if err != nil || len(res.Deleted) != 1 || res.Freed == 0 {
		t.Errorf("%+v, %v", res, err)
	}
	for _, d := range []string{"blobs/sha256", "rootfs"} {
		if left, err := os.ReadDir(s.path(d)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", d, left, err)
		}
	}
}

// A box needs its root also when the index was lost and knows no image of it; one that does not say which it needs may need any.
func TestRemoveKeepsRootsOfBoxes(t *testing.T) {
	for name, needs := range map[string]func(root string) Needs{
		"a box of a lost image":     func(root string) Needs { return Needs{Rootfs: []string{root}} },
		"a box of a damaged record": func(string) Needs { return Needs{Unknown: true} },
		"no box":                    func(string) Needs { return Needs{} },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			lost, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, sampleImage(t, "lost"), "lost:1"))}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(s.path("index.json")); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, sampleImage(t, "other"), "other:1"))}, Options{}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Remove(t.Context(), "other:1", func(context.Context) (Needs, error) { return needs(lost[0].RootfsID), nil }); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{s.rootfsPath(lost[0].RootfsID), s.extraPath(lost[0].RootfsID)} {
				if exists(path) != (name != "no box") {
					t.Errorf("%s is there: %v", path, exists(path))
				}
			}
		})
	}
	s := newStore(t)
	failed := errors.New("no answer")
	for _, remove := range []func(NeedsFunc) (Removed, error){
		func(f NeedsFunc) (Removed, error) { return s.Remove(t.Context(), "x:1", f) },
		func(f NeedsFunc) (Removed, error) { return s.Prune(t.Context(), true, nil, f) },
	} {
		if _, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, sampleImage(t, "x"), "x:1"))}, Options{}); err != nil {
			t.Fatal(err)
		}
		if _, err := remove(func(context.Context) (Needs, error) { return Needs{}, failed }); !errors.Is(err, failed) {
			t.Errorf("nobody knows what boxes need: %v", err)
		}
		if _, err := s.Resolve(t.Context(), "x:1"); err != nil {
			t.Error(err)
		}
	}
}

func TestConfirm(t *testing.T) {
	s := newStore(t)
	img, err := s.Import(t.Context(), Source{Reader: bytes.NewReader(layerTar(t, ent{name: "a"}))}, "x", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Confirm(t.Context(), img); err != nil {
		t.Errorf("it is there: %v", err)
	}
	if _, err := s.Remove(t.Context(), "x", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Confirm(t.Context(), img); !errors.Is(err, ErrNotFound) {
		t.Errorf("it is gone: %v", err)
	}
}

// What a killed load and a killed writer of the index left is given back, and counted.
func TestPruneCounts(t *testing.T) {
	s := newStore(t)
	kept, err := s.Import(t.Context(), Source{Reader: bytes.NewReader(layerTar(t, ent{name: "a"}))}, "x", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(s.path("tmp", "load-dead"), 0o700), os.WriteFile(s.path("tmp", "load-dead", "part-1"), make([]byte, 1<<20), 0o600),
		os.Link(rootfsOf(t, s, kept), s.path("tmp", "load-dead", "rootfs_x")), os.WriteFile(s.path(".index.json-1"), make([]byte, 64<<10), 0o600),
		os.WriteFile(s.blobPath("sha256:00"), make([]byte, 128<<10), 0o600)); err != nil {
		t.Fatal(err)
	}
	res, err := s.Prune(t.Context(), false, nil, nil)
	if err != nil || res.Freed < 1<<20+192<<10 || res.Freed > 1<<20+256<<10 {
		t.Errorf("%+v, %v", res, err)
	}
	checkClean(t, s)
	if exists(s.path(".index.json-1")) || exists(s.blobPath("sha256:00")) || !exists(rootfsOf(t, s, kept)) {
		t.Error("the wrong files are gone")
	}
}

func TestDamagedIndex(t *testing.T) {
	s := newStore(t)
	for _, text := range []string{"{", `{"version":99}`} {
		if err := os.WriteFile(s.path("index.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.List(t.Context()); err == nil {
			t.Errorf("index %q is read", text)
		}
		if _, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, sampleImage(t, "x"), "x:1"))}, Options{}); err == nil {
			t.Errorf("index %q is overwritten", text)
		}
		if got := string(mustRead(t, s.path("index.json"))); got != text {
			t.Errorf("index became %q", got)
		}
	}
}

// Commands may be plain strings, and other fields are what they were.
func TestPlainCommands(t *testing.T) {
	im := sampleImage(t, "x")
	files := dockerFiles(t, map[string]testImage{"x:1": im})
	conf := bytes.Replace(toJSON(t, im.config()), []byte(`"Cmd":["x"]`), []byte(`"Cmd":"a \u00e9","Entrypoint":"/bin/x","Env":["A=1"],"StopSignal":"SIGRTMIN+3",`+
		`"Healthcheck":{"Test":["CMD","x"],"Interval":2000000,"StartInterval":1000000}`), 1)
	delete(files, hashBytes(toJSON(t, im.config())).Hex+".json")
	files["config.json"] = conf
	var list []dockerManifest
	if err := json.Unmarshal(files[fileManifest], &list); err != nil {
		t.Fatal(err)
	}
	list[0].Config = "config.json"
	files[fileManifest] = toJSON(t, list)
	s := newStore(t)
	imgs, err := s.Load(t.Context(), Source{Path: asDir(t, files)}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := v1.Config{Cmd: []string{"a é"}, Entrypoint: []string{"/bin/x"}, Env: []string{"A=1"}, StopSignal: "SIGRTMIN+3"}
	if diff := cmp.Diff(want, imgs[0].Config.Config.Config); diff != "" {
		t.Error(diff)
	}
	made, err := s.Commit(t.Context(), imgs[0].ID, bytes.NewReader(im.layers[0]), CommitOptions{})
	if err != nil {
		t.Fatal(err)
	}
	check := &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD", "x"}, Interval: 2 * time.Millisecond}, StartInterval: time.Millisecond}
	for _, img := range []Image{imgs[0], made} {
		if diff := cmp.Diff(check, img.Config.Config.Healthcheck); diff != "" {
			t.Error(diff)
		}
	}
	if diff := cmp.Diff(im.config().RootFS, imgs[0].Config.RootFS); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{`{"config":{"Cmd":1}}`, `{"config":{"Entrypoint":{}}}`, `{"config":{"Cmd":[1]}}`} {
		if _, err := parseConfig([]byte(bad)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if c, err := parseConfig([]byte(`{"config":{"Cmd":null,"Entrypoint":[]},"architecture":"x"}`)); err != nil || len(c.Config.Cmd)+len(c.Config.Entrypoint) != 0 || c.Architecture != "x" {
		t.Errorf("%+v, %v", c, err)
	}
}

// One damaged image keeps no other from being listed, used or removed. It can be loaded again, and it can be removed.
func TestDamagedImage(t *testing.T) {
	for name, tc := range map[string]struct {
		damage func(*Store, Image) error
		unseen bool // to list and resolve
	}{
		"no configuration":        {func(s *Store, i Image) error { return os.Remove(s.blobPath(i.ID)) }, false},
		"truncated configuration": {func(s *Store, i Image) error { return os.Truncate(s.blobPath(i.ID), 20) }, false},
		"no root file system":     {func(s *Store, i Image) error { return os.Remove(s.rootfsPath(i.RootfsID)) }, false},
		"no attributes":           {func(s *Store, i Image) error { return os.Remove(s.extraPath(i.RootfsID)) }, false},
		"no manifest":             {func(s *Store, i Image) error { return os.Remove(s.blobPath(i.Manifest)) }, true},
		"empty manifest":          {func(s *Store, i Image) error { return os.Truncate(s.blobPath(i.Manifest), 0) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			bad := asDir(t, ociFiles(t, sampleImage(t, "bad"), "bad:1"))
			load := func(path string) Image {
				t.Helper()
				imgs, err := s.Load(t.Context(), Source{Path: path}, Options{})
				if err != nil {
					t.Fatal(err)
				}
				return imgs[0]
			}
			img := load(bad)
			load(asDir(t, ociFiles(t, sampleImage(t, "good"), "good:1")))
			if err := tc.damage(s, img); err != nil {
				t.Fatal(err)
			}
			list, err := s.List(t.Context())
			if err != nil || len(list) != 2 {
				t.Fatalf("%+v, %v", list, err)
			}
			for _, i := range list {
				if (i.Damaged != "") != (i.ID == img.ID && !tc.unseen) || len(i.Names) != 1 {
					t.Errorf("%+v", i)
				}
			}
			if _, err := s.Resolve(t.Context(), "bad:1"); tc.unseen != (err == nil) || err != nil && !strings.Contains(err.Error(), "load it again") {
				t.Errorf("resolve: %v", err)
			}
			if _, err := s.Remove(t.Context(), "good:1", nil); err != nil {
				t.Error(err)
			}
			checkSample(t, s, load(bad), "bad")
			if list, err := s.List(t.Context()); err != nil || len(list) != 1 || list[0].Damaged != "" {
				t.Errorf("loaded again: %+v, %v", list, err)
			}
			if err := tc.damage(s, img); err != nil {
				t.Fatal(err)
			}
			if res, err := s.Remove(t.Context(), "bad:1", nil); err != nil || len(res.Deleted) != 1 {
				t.Errorf("%+v, %v", res, err)
			}
			if n := countFiles(s.path("blobs")) + countFiles(s.path("rootfs")); n > 0 {
				t.Errorf("%d files are left", n)
			}
		})
	}
}

// Many loads and removals at once: whoever resolves an image finds all of it.
func TestConcurrent(t *testing.T) {
	s := newStore(t)
	shared := sampleImage(t, "one")
	path := asFile(t, asTar(t, dockerFiles(t, map[string]testImage{"keep:1": shared})))
	var sources []string
	for _, name := range []string{"a", "b"} {
		im := shared
		im.cmd = name // other images of the same layers
		sources = append(sources, asFile(t, asTar(t, dockerFiles(t, map[string]testImage{name + ":1": im}))))
	}
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			// A store of its own for each: nothing is shared in memory.
			s, err := Open(s.dir, nil)
			if err != nil {
				t.Error(err)
				return
			}
			for range 6 {
				if i < 2 {
					if _, err := s.Load(t.Context(), Source{Path: sources[i]}, Options{}); err != nil {
						t.Error(err)
					}
					if _, err := s.Remove(t.Context(), []string{"a:1", "b:1"}[i], nil); err != nil {
						t.Error(err)
					}
					continue
				}
				imgs, err := s.Load(t.Context(), Source{Path: path}, Options{})
				if err != nil {
					t.Error(err)
					continue
				}
				if !exists(rootfsOf(t, s, imgs[0])) {
					t.Error("a loaded image has no root file system")
				}
				if _, err := s.Prune(t.Context(), false, nil, nil); err != nil {
					t.Error(err)
				}
				for range 20 {
					list, err := s.List(t.Context())
					if err != nil || slices.ContainsFunc(list, func(i Image) bool { return i.Damaged != "" }) {
						t.Errorf("list: %+v, %v", list, err)
					}
					if _, err := s.Resolve(t.Context(), "a:1"); err != nil && !errors.Is(err, ErrNotFound) {
						t.Errorf("resolve: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	img, err := s.Resolve(t.Context(), "keep:1")
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := s.haveAll(stageOf(t, s), img.ID); !ok {
		t.Error("parts of the image are missing")
	}
}

func stageOf(t *testing.T, s *Store) *stage {
	st, err := s.newStage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.close)
	return st
}

// A load is killed at many points. Whatever is left, the index is whole, every image in it too, and the next change sweeps.
func TestLoadKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("starts and kills many processes")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	path := asFile(t, asTar(t, dockerFiles(t, map[string]testImage{"x:1": sampleImage(t, strings.Repeat("x", 50))})))
	finished := 0
	for i := range 25 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), "COFFER_TEST_LOAD_INTO="+s.dir, "COFFER_TEST_LOAD_FROM="+path)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// The moment is given by what the load has done so far, not by the clock.
		files := 0
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
	watch:
		for {
			select {
			case err := <-done:
				if err == nil {
					finished++
				}
				break watch
			default:
			}
			if n := countFiles(s.path("tmp")) + 8*countFiles(s.path("rootfs")); n != files {
				if files = n; n >= 1+2*(i%15) {
					cmd.Process.Kill()
				}
			}
			runtime.Gosched()
		}
		imgs, err := s.List(t.Context())
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		for _, img := range imgs {
			if _, err := os.Stat(rootfsOf(t, s, img)); err != nil {
				t.Errorf("round %d: %v", i, err)
			}
			checkSample(t, s, img, strings.Repeat("x", 50))
			if _, err := s.Remove(t.Context(), img.ID, nil); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d of 25 loads came to their end", finished)
	if _, err := s.Prune(t.Context(), false, nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"tmp", "rootfs", "blobs"} {
		if n := countFiles(s.path(d)); n > 0 {
			t.Errorf("%d files are left in %s", n, d)
		}
	}
}

func countFiles(dir string) int {
	n := 0
	filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return nil
	})
	return n
}

// rootfsOf is where the only segment of an image stands.
func rootfsOf(t *testing.T, s *Store, img Image) string {
	t.Helper()
	paths, err := s.RootfsPaths(img)
	if err != nil || len(paths) != 1 {
		t.Fatalf("segments of %s: %v, %v", img.ID, paths, err)
	}
	return paths[0]
}
