package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	writer "github.com/coffer-box/coffer/internal/erofs"
)

func TestHostileLayers(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	for name, tc := range map[string]struct {
		ents   []ent
		limits Limits
		want   string // part of the error
	}{
		"climbing name":            {ents: []ent{{name: "../../etc/passwd", body: "x"}}, want: `"../../etc/passwd": name leads out`},
		"climbing from within":     {ents: []ent{{name: "a/../../b", body: "x"}}, want: "leads out"},
		"climbing whiteout":        {ents: []ent{{name: "../.wh.x"}}, want: "leads out"},
		"whiteout of dots":         {ents: []ent{{name: "a/.wh..."}}, want: "whiteout of nothing"},
		"empty whiteout":           {ents: []ent{{name: ".wh."}}, want: "whiteout of nothing"},
		"hard link to outside":     {ents: []ent{{name: "l", typ: tar.TypeLink, link: "../../etc/passwd"}}, want: "leads out"},
		"hard link to nothing":     {ents: []ent{{name: "l", typ: tar.TypeLink, link: "etc/passwd"}}, want: "no file of this image"},
		"hard link to a host file": {ents: []ent{{name: "l", typ: tar.TypeLink, link: outside}}, want: "no file of this image"},
		"hard link to directory":   {ents: []ent{{name: "d", typ: tar.TypeDir}, {name: "l", typ: tar.TypeLink, link: "d"}}, want: "no file of this image"},
		"link loop":                {ents: []ent{{name: "a", typ: tar.TypeSymlink, link: "b"}, {name: "b", typ: tar.TypeSymlink, link: "a"}, {name: "a/x", body: "x"}}, want: "too many symbolic links"},
		"overlong part":            {ents: []ent{{name: strings.Repeat("n", 256), body: "x"}}, want: "256 bytes"},
		"overlong part in a link":  {ents: []ent{{name: "l", typ: tar.TypeSymlink, link: strings.Repeat("n", 300)}, {name: "l/x"}}, want: "300 bytes"},
		"too deep":                 {ents: []ent{{name: strings.Repeat("d/", 2100) + "x"}}, want: "deep"},
		"too many entries":         {ents: []ent{{name: "a"}, {name: "b"}, {name: "c"}}, limits: Limits{Entries: 2}, want: "more than 2 entries"},
		"implied parents count":    {ents: []ent{{name: "a/b/c/d/e"}}, limits: Limits{Entries: 3}, want: "more than 3 entries"},
		"too many bytes":           {ents: []ent{{name: "a", body: "12345"}, {name: "b", body: "12345"}}, limits: Limits{Bytes: 8}, want: "exceed 8 bytes"},
		"too long names":           {ents: []ent{{name: "12345"}, {name: "678901"}}, limits: Limits{Metadata: 10}, want: "too many bytes"},
		"implied names count":      {ents: []ent{{name: "12345/678901/2"}}, limits: Limits{Metadata: 11}, want: "too many bytes"},
		"too long links":           {ents: []ent{{name: "1", typ: tar.TypeSymlink, link: "2345678901"}}, limits: Limits{Metadata: 10}, want: "too many bytes"},
		"too many attributes":      {ents: []ent{{name: "1", xattrs: map[string]string{"user.a": "b"}}}, limits: Limits{Metadata: 20}, want: "too many bytes"},
		"paths of attributes":      {ents: []ent{{name: "1234567890/1", xattrs: map[string]string{"user.a": "b"}}}, limits: Limits{Metadata: 90}, want: "too many bytes"},
		"root as a file":           {ents: []ent{{name: "./", typ: tar.TypeSymlink, link: "x"}}, want: "root of the file system"},
		"device out of range":      {ents: []ent{{name: "d", typ: tar.TypeChar, maj: 5000}}, want: "out of range"},
		"owner out of range":       {ents: []ent{{name: "f", uid: 1<<32 - 1}}, want: "out of range"},
		"unknown type":             {ents: []ent{{name: "f", typ: 'Z'}}, want: "unknown type"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := buildImage(t, tc.limits, layerTar(t, tc.ents...))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v, want an error with %q", err, tc.want)
			}
			if _, err := os.Lstat(outside); err == nil {
				t.Error("something was made on the host")
			}
		})
	}
}

