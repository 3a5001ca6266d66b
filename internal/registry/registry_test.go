package registry

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	random "github.com/google/go-containerregistry/pkg/v1/random"

	images "github.com/coffer-box/coffer/internal/image"
)

// server is a registry with something in front of it.
type server struct {
	*httptest.Server
	host string
	hits atomic.Int64
}

func newServer(t *testing.T, tls bool, front func(next http.Handler) http.Handler) *server {
	t.Helper()
	s := &server{}
	h := openRanges(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	if front != nil {
		h = front(h)
	}
	counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.hits.Add(1); h.ServeHTTP(w, r) })
	if tls {
		s.Server = httptest.NewTLSServer(counted)
	} else {
		s.Server = httptest.NewServer(counted)
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(s.Close)
	_, s.host, _ = strings.Cut(s.URL, "://")
	return s
}

// openRanges gives a range without an end the end of the blob, which the registry behind it does not know; where the first byte asked for
// is an odd one, it leaves it to fail.
func openRanges(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var first int64
		if n, _ := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &first); n == 1 && first%2 == 0 {
			head := httptest.NewRecorder()
			next.ServeHTTP(head, httptest.NewRequest(http.MethodHead, r.URL.Path, nil))
			var size int64
			if _, err := fmt.Sscan(head.Header().Get("Content-Length"), &size); err == nil {
				r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", first, size-1))
			}
		}
		next.ServeHTTP(w, r)
	})
}

