package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	images "github.com/coffer-box/coffer/internal/image"
)

// What a pull asks for, in its order. The last two are of blobs.
const (
	askPing = iota
	askToken
	askDigest
	askManifest
	askConfig
	askLayer
	asks
)

// hostile is a registry in memory that answers one kind of question as it is told, and the others well.
type hostile struct {
	content map[string][]byte // manifests and blobs, by digest
	config  string            // digest of the configuration
	tag     string

	ask    int // what is answered badly; negative: nothing
	once   bool
	status int
	head   http.Header
	body   []byte
	length int64 // of the body, repeated until then
	stall  bool  // the body does not end

	mu   sync.Mutex
	over []string // what more was read of than is of any use
}

// most is what may be read of an answer that is no blob: what a manifest may have, and a buffer of the reader.
const most = 16<<20 + 512<<10

func (h *hostile) RoundTrip(req *http.Request) (*http.Response, error) {
	ask, status, head, body := -1, http.StatusOK, http.Header{}, []byte(nil)
	path := req.URL.Path
	digest := path[strings.LastIndexByte(path, '/')+1:]
	switch {
	case path == "/token":
		ask, body = askToken, []byte(`{"token":"the-token"}`)
	case req.Header.Get("Authorization") != "Bearer the-token":
		ask, status = askPing, http.StatusUnauthorized
		head.Set("WWW-Authenticate", `Bearer realm="https://reg.example/token",service="reg"`)
	case digest == "1":
		ask, body = askDigest, h.content[h.tag]
		head.Set("Docker-Content-Digest", h.tag)
	case h.content[digest] == nil:
		status = http.StatusNotFound
	default:
		ask, body = askLayer, h.content[digest]
		if strings.Contains(path, "/manifests/") {
			ask = askManifest
		} else if digest == h.config {
			ask = askConfig
		}
		var from int
		if n, _ := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &from); n == 1 && from < len(body) {
			head.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(body)-1, len(body)))
			status, body = http.StatusPartialContent, body[from:]
		}
	}
	length, stall := int64(len(body)), false
	h.mu.Lock()
	if ask == h.ask && ask >= 0 {
		status, head, body, length, stall = h.status, h.head.Clone(), h.body, h.length, h.stall
		if h.once {
			h.ask = -1
		}
	}
	h.mu.Unlock()
	if req.Method == http.MethodHead {
		length, stall = 0, false
	}
	return &http.Response{Status: http.StatusText(status), StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: head, ContentLength: -1,
		Request: req, Body: &endless{h: h, ctx: req.Context(), what: req.Method + " " + path, free: ask == askLayer, body: body, left: length, stall: stall}}, nil
}

// endless is a body that repeats itself, as long as it was told to.
type endless struct {
	h     *hostile
	ctx   context.Context
	what  string
	free  bool
	body  []byte
	at    int
	left  int64
	read  int64
	stall bool
}

func (e *endless) Read(p []byte) (int, error) {
	if err := e.ctx.Err(); err != nil {
		return 0, err
	}
	if len(e.body) == 0 || e.left == 0 {
		if e.stall {
			<-e.ctx.Done()
			return 0, e.ctx.Err()
		}
		return 0, io.EOF
	}
	n := copy(p[:min(int64(len(p)), e.left)], e.body[e.at:])
	e.at = (e.at + n) % len(e.body)
	e.left -= int64(n)
	if e.read += int64(n); e.read > most && e.read-int64(n) <= most && !e.free {
		e.h.mu.Lock()
		e.h.over = append(e.h.over, e.what)
		e.h.mu.Unlock()
	}
	return n, nil
}

func (e *endless) Close() error { return nil }

func sumOf(b []byte) v1.Hash {
	h := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h[:])}
}