// However often a layer says that a directory hides what was in it, the directory is gone through once: n files and n whiteouts
// would make n² looks.
func TestManyWhiteouts(t *testing.T) {
	for name, again := range map[string][]tar.Header{
		"opaque":                     {{Name: "d/.wh..wh..opq", Typeflag: tar.TypeReg}},
		"whiteout":                   {{Name: ".wh.d", Typeflag: tar.TypeReg}},
		"opaque, after its own name": {{Name: "d", Typeflag: tar.TypeDir}, {Name: "d/.wh..wh..opq", Typeflag: tar.TypeReg}},
		"opaque parent":              {{Name: ".wh..wh..opq", Typeflag: tar.TypeReg}},
	} {
		t.Run(name, func(t *testing.T) {
			tr := begun(t)
			for _, name := range []string{"d/below", "d/own"} {
				if err := tr.apply(t.Context(), bytes.NewReader(layerTar(t, ent{name: name, typ: tar.TypeFifo}))); err != nil {
					t.Fatal(err)
				}
			}
			add := func() {
				for _, hdr := range again {
					if err := tr.add(t.Context(), &hdr, nil); err != nil {
						t.Fatal(err)
					}
				}
			}
			add()
			d := tr.root.Children["d"]
			if len(d.Children) != 1 || d.Children["own"] == nil {
				t.Fatalf("left in it: %v", d.Children)
			}
			// No layer could put it there. Who looks at it would take it away.
			d.Children["mark"] = &writer.Node{Mode: writer.TypeFIFO}
			add()
			if d = tr.root.Children["d"]; d.Children["mark"] == nil {
				t.Error("the directory was gone through again")
			}
		})
	}
}

// heapOf returns how much more memory is in use after fn, and keeps what fn returned.
func heapOf(fn func() any) int64 {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	v := fn()
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(v)
	return int64(after.HeapAlloc) - int64(before.HeapAlloc)
}