// trust makes a directory of settings in which a server's certificate is trusted.
func (s *server) trust(t *testing.T, dir string) {
	t.Helper()
	certs := filepath.Join(dir, "certs.d", s.host)
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := errors.Join(os.MkdirAll(certs, 0o700), os.WriteFile(filepath.Join(certs, "ca.crt"), b, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func client(t *testing.T, cfg Config) *Client {
	t.Helper()
	if cfg.CertDirs == nil {
		cfg.CertDirs = []string{}
	}
	if cfg.Keychain == nil {
		cfg.Keychain = fileKeychain{filepath.Join(cfg.Dir, "auth.json")}
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.hosts.close)
	return c
}

func repo(t *testing.T, c *Client, host string) *Repository {
	t.Helper()
	r, err := c.Repository(host, "team/app")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func image(t *testing.T) v1.Image {
	t.Helper()
	img, err := random.Image(100_000, 2)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// checkPull reads an image back by its tag.
func checkPull(t *testing.T, r *Repository, img v1.Image) {
	t.Helper()
	want := must[v1.Hash](t)(img.Digest())
	if got, err := r.Digest(t.Context(), "1"); err != nil || got != want {
		t.Fatalf("digest %v, %v", got, err)
	}
	raw := must[[]byte](t)(r.Manifest(t.Context(), want, 1<<20))
	if got := must[[]byte](t)(img.RawManifest()); !bytes.Equal(got, raw) {
		t.Error("another manifest")
	}
	for _, l := range must[[]v1.Layer](t)(img.Layers()) {
		whole := must[[]byte](t)(io.ReadAll(must[io.ReadCloser](t)(l.Compressed())))
		for _, off := range []int64{0, 1000, 1001} {
			body, start, err := r.Blob(t.Context(), must[v1.Hash](t)(l.Digest()), off)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(body)
			body.Close()
			if err != nil || start != map[int64]int64{1000: 1000}[off] || !bytes.Equal(got, whole[start:]) {
				t.Errorf("blob from %d on: %d bytes from %d on, %v", off, len(got), start, err)
			}
		}
	}
}

func TestPushAndPull(t *testing.T) {
	dir := t.TempDir()
	s := newServer(t, true, nil)
	s.trust(t, dir)
	c := client(t, Config{Dir: dir, UserAgent: "coffer/test"})
	img := image(t)
	var last, total int64
	if got, err := repo(t, c, s.host).Push(t.Context(), img, "1", func(d, n int64) { last, total = d, n }); err != nil || got != must[v1.Hash](t)(img.Digest()) {
		t.Fatal(got, err)
	}
	if last != total || total < 100_000 {
		t.Errorf("progress ended with %d of %d", last, total)
	}
	checkPull(t, repo(t, c, s.host), img)
	_, err := repo(t, c, s.host).Digest(t.Context(), "none")
	if !errors.Is(err, images.ErrNotOffered) || !strings.Contains(err.Error(), s.host+"/team/app, none") {
		t.Errorf("an unknown tag: %v", err)
	}
}

// Without TLS a registry is reached only where that was said, and never with what it was not said for.
func TestPlainHTTP(t *testing.T) {
	s := newServer(t, false, nil)
	img := image(t)
	dir := t.TempDir()
	_, err := repo(t, client(t, Config{Dir: dir}), s.host).Push(t.Context(), img, "1", nil)
	if err == nil || !strings.Contains(err.Error(), "--plain-http") || !strings.Contains(err.Error(), "registries.json") {
		t.Errorf("not told: %v", err)
	}
	if n := s.hits.Load(); n != 0 {
		t.Errorf("it was asked %d times", n)
	}
	if _, err = repo(t, client(t, Config{Dir: dir, PlainHTTP: s.host}), s.host).Push(t.Context(), img, "1", nil); err != nil {
		t.Fatal(err)
	}
	settings(t, dir, fmt.Sprintf(`{"registries": {%q: {"plain_http": true}}}`, s.host))
	checkPull(t, repo(t, client(t, Config{Dir: dir}), s.host), img)

	// One with TLS sends nobody to where there is none.
	other := newServer(t, true, func(http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/v2/" {
				return
			}
			http.Redirect(w, r, "http://"+strings.Replace(s.host, "127.0.0.1", "localhost", 1)+r.URL.Path, http.StatusTemporaryRedirect)
		})
	})
	other.trust(t, dir)
	before := s.hits.Load()
	if _, err := repo(t, client(t, Config{Dir: dir}), other.host).Digest(t.Context(), "1"); !errors.Is(err, errPlain) {
		t.Errorf("redirected: %v", err)
	}
	if n := s.hits.Load(); n != before {
		t.Errorf("it was asked %d times", n-before)
	}
}

func settings(t *testing.T, dir, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "registries.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestBadSettings(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON":      `{`,
		"unknown":      `{"registries": {"h.example": {"insecure": true}}}`,
		"no host":      `{"registries": {"h.example/x": {}}}`,
		"no mirror":    `{"registries": {"docker.io": {"mirrors": ["mirror.example"]}}}`,
		"a user":       `{"registries": {"docker.io": {"mirrors": ["https://me:secret@mirror.example"]}}}`,
		"another type": `{"registries": ["docker.io"]}`,
	} {
		dir := t.TempDir()
		settings(t, dir, text)
		if _, err := New(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "registries.json") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCertificates(t *testing.T) {
	s := newServer(t, true, nil)
	dir := t.TempDir()
	_, err := repo(t, client(t, Config{Dir: dir}), s.host).Digest(t.Context(), "1")
	if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "certs.d", s.host, "ca.crt")) {
		t.Errorf("not trusted: %v", err)
	}
	if n := s.hits.Load(); n != 0 {
		t.Errorf("it was asked %d times", n)
	}
	// A certificate for another name is worth nothing.
	s.trust(t, dir)
	other := strings.Replace(s.host, "127.0.0.1", "localhost", 1)
	if err := os.Rename(filepath.Join(dir, "certs.d", s.host), filepath.Join(dir, "certs.d", other)); err != nil {
		t.Fatal(err)
	}
	if _, err := repo(t, client(t, Config{Dir: dir}), other).Digest(t.Context(), "1"); err == nil || !strings.Contains(err.Error(), "is not good") {
		t.Errorf("for another host: %v", err)
	}
	// By the settings, and as Docker has them.
	ca := filepath.Join(dir, "certs.d", other, "ca.crt")
	settings(t, dir, fmt.Sprintf(`{"registries": {%q: {"ca_file": %q}}}`, s.host, ca))
	if _, err := repo(t, client(t, Config{Dir: dir}), s.host).Digest(t.Context(), "1"); !errors.Is(err, images.ErrNotOffered) {
		t.Errorf("by the settings: %v", err)
	}
	docker := t.TempDir()
	s.trust(t, docker)
	if _, err := repo(t, client(t, Config{Dir: t.TempDir(), CertDirs: []string{filepath.Join(docker, "certs.d")}}), s.host).Digest(t.Context(), "1"); !errors.Is(err, images.ErrNotOffered) {
		t.Errorf("as Docker has them: %v", err)
	}
	if err := os.WriteFile(ca, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := repo(t, client(t, Config{Dir: dir}), s.host).Digest(t.Context(), "1"); err == nil || !strings.Contains(err.Error(), ca) {
		t.Errorf("no certificate: %v", err)
	}
}

// A certificate of ours is shown to a registry that wants one.
func TestClientCertificate(t *testing.T) {
	key := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	mine := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, mine, mine, &key.PublicKey, key))
	var seen atomic.Int64
	s := newServer(t, true, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			seen.Add(int64(len(r.TLS.PeerCertificates)))
			next.ServeHTTP(w, r)
		})
	})
	s.TLS.ClientAuth = 1 // tls.RequestClientCert
	dir := t.TempDir()
	s.trust(t, dir)
	certs := filepath.Join(dir, "certs.d", s.host)
	raw := must[[]byte](t)(x509.MarshalECPrivateKey(key))
	for name, block := range map[string]*pem.Block{"me.cert": {Type: "CERTIFICATE", Bytes: der}, "me.key": {Type: "EC PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(filepath.Join(certs, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := repo(t, client(t, Config{Dir: dir}), s.host).Digest(t.Context(), "1"); !errors.Is(err, images.ErrNotOffered) {
		t.Fatal(err)
	}
	if seen.Load() == 0 {
		t.Error("no certificate was shown")
	}
}