// goodImage fills a registry with an image of two layers, and returns its parts.
func goodImage(t testing.TB) (manifest, config, plain []byte, packed [][]byte) {
	t.Helper()
	var layer, gz, zs bytes.Buffer
	w := tar.NewWriter(&layer)
	body := strings.Repeat("content ", 1000)
	for _, h := range []*tar.Header{{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755}, {Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o644, Size: int64(len(body))}} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	io.WriteString(w, body)
	w.Close()
	g := gzip.NewWriter(&gz)
	g.Write(layer.Bytes())
	g.Close()
	z, err := zstd.NewWriter(&zs, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	z.Write(layer.Bytes())
	z.Close()
	packed = [][]byte{gz.Bytes(), zs.Bytes()}
	conf := v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, Config: v1.Config{Cmd: []string{"x"}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{sumOf(layer.Bytes()), sumOf(layer.Bytes())}}}
	if config, err = json.Marshal(conf); err != nil {
		t.Fatal(err)
	}
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: sumOf(config), Size: int64(len(config))}}
	for i, b := range packed {
		m.Layers = append(m.Layers, v1.Descriptor{MediaType: []types.MediaType{types.OCILayer, types.OCILayerZStd}[i], Digest: sumOf(b), Size: int64(len(b))})
	}
	if manifest, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	return manifest, config, layer.Bytes(), packed
}

func newHostile(manifest, config []byte, blobs ...[]byte) *hostile {
	h := &hostile{content: map[string][]byte{}, ask: -1, tag: sumOf(manifest).String(), config: sumOf(config).String()}
	for _, b := range append(blobs, manifest, config) {
		h.content[sumOf(b).String()] = b
	}
	return h
}

// pullFrom pulls the image of a registry into a store.
func pullFrom(t *testing.T, h *hostile, s *images.Store) (images.Image, error) {
	t.Helper()
	c := client(t, Config{Dir: t.TempDir(), Keychain: authn.NewMultiKeychain()})
	c.base = bounded{h}
	n, err := images.ParseName("reg.example/team/app:1")
	if err != nil {
		t.Fatal(err)
	}
	img, _, err := s.Pull(t.Context(), n, repo(t, c, "reg.example"), images.PullOptions{Limits: images.Limits{Bytes: 4 << 20, Entries: 1000, Metadata: 1 << 20}})
	return img, err
}