// Short names that stand in long headers keep nothing but themselves.
func TestHeadersAreNotKept(t *testing.T) {
	const n = 50
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for i := range n {
		h := &tar.Header{Name: fmt.Sprintf("é%d/ö", i), Typeflag: tar.TypeSymlink, Linkname: "ü", Mode: 0o644, Format: tar.FormatPAX,
			PAXRecords: map[string]string{"VENDOR.comment": strings.Repeat("x", 900<<10), "SCHILY.xattr.user.a": "b"}}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for name, fn := range map[string]func() any{
		"layer": func() any {
			tr := begun(t)
			if err := tr.apply(t.Context(), bytes.NewReader(layer.Bytes())); err != nil {
				t.Fatal(err)
			}
			return tr
		},
		"archive": func() any {
			f, err := os.Open(asFile(t, append(asTar(t, map[string][]byte{fileIndex: nil})[:512], layer.Bytes()...)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			a, err := readArchive(t.Context(), f, &budget{1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			return a
		},
	} {
		if got := heapOf(fn); got > 10<<20 {
			t.Errorf("%s: %d MiB are held for %d entries", name, got>>20, n)
		}
	}
}

func TestTooMuchMetadata(t *testing.T) {
	im := sampleImage(t, "one")
	im.cmd = strings.Repeat("x", 5000)
	files := dockerFiles(t, map[string]testImage{"x:1": im})
	for limit, want := range map[int64]string{500: "too many bytes", 5100: "too many bytes", 7000: ""} {
		s := newStore(t)
		files[strings.Repeat("n", 600)] = nil
		_, err := s.Load(t.Context(), Source{Path: asFile(t, asTar(t, files))}, Options{Limits: Limits{Metadata: limit}})
		if err == nil != (want == "") || err != nil && (!errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), want)) {
			t.Errorf("limit %d: %v", limit, err)
		}
	}
}

// An archive may name one large configuration any number of times.
func TestConfigsAreReadInTurn(t *testing.T) {
	im := sampleImage(t, "one")
	im.layers, im.packed, im.cmd = im.layers[:1], im.packed[:1], strings.Repeat("x", 2<<20)
	docker, oci := dockerFiles(t, map[string]testImage{"x:1": im}), ociFiles(t, im, "x:1")
	var list []dockerManifest
	var idx v1.IndexManifest
	if err := errors.Join(json.Unmarshal(docker[fileManifest], &list), json.Unmarshal(oci[fileIndex], &idx)); err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		list = append(list, list[0])
		copied := im
		copied.cmd = fmt.Sprint(im.cmd, i)
		idx.Manifests = append(idx.Manifests, writeOCI(t, oci, copied))
	}
	docker[fileManifest], oci[fileIndex] = toJSON(t, list), toJSON(t, idx)
	for name, dir := range map[string]string{"docker": asDir(t, docker), "OCI": asDir(t, oci)} {
		if got := heapOf(func() any {
			c, err := openDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			imgs, err := findImages(c)
			if err != nil || len(imgs) != 51 {
				t.Fatalf("%d images, %v", len(imgs), err)
			}
			return imgs
		}); got > 20<<20 {
			t.Errorf("%s: %d MiB are held for 51 images", name, got>>20)
		}
	}
}

func TestXattrs(t *testing.T) {
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	layer := layerTar(t,
		ent{name: "bin/ping", mode: 0o755, body: "p", xattrs: map[string]string{"security.capability": capability, "user.b": "2", "user.a": "1"}},
		ent{name: "bin/ping2", typ: tar.TypeLink, link: "bin/ping"},
		ent{name: "d", typ: tar.TypeDir, xattrs: map[string]string{"trusted.overlay.opaque": "y", "user.overlay.opaque": "y", "security.selinux": "x"}})
	want := []Extra{{Path: []byte("/bin/ping"), Xattrs: []Xattr{{Name: "security.capability", Value: []byte(capability)}, {Name: "user.a", Value: []byte("1")}, {Name: "user.b", Value: []byte("2")}}}}

	// What gVisor gets must have none: its reader refuses the inode.
	path, got, err := buildImage(t, Limits{}, layer)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if files := readGvisor(t, path); files["bin/ping"].Nlink != 2 {
		t.Errorf("bin/ping: %+v", files["bin/ping"])
	}
}

// Every name of a device is told, since each becomes a file of its own, and names of any bytes come back as they were.
func TestDevices(t *testing.T) {
	s := newStore(t)
	odd := "\xff\xfe/d\xc0"
	img, err := s.Import(t.Context(), Source{Reader: bytes.NewReader(layerTar(t,
		ent{name: "sda", typ: tar.TypeBlock, mode: 0o660, gid: 6, maj: 8, min: 0}, ent{name: "disk/root", typ: tar.TypeLink, link: "sda"},
		ent{name: odd, typ: tar.TypeChar, mode: 0o600, maj: 1, min: 3}))}, "x", Options{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := allExtras(s, img)
	if err != nil {
		t.Fatal(err)
	}
	sda := &Device{Mode: blk | 0o660, GID: 6, Major: 8}
	want := []Extra{{Path: []byte("/disk/root"), Device: sda}, {Path: []byte("/sda"), Device: sda},
		{Path: []byte("/" + odd), Device: &Device{Mode: chr | 0o600, Major: 1, Minor: 3}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if err := os.Truncate(s.extraPath(img.RootfsID), 60); err != nil {
		t.Fatal(err)
	}
	if _, err := allExtras(s, img); err == nil {
		t.Error("a file that was cut is taken for whole")
	}
}

func TestReplacedContentsAreHoles(t *testing.T) {
	body := strings.Repeat("x", 4<<20)
	path, _, err := buildImage(t, Limits{}, layerTar(t, ent{name: "a", body: body}), layerTar(t, ent{name: "a", body: "small"}))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mustRead(t, path), []byte("xxxx")) {
		t.Error("the image still holds what a later layer replaced")
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if used := diskSize(fi); used > 1<<20 {
		t.Logf("the image takes %d bytes on disk: this file system has no holes", used)
	}
}

func TestTruncatedLayer(t *testing.T) {
	layer := layerTar(t, ent{name: "a", body: strings.Repeat("x", 10000)})
	for _, n := range []int{100, 600, 5000} {
		if _, _, err := buildImage(t, Limits{}, layer[:n]); err == nil {
			t.Errorf("a layer cut at %d is taken", n)
		}
	}
}

func FuzzTree(f *testing.F) {
	for _, tc := range mergeCases() {
		if len(tc.layers) > 1 {
			f.Add(layerTar(f, tc.layers[0]...), layerTar(f, tc.layers[1]...))
		}
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		path, _, err := buildImage(t, Limits{Bytes: 1 << 20, Entries: 1000}, a, b)
		if err != nil {
			return
		}
		readGvisor(t, path)
	})
}

func FuzzDockerManifest(f *testing.F) {
	f.Add([]byte(`[{"Config":"a.json","RepoTags":["x:1"],"Layers":["l/layer.tar"]}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseDocker(b)
		if err == nil && len(list) == 0 {
			t.Error("no error and no image")
		}
	})
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:`+strings.Repeat("a", 64)+`","size":3}]}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, index, conf []byte) {
		if idx, err := parseIndex(index); err == nil {
			for _, d := range idx.Manifests {
				// What passes becomes part of a path.
				if len(d.Digest.Hex) != 64 || strings.ContainsAny(d.Digest.Hex, "/.") {
					t.Errorf("digest %q", d.Digest)
				}
			}
		}
		if _, err := parseManifest(index); err != nil && !errors.Is(err, ErrFormat) {
			t.Errorf("unexpected kind of error: %v", err)
		}
		if c, err := parseConfig(conf); err == nil {
			rootfsID(c.RootFS.DiffIDs)
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"base", "a/b:c", "host:5000/x@sha256:" + strings.Repeat("0", 64), "localhost/x", "[::1]:5/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			return
		}
		for _, form := range []string{n.String(), n.Short()} {
			if again, err := ParseName(form); err != nil || again != n {
				t.Errorf("%q gives %q, which gives %+v, %v", s, form, again, err)
			}
		}
	})
}