func TestMirrors(t *testing.T) {
	dir := t.TempDir()
	origin, first, second := newServer(t, true, nil), newServer(t, false, nil), newServer(t, true, nil)
	for _, s := range []*server{origin, second} {
		s.trust(t, dir)
	}
	settings(t, dir, fmt.Sprintf(`{"registries": {%q: {"mirrors": [%q, %q]}}}`, origin.host, first.URL, second.URL))
	c := client(t, Config{Dir: dir})
	img := image(t)
	// A push goes past them.
	if _, err := repo(t, c, origin.host).Push(t.Context(), img, "1", nil); err != nil {
		t.Fatal(err)
	}
	if first.hits.Load()+second.hits.Load() != 0 {
		t.Error("a mirror was asked for a push")
	}
	// Neither has it.
	checkPull(t, repo(t, c, origin.host), img)
	if first.hits.Load() == 0 || second.hits.Load() == 0 {
		t.Error("a mirror was not asked")
	}
	// The second has it.
	if _, err := repo(t, c, second.host).Push(t.Context(), img, "1", nil); err != nil {
		t.Fatal(err)
	}
	before := origin.hits.Load()
	checkPull(t, repo(t, c, origin.host), img)
	if origin.hits.Load() != before {
		t.Error("the registry was asked for what a mirror has")
	}
	// The first is gone, and the second loses something on the way.
	first.Close()
	r := repo(t, c, origin.host)
	if _, err := r.Digest(t.Context(), "1"); err != nil {
		t.Fatal(err)
	}
	second.Close()
	if _, err := r.Manifest(t.Context(), must[v1.Hash](t)(img.Digest()), 1<<20); err != nil {
		t.Errorf("after the mirror is gone: %v", err)
	}
}