// inBubble runs fn with a clock of its own: who waits without end is found at once, and so is who waits for long.
func inBubble(t *testing.T, fn func(t *testing.T, s *images.Store)) {
	dir := filepath.Join(t.TempDir(), "images")
	synctest.Test(t, func(t *testing.T) {
		s, err := images.Open(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		fn(t, s)
		if took := time.Since(start); took > time.Hour {
			t.Errorf("it took %v", took)
		}
	})
}

// FuzzAnswers: whatever a registry answers to one question, once or always, a pull comes to an end with an error or with the image, reads
// no more than it has use for, and the store is as good as before.
func FuzzAnswers(f *testing.F) {
	manifest, config, _, packed := goodImage(f)
	for ask := range byte(asks) {
		for _, once := range []bool{true, false} {
			f.Add(ask, once, uint16(500), "Retry-After: 1\n", []byte(`{"errors":[{"code":"UNKNOWN","message":"m","detail":{}}]}`), uint8(0), false)
			f.Add(ask, once, uint16(401), `WWW-Authenticate: Bearer realm="https://other.example/token",service="x",scope="y"`, []byte("x"), uint8(30), true)
			f.Add(ask, once, uint16(200), "Docker-Content-Digest: sha256:0\nContent-Range: bytes 5-9/10", []byte("{"), uint8(28), false)
			f.Add(ask, once, uint16(206), "Content-Range: bytes 1-2/3", packed[0], uint8(0), true)
			f.Add(ask, once, uint16(307), "Location: https://else.example/v2/x", manifest, uint8(0), false)
			f.Add(ask, once, uint16(416), "Link: <x>; rel=next", config, uint8(0), false)
			f.Add(ask, once, uint16(281), "", []byte("\x1f\x8b\b"), uint8(0), true)
			f.Add(ask, once, uint16(200), "", []byte("x"), uint8(0), true)
			f.Add(ask, once, uint16(429), "Retry-After: 99999999999", []byte(`{"token":"t","access_token":"a","expires_in":-1}`), uint8(0), true)
		}
	}
	f.Fuzz(func(t *testing.T, ask byte, once bool, status uint16, head string, body []byte, size uint8, stall bool) {
		inBubble(t, func(t *testing.T, s *images.Store) {
			h := newHostile(manifest, config, packed...)
			good := sumOf(config).String()
			h.ask, h.once, h.status, h.body, h.length, h.stall = int(ask)%asks, once, 100+(int(status)+400)%500, body, int64(len(body)), stall
			if size > 0 {
				h.length = 1 << (size % 31) // up to a GiB
			}
			h.head = http.Header{}
			for line := range strings.SplitSeq(head, "\n") {
				if k, v, ok := strings.Cut(line, ":"); ok {
					h.head.Add(textproto.TrimString(k), textproto.TrimString(v))
				}
			}
			img, err := pullFrom(t, h, s)
			if err == nil && img.ID != good {
				t.Errorf("another image: %s", img.ID)
			}
			if len(h.over) > 0 {
				t.Errorf("read without end: %v", h.over)
			}
			h.ask = -1
			if img, err := pullFrom(t, h, s); err != nil || img.ID != good {
				t.Errorf("afterwards: %v, %v", img.ID, err)
			}
		})
	})
}

// FuzzContent: whatever a manifest, a configuration and a layer hold, of the digests that they should have, a pull comes to an end with an
// error or with an image that can be listed and removed, and the store is as good as before.
func FuzzContent(f *testing.F) {
	manifest, config, plain, packed := goodImage(f)
	f.Add(manifest, config, packed[0])
	f.Add([]byte(nil), config, packed[1])
	f.Add([]byte(nil), []byte(nil), plain)
	f.Add([]byte(nil), []byte(nil), packed[0][:len(packed[0])/2])
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","size":`+
		strconv.Itoa(len(manifest))+`,"digest":"`+sumOf(manifest).String()+`","platform":{"os":"linux","architecture":"`+runtime.GOARCH+`"}}]}`), []byte(nil), packed[0])
	f.Fuzz(func(t *testing.T, man, conf, layer []byte) {
		inBubble(t, func(t *testing.T, s *images.Store) {
			// What is empty is made to fit the rest, so that this is reached.
			if len(conf) == 0 {
				conf = fmt.Appendf(nil, `{"os":"linux","rootfs":{"type":"layers","diff_ids":[%q]}}`, sumOf(unpacked(layer)))
			}
			if len(man) == 0 {
				man = fmt.Appendf(nil, `{"schemaVersion":2,"config":{"digest":%q,"size":%d},"layers":[{"digest":%q,"size":%d}]}`, sumOf(conf), len(conf), sumOf(layer), len(layer))
			}
			h := newHostile(man, conf, append(packed, layer, manifest, config)...)
			img, err := pullFrom(t, h, s)
			if len(h.over) > 0 {
				t.Errorf("read without end: %v", h.over)
			}
			list, lerr := s.List(t.Context())
			if lerr != nil || (err == nil) != (len(list) == 1) {
				t.Errorf("pull: %v; afterwards there are %d images, %v", err, len(list), lerr)
			}
			if err == nil {
				if _, err := s.Remove(t.Context(), img.ID, func(context.Context) (images.Needs, error) { return images.Needs{}, nil }); err != nil {
					t.Errorf("remove: %v", err)
				}
			}
			good := newHostile(manifest, config, packed...)
			if img, err := pullFrom(t, good, s); err != nil || img.ID != good.config {
				t.Errorf("afterwards: %v, %v", img.ID, err)
			}
		})
	})
}

// unpacked is what a layer holds, as far as it can be read.
func unpacked(layer []byte) []byte {
	var r io.Reader
	if z, err := gzip.NewReader(bytes.NewReader(layer)); err == nil {
		r = z
	} else if z, err := zstd.NewReader(bytes.NewReader(layer), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(8<<20)); err == nil && bytes.HasPrefix(layer, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		defer z.Close()
		r = z
	} else {
		return layer
	}
	b, _ := io.ReadAll(io.LimitReader(r, 8<<20))
	return b
}
