package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// listing is what test/lister says of every file: by its quoted path, its line without that.
type listing map[string]map[string]any

func parseListing(t *testing.T, b []byte) listing {
	t.Helper()
	l := listing{}
	for line := range bytes.Lines(b) {
		var f map[string]any
		if err := json.Unmarshal(line, &f); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		path, err := strconv.Unquote(f["path"].(string))
		if err != nil {
			t.Fatal(err)
		}
		delete(f, "path")
		l[path] = f
	}
	return l
}

// listerProgram is test/lister, built.
func listerProgram(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("COFFER_TEST_LISTER"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "lister")
	c := exec.Command("go", "build", "-o", bin, "../lister")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build the lister: %v: %s", err, out)
	}
	return bin
}

// mounted is what every box has of its own: where other file systems are mounted, what Coffer writes, and the lister's place.
func mounted() []string {
	return []string{"/proc", "/sys", "/dev", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/.lister"}
}

// boxListing is what a program in a box of an image sees.
func boxListing(t *testing.T, h *home, lister, ref string) listing {
	t.Helper()
	args := append([]string{"run", "--rm", "-u", "0:0", "-w", "/", "--pull", "never", "-v", lister + ":/.lister:ro", "--entrypoint", "/.lister", ref, "/"},
		mounted()...)
	return parseListing(t, []byte(h.run(args...)))
}

// umociListing is what umoci makes of an image of a layout. It takes root to make it, so the result is kept for others.
func umociListing(t *testing.T, lister string, p layout.Path, ref string, img v1.Image) listing {
	t.Helper()
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	kept := filepath.Join(os.TempDir(), "coffer-test-umoci-1", digest.Hex)
	if b, err := os.ReadFile(kept); err == nil {
		return parseListing(t, b)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	umoci := filepath.Join(cache, "coffer-test", "umoci")
	if _, err := os.Stat(umoci); err != nil || os.Geteuid() != 0 {
		t.Skip("what umoci makes of this image is not there: it takes root, and umoci, which sh test/deps.sh gets")
	}
	if err := os.MkdirAll(filepath.Dir(kept), 0o755); err != nil {
		t.Fatal(err)
	}
	work, err := os.MkdirTemp(filepath.Dir(kept), "unpack-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(work)
	rootfs := filepath.Join(work, "rootfs")
	if out, err := exec.Command(umoci, "raw", "unpack", "--image", string(p)+":"+ref, rootfs).CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v: %s", err, out)
	}
	out, err := exec.Command(lister, append([]string{rootfs}, mounted()...)...).Output()
	if err != nil {
		t.Fatalf("list what umoci made: %v", err)
	}
	whole := filepath.Join(work, "listing")
	if err := errors.Join(os.WriteFile(whole, out, 0o644), os.Rename(whole, kept)); err != nil {
		t.Fatal(err)
	}
	return parseListing(t, out)
}

// deviations are what umoci and Coffer give differently, by the name of the image and the path: Coffer's, nil for nothing.
func deviations() map[string]listing {
	said, unsaid := map[string]any{"mtime": "1000000000.000000000"}, map[string]any{"mtime": "0.000000000"}
	// Of a directory that no layer describes, umoci keeps the time at which it made it; Coffer says 1970, so that an image is the same
	// whenever it is built.
	implied := listing{"/implied/by": unsaid, "/dotted": unsaid}
	for p := "/" + strings.TrimSuffix(deepDir(), "/"); p != "/"; p = filepath.Dir(p) {
		implied[p] = unsaid
	}
	return map[string]listing{
		"names": implied,
		// umoci takes the whiteout as it comes, after the directory's own time was set, and leaves the time at which it did.
		"whiteout-after": {"/d": said},
		"opaque":         {"/e/s": said},
		// In gVisor's overlay a name of several parts from the others when it is given its attribute, as with any change of a file of the
		// layer below.
		"attributes": {"/linked": {"links": 1.}, "/linked-too": {"same": nil, "xattrs": nil}},
	}
}

func deepDir() string { return strings.Repeat("directory-of-a-long-path/", 14) }

// conforms compares what a box of an image holds with what umoci makes of the image, with what is known to deviate.
func conforms(t *testing.T, got, want, deviate listing) {
	t.Helper()
	for p, fields := range deviate {
		if want[p] == nil {
			t.Errorf("%q is not there", p)
			continue
		}
		for k, v := range fields {
			if want[p][k] = v; v == nil {
				delete(want[p], k)
			}
		}
	}
	for _, l := range []listing{got, want} {
		// A box's own files and places to mount on were just made in these.
		delete(l["/"], "mtime")
		delete(l["/etc"], "mtime")
		for _, f := range l {
			if xs, ok := f["xattrs"].(map[string]any); ok {
				// gVisor has attributes of users only. That this one is left out stands in the box's log.
				delete(xs, "security.capability")
				if len(xs) == 0 {
					delete(f, "xattrs")
				}
			}
		}
	}
	differ := 0
	for _, p := range slices.Sorted(maps.Keys(merged(got, want))) {
		a, b := toJSON(t, want[p]), toJSON(t, got[p])
		if a == b {
			continue
		}
		if differ++; differ <= 20 {
			t.Errorf("%q\n  umoci %s\n  box   %s", p, a, b)
		}
	}
	if differ > 20 {
		t.Errorf("%d files differ in all", differ)
	}
	if len(got) < 4 {
		t.Errorf("only %d files", len(got))
	}
	t.Logf("%d files", len(got))
}

func merged(a, b listing) listing {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

func toJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// odd is an entry of a made-up layer. Without a header it is bytes of the archive as they are.
type odd struct {
	tar.Header
	body string
	raw  []byte
}

// oddTime is of entries that say nothing of time.
func oddTime() time.Time { return time.Unix(1e9, 0) }

func oddFile(name, body string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, body: body}
}

func oddDir(name string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}}
}