// flaky fails the first n requests for blobs and manifests with a status.
func flaky(n int64, status int, after string) func(http.Handler) http.Handler {
	var seen atomic.Int64
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v2/" && r.Method == http.MethodGet && seen.Add(1) <= n {
				if after != "" {
					w.Header().Set("Retry-After", after)
				}
				w.WriteHeader(status)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func TestTriesAgain(t *testing.T) {
	for _, tc := range []struct {
		status int
		fails  int64
		after  string
		good   bool
	}{
		{http.StatusServiceUnavailable, 2, "", true},
		{http.StatusTooManyRequests, 3, "0", true},
		{http.StatusBadGateway, 100, "0", false},
		{http.StatusForbidden, 1, "", false},
	} {
		t.Run(fmt.Sprint(tc.status), func(t *testing.T) {
			s := newServer(t, false, flaky(tc.fails, tc.status, tc.after))
			c := client(t, Config{Dir: t.TempDir(), PlainHTTP: s.host})
			img := image(t)
			if _, err := repo(t, c, s.host).Push(t.Context(), img, "1", nil); err != nil {
				t.Fatal(err)
			}
			_, err := repo(t, c, s.host).Manifest(t.Context(), must[v1.Hash](t)(img.Digest()), 1<<20)
			if (err == nil) != tc.good {
				t.Errorf("error %v", err)
			}
			if tc.status == http.StatusForbidden && !errors.Is(err, images.ErrDenied) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// A registry that says when to come again is not asked before.
func TestRetryAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Duration
		start := time.Now()
		err := retry(t.Context(), func() error {
			at = append(at, time.Since(start))
			return &waitError{&net429{}, "7"}
		})
		if err == nil || len(at) != retries || at[1] != 7*time.Second {
			t.Errorf("asked at %v: %v", at, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { time.Sleep(time.Second); cancel() }()
		if err := retry(ctx, func() error { return &waitError{&net429{}, "7"} }); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}

// net429 is a failure that may be over the next time.
type net429 struct{}

func (*net429) Error() string   { return "too many requests" }
func (*net429) Timeout() bool   { return true }
func (*net429) Temporary() bool { return true }

// guard asks for a name and a password, directly or by way of a server of tokens.
func guard(t *testing.T, bearer bool) func(http.Handler) http.Handler {
	const user, password, token = "me", "secret", "the-token"
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			u, p, _ := r.BasicAuth()
			known := u == user && p == password
			if r.URL.Path == "/token" {
				if !known {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				if r.URL.Query().Get("service") != "reg" {
					t.Errorf("service %q", r.URL.Query().Get("service"))
				}
				_ = json.NewEncoder(w).Encode(map[string]string{"token": token})
				return
			}
			if bearer {
				known = r.Header.Get("Authorization") == "Bearer "+token
			}
			if !known {
				challenge := `Basic realm="reg"`
				if bearer {
					challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="reg"`, r.Host)
				}
				w.Header().Set("WWW-Authenticate", challenge)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, r)
		})
	}
}

func TestLogin(t *testing.T) {
	for name, bearer := range map[string]bool{"basic": false, "bearer": true} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("HOME", t.TempDir())
			t.Setenv("DOCKER_CONFIG", filepath.Join(t.TempDir(), "none"))
			s := newServer(t, false, guard(t, bearer))
			dir := t.TempDir()
			c := client(t, Config{Dir: dir, PlainHTTP: s.host})
			img := image(t)
			if _, err := repo(t, c, s.host).Push(t.Context(), img, "1", nil); !errors.Is(err, images.ErrDenied) || !strings.Contains(err.Error(), "coffer login "+s.host) {
				t.Errorf("a stranger: %v", err)
			}
			if _, err := c.Login(t.Context(), s.host, "me", "wrong"); !errors.Is(err, images.ErrDenied) {
				t.Errorf("a wrong password: %v", err)
			}
			if _, err := os.Stat(filepath.Join(dir, "auth.json")); err == nil {
				t.Error("a wrong password was kept")
			}
			file, err := c.Login(t.Context(), s.host, "me", "secret")
			if err != nil || file != filepath.Join(dir, "auth.json") {
				t.Fatal(file, err)
			}
			if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("credentials: %v, %v", fi.Mode(), err)
			}
			if _, err := repo(t, c, s.host).Push(t.Context(), img, "1", nil); err != nil {
				t.Fatal(err)
			}
			checkPull(t, repo(t, c, s.host), img)
			for i, want := range []bool{true, false} {
				if found, err := c.Logout(s.host); found != want || err != nil {
					t.Errorf("logout %d: %v, %v", i, found, err)
				}
			}
			if _, err := repo(t, c, s.host).Digest(t.Context(), "1"); !errors.Is(err, images.ErrDenied) {
				t.Errorf("after logout: %v", err)
			}
		})
	}
}

// Where Docker has a configuration, credentials are kept and found there, with its helper.
func TestDockersCredentials(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	conf := filepath.Join(home, ".docker")
	t.Setenv("DOCKER_CONFIG", conf)
	bin := t.TempDir()
	helper := `#!/bin/sh
f=` + bin + `/kept
case $1 in
store) cat >$f ;;
get) [ -f $f ] && cat $f || { echo "credentials not found in native keychain"; exit 1; } ;;
erase) rm -f $f ;;
esac
`
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	if err := errors.Join(os.Mkdir(conf, 0o700), os.WriteFile(filepath.Join(bin, "docker-credential-test"), []byte(helper), 0o755),
		os.WriteFile(filepath.Join(conf, "config.json"), []byte(`{"credsStore": "test"}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	s := newServer(t, false, guard(t, false))
	dir := t.TempDir()
	c := client(t, Config{Dir: dir, PlainHTTP: s.host, Keychain: authn.NewMultiKeychain(fileKeychain{filepath.Join(dir, "auth.json")}, authn.DefaultKeychain)})
	if file, err := c.Login(t.Context(), s.host, "me", "secret"); err != nil || file != filepath.Join(conf, "config.json") {
		t.Fatal(file, err)
	}
	if b, err := os.ReadFile(filepath.Join(bin, "kept")); err != nil || !bytes.Contains(b, []byte("secret")) {
		t.Errorf("the helper has %q, %v", b, err)
	}
	if b, _ := os.ReadFile(filepath.Join(conf, "config.json")); bytes.Contains(b, []byte("secret")) {
		t.Error("the configuration has the password, too")
	}
	img := image(t)
	if _, err := repo(t, c, s.host).Push(t.Context(), img, "1", nil); err != nil {
		t.Fatal(err)
	}
	checkPull(t, repo(t, c, s.host), img)
	if found, err := c.Logout(s.host); !found || err != nil {
		t.Error(found, err)
	}
}

// Credentials go to the registry that they are for, and not to where it sends us.
func TestCredentialsStayAtHome(t *testing.T) {
	var mu sync.Mutex
	var leaked []string
	cdn := newServer(t, false, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			defer mu.Unlock()
			if a := r.Header.Get("Authorization"); a != "" {
				leaked = append(leaked, a)
			}
			next.ServeHTTP(w, r)
		})
	})
	away := false
	s := newServer(t, false, func(next http.Handler) http.Handler {
		return guard(t, false)(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if away && strings.Contains(r.URL.Path, "/blobs/") {
				http.Redirect(w, r, cdn.URL+r.URL.Path, http.StatusTemporaryRedirect)
				return
			}
			next.ServeHTTP(w, r)
		}))
	})
	dir := t.TempDir()
	settings(t, dir, fmt.Sprintf(`{"registries": {%q: {"plain_http": true}, %q: {"plain_http": true}}}`, s.host, cdn.host))
	t.Setenv("HOME", t.TempDir())
	t.Setenv("DOCKER_CONFIG", filepath.Join(t.TempDir(), "none"))
	c := client(t, Config{Dir: dir})
	if _, err := c.Login(t.Context(), s.host, "me", "secret"); err != nil {
		t.Fatal(err)
	}
	img := image(t)
	for _, host := range []string{s.host, cdn.host} {
		if _, err := repo(t, c, host).Push(t.Context(), img, "1", nil); err != nil {
			t.Fatal(err)
		}
	}
	away = true
	checkPull(t, repo(t, c, s.host), img)
	mu.Lock()
	defer mu.Unlock()
	if len(leaked) > 0 {
		t.Errorf("another host got %q", leaked)
	}
}

func TestNobodyThere(t *testing.T) {
	s := newServer(t, false, nil)
	s.Close()
	_, err := repo(t, client(t, Config{Dir: t.TempDir(), PlainHTTP: s.host}), s.host).Digest(t.Context(), "1")
	if err == nil || !strings.Contains(err.Error(), "cannot reach "+s.host) {
		t.Errorf("error %v", err)
	}
	_, err = repo(t, client(t, Config{Dir: t.TempDir()}), s.host).Digest(t.Context(), "1")
	if err == nil || !strings.Contains(err.Error(), "cannot reach "+s.host) {
		t.Errorf("with TLS: error %v", err)
	}
	_, err = repo(t, client(t, Config{Dir: t.TempDir()}), "registry.invalid").Digest(t.Context(), "1")
	if err == nil || !strings.Contains(err.Error(), "cannot find registry.invalid") {
		t.Errorf("error %v", err)
	}
}

func TestRangeStart(t *testing.T) {
	for s, want := range map[string]int64{"bytes 100-199/200": 100, "bytes 0-1/*": 0, "": -1, "bytes */200": -1, "bytes -5-6/7": -1, "100-199": -1} {
		got, err := rangeStart(s)
		if (err != nil) != (want < 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
}

func TestCanonical(t *testing.T) {
	for s, want := range map[string]string{
		"": DockerHub, "docker.io": DockerHub, "index.docker.io": DockerHub, "https://index.docker.io/v1/": DockerHub,
		"https://reg.example/": "reg.example", "reg.example:5000": "reg.example:5000",
	} {
		if got := Canonical(s); got != want {
			t.Errorf("%q: %q", s, got)
		}
	}
}

// Credentials that are kept by Docker take the place of those from before it was there.
func TestOlderCredentials(t *testing.T) {
	home, dir := t.TempDir(), t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("DOCKER_CONFIG", "")
	s := newServer(t, false, guard(t, false))
	c := client(t, Config{Dir: dir, PlainHTTP: s.host})
	if _, err := c.Login(t.Context(), s.host, "me", "secret"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Mkdir(filepath.Join(home, ".docker"), 0o700), os.WriteFile(filepath.Join(home, ".docker", "config.json"), []byte(`{}`), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Login(t.Context(), s.host, "me", "secret"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "auth.json")); err != nil || strings.Contains(string(b), s.host) {
		t.Errorf("auth.json: %s, %v", b, err)
	}
}