func oddLink(name, target string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}}
}

func oddSymlink(name, target string) odd {
	return odd{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func (o odd) with(change func(*tar.Header)) odd {
	change(&o.Header)
	return o
}

func (o odd) xattr(name, value string) odd {
	return o.with(func(h *tar.Header) {
		h.PAXRecords = maps.Clone(h.PAXRecords)
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	})
}

// sparse are entries of a file that is all hole but its beginning and end, as GNU tar writes it in its own format and in that of POSIX;
// archive/tar only reads them.
func sparse(name string, pax bool) odd {
	const size, part = 3 << 20, 512
	head, tail := strings.Repeat("h", part), strings.Repeat("t", part)
	block := func(name string, typ byte, n int, more func(b []byte)) []byte {
		b := make([]byte, 512)
		copy(b, name)
		copy(b[100:], "0000644\x000000000\x000000000\x00")
		copy(b[124:], fmt.Sprintf("%011o\x00%011o\x00", n, oddTime().Unix()))
		b[156] = typ
		copy(b[257:], "ustar\x0000")
		if more != nil {
			more(b)
		}
		copy(b[148:], "        ")
		total := 0
		for _, c := range b {
			total += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", total))
		return b
	}
	pad := func(s string) []byte { return append([]byte(s), make([]byte, -len(s)&511)...) }
	if !pax {
		return odd{raw: append(block(name, 'S', 2*part, func(b []byte) {
			copy(b[257:], "ustar  \x00")
			copy(b[386:], fmt.Sprintf("%011o\x00%011o\x00%011o\x00%011o\x00", 0, part, size-part, part))
			copy(b[483:], fmt.Sprintf("%011o\x00", size))
		}), head+tail...)}
	}
	var records strings.Builder
	for _, kv := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=" + name, "GNU.sparse.realsize=" + strconv.Itoa(size)} {
		n := len(kv) + 4 // two digits, a space and a newline
		fmt.Fprintf(&records, "%d %s\n", n, kv)
	}
	body := append(pad(fmt.Sprintf("2\n0\n%d\n%d\n%d\n", part, size-part, part)), head+tail...)
	return odd{raw: slices.Concat(block("pax", 'x', records.Len(), nil), pad(records.String()), block("GNUSparseFile.0/x", '0', len(body), nil), body)}
}

func oddTar(t *testing.T, ents []odd) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range ents {
		if e.raw != nil {
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			b.Write(e.raw)
			continue
		}
		if e.ModTime.IsZero() {
			e.ModTime = oddTime()
		}
		e.Size = int64(len(e.body))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatalf("%s: %v", e.Name, err)
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

// oddImages are images whose layers hold what is rare and legal.
func oddImages() map[string][][]odd {
	const capability = "\x00\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" // cap_net_raw=p
	device := func(name string, typ byte, major, minor int64) odd {
		return odd{Header: tar.Header{Typeflag: typ, Name: name, Mode: 0o640, Devmajor: major, Devminor: minor, Uid: 5, Gid: 6}}
	}
	long := strings.Repeat("n", 255)
	deep := deepDir()
	owner := func(uid, gid int) func(*tar.Header) { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }
	mode := func(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }
	at := func(sec, nsec int64) func(*tar.Header) {
		return func(h *tar.Header) { h.ModTime, h.Format = time.Unix(sec, nsec), tar.FormatPAX }
	}
	gnu := func(h *tar.Header) { h.Format = tar.FormatGNU }
	return map[string][][]odd{
		"whiteouts": {
			{oddFile("a", "1"), oddFile("b", "1"), oddDir("d"), oddFile("d/x", "x"), oddFile("d/y", "y"), oddDir("gone"), oddDir("gone/deep"), oddFile("gone/deep/f", "f"),
				oddSymlink("s", "d"), oddFile("again", "1")},
			{oddFile(".wh.a", ""), oddFile("d/.wh.x", ""), oddFile(".wh.gone", ""), oddFile(".wh.never", ""), oddFile(".wh.s", ""), oddFile(".wh.again", "")},
			{oddFile("again", "2"), oddDir("gone"), oddFile("gone/new", "n")},
		},
		"whiteout-before": {{oddFile("a", "1"), oddDir("d"), oddFile("d/old", "o")}, {oddFile(".wh.a", ""), oddFile("a", "2"), oddFile(".wh.d", ""), oddDir("d"), oddFile("d/new", "n")}},
		"whiteout-after":  {{oddFile("a", "1"), oddDir("d"), oddFile("d/old", "o")}, {oddFile("a", "2"), oddFile(".wh.a", ""), oddDir("d"), oddFile("d/new", "n"), oddFile(".wh.d", "")}},
		"opaque": {
			{oddDir("d"), oddFile("d/a", "a"), oddDir("d/s"), oddFile("d/s/b", "b"), oddDir("e"), oddFile("e/a", "a"), oddDir("e/s"), oddFile("e/s/old", "o")},
			{oddDir("d"), oddFile("d/.wh..wh..opq", ""), oddFile("d/c", "c"), oddDir("e"), oddFile("e/new", "n"), oddDir("e/s"), oddFile("e/s/new", "n"), oddFile("e/.wh..wh..opq", "")},
			{oddFile("d/again", "3")},
		},
		"types": {
			{oddFile("f-d", "1"), oddDir("d-f"), oddFile("d-f/in", "2"), oddDir("d-s"), oddFile("d-s/in", "2"), oddSymlink("s-d", "f-d"), oddSymlink("s-f", "d-f"), oddFile("f-s", "x")},
			{oddDir("f-d"), oddFile("f-d/in", "3"), oddFile("d-f", "4"), oddSymlink("d-s", "f-d"), oddDir("s-d"), oddFile("s-d/in", "5"), oddFile("s-f", "6"), oddSymlink("f-s", "f-d")},
			{oddFile("f-d", "7"), oddDir("d-f"), oddFile("d-f/back", "8"), oddDir("d-s"), oddFile("d-s/back", "9"), oddSymlink("s-d", "s-f")},
		},
		"links": {
			{oddFile("a", "one"), oddLink("b", "a"), oddDir("d"), oddLink("d/c", "/b"), oddFile("p", "p"), oddLink("q", "p"), oddFile("x", "x"), oddLink("y", "./x"), oddFile("alone", "l")},
			{oddLink("d/e", "a"), oddFile("p", "new"), oddFile(".wh.x", ""), oddLink("d/alone", "alone")},
			{oddFile("a", "other"), oddFile("alone", "changed").with(mode(0o600))},
		},
		"attributes": {
			{oddFile("user", "u").xattr("user.one", "1").xattr("user.two", "a\x00\xffb"), oddDir("dir").xattr("user.dir", "d"), oddFile("cap", "c").xattr("security.capability", capability),
				oddFile("both", "b").with(mode(0o755)).xattr("security.capability", capability).xattr("user.one", strings.Repeat("x", 2000)), oddFile("lost", "l").xattr("user.lost", "l"),
				oddFile("linked", "l").xattr("user.one", "1"), oddLink("linked-too", "linked")},
			{oddFile("lost", "l"), oddDir("dir")},
		},
		"devices": {
			{oddDir("n"), device("n/char", tar.TypeChar, 1, 3), device("n/block", tar.TypeBlock, 259, 70000), device("n/gone", tar.TypeBlock, 8, 0), device("n/file", tar.TypeChar, 1, 5),
				odd{Header: tar.Header{Typeflag: tar.TypeFifo, Name: "n/fifo", Mode: 0o620, Uid: 7}}, oddFile("n/was", "f")},
			{oddFile("n/.wh.gone", ""), oddFile("n/file", "f"), device("n/was", tar.TypeChar, 240, 1)},
		},
		"sparse":     {{sparse("holes", true), oddFile("zeros", strings.Repeat("\x00", 1<<20)+"end")}},
		"sparse-gnu": {{sparse("holes", false), oddFile("zeros", strings.Repeat("\x00", 1<<20)+"end")}},
		"names": {
			{oddFile(long, "l"), oddFile(deep+"pax", "d").with(func(h *tar.Header) { h.Format = tar.FormatPAX }), oddFile(deep+"gnu", "d").with(gnu), oddSymlink("to-long", strings.Repeat("t/", 1500)+"x").with(gnu),
				oddFile("./dotted/./f", "f"), oddFile("/absolute", "a"), oddFile("implied/by/name", "i"), oddFile("grüße-日本語", "u"), oddFile("latin-gr\xfc\xdfe", "8").with(gnu),
				oddFile("new\nline", "n"), oddFile(" space ", "s"), oddFile("back\\slash", "b"), oddFile("star*", "*"), oddFile(".whistle", "w"), oddFile("twice", "1"), oddFile("./twice", "22")},
			{oddDir("./"), oddDir("implied"), oddFile("twice", "333")},
		},
		"symlinks": {{oddSymlink("dangling", "no/where"), oddSymlink("absolute", "/etc/none"), oddSymlink("loop", "loop"), oddSymlink("up", "../../../../etc"),
			oddSymlink("a", "b"), oddSymlink("b", "a"), oddDir("usr"), oddDir("usr/lib"), oddSymlink("lib", "usr/lib").with(owner(70000, 3))}},
		"modes": {{oddFile("suid", "x").with(mode(0o4755)), oddFile("sgid", "x").with(mode(0o2755)), oddFile("all", "x").with(mode(0o7777)), oddDir("sticky").with(mode(0o1777)), oddDir("sgid-dir").with(mode(0o2770)),
			oddFile("none", "").with(mode(0)), oddFile("owned-suid", "x").with(mode(0o6711)).with(owner(70000, 70001))}},
		"owners": {{oddFile("high", "h").with(owner(70000, 65536)), oddFile("highest", "h").with(owner(4294967294, 4294967294)), oddDir("dir").with(owner(65534, 1<<31)), oddFile("named", "n").with(func(h *tar.Header) {
			h.Uname, h.Gname, h.Uid = "daemon", "games", 99
		})}},
		"times": {{oddFile("nanoseconds", "n").with(at(1700000000, 123456789)), oddFile("before", "b").with(at(-86400, 0)), oddFile("before-with", "b").with(at(-86400, 250000000)), oddFile("epoch", "e").with(at(0, 0)),
			oddFile("far", "f").with(at(1<<33, 5)), oddSymlink("link", "far").with(at(1234567890, 987654321)), oddDir("dir").with(at(1111111111, 1)), oddFile("dir/in", "i")}},
	}
}

// oddLayout writes the odd images, the same ones every time.
func oddLayout(t *testing.T) (layout.Path, map[string]v1.Image) {
	t.Helper()
	p, err := layout.Write(filepath.Join(t.TempDir(), "odd"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	imgs := map[string]v1.Image{}
	for name, layers := range oddImages() {
		img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		// What is mounted on or written to is there, so that a box need not make it.
		base := []odd{oddDir("proc"), oddDir("sys"), oddDir("dev"), oddDir("etc"), oddFile("etc/hostname", ""), oddFile("etc/hosts", ""), oddFile("etc/resolv.conf", "")}
		for _, ents := range slices.Concat([][]odd{base}, layers) {
			b := oddTar(t, ents)
			l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }, tarball.WithMediaType(types.OCILayer))
			if err != nil {
				t.Fatal(err)
			}
			if img, err = mutate.AppendLayers(img, l); err != nil {
				t.Fatal(err)
			}
		}
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cf = cf.DeepCopy()
		cf.OS, cf.Architecture = "linux", runtime.GOARCH
		if img, err = mutate.ConfigFile(img, cf); err != nil {
			t.Fatal(err)
		}
		if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{refName: name})); err != nil {
			t.Fatal(err)
		}
		imgs[name] = img
	}
	return p, imgs
}

// TestUmociListings makes what tests compare with, so that it is there for those of an ordinary user, who cannot.
func TestUmociListings(t *testing.T) {
	lister := listerProgram(t)
	p, imgs := oddLayout(t)
	for name, img := range imgs {
		if name != "sparse-gnu" { // umoci does not read this format
			umociListing(t, lister, p, name, img)
		}
	}
	p = imagesLayout(t)
	for name, img := range layoutImages(t, p) {
		if len(realImages()[name].layers) > 1 {
			umociListing(t, lister, p, name, img)
		}
	}
}

// TestConformance: the files of a box are what another program, umoci, makes of the same image on the host.
func TestConformance(t *testing.T) {
	p, imgs := oddLayout(t)
	lister := listerProgram(t)
	h := newHome(t)
	h.run("load", "-i", string(p))
	for name, img := range imgs {
		t.Run(name, func(t *testing.T) {
			h := &home{t: t, bin: h.bin, dir: h.dir}
			ref, err := img.ConfigName()
			if err != nil {
				t.Fatal(err)
			}
			if name == "sparse-gnu" {
				name = "sparse" // umoci does not read this format; the files are the same
			}
			want := umociListing(t, lister, p, name, imgs[name])
			conforms(t, boxListing(t, h, lister, ref.Hex), want, deviations()[name])
		})
	}
}
