package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// A name and a password that the registry knows, the latter as bcrypt has it.
const (
	registryUser     = "me"
	registryPassword = "secret"
	registryHash     = "$2a$05$fqyMhEM5t5AbH8uZdiEIuOJe0ebfLrL/uLrvVt5gJZUjVJ7w0SeAC"
)

// debianRegistry starts Debian's registry of images with TLS and a password on loopback. It returns its host, and its certificate.
func debianRegistry(t *testing.T) (host string, cert []byte) {
	t.Helper()
	bin := os.Getenv("COFFER_TEST_REGISTRY")
	if cache, err := os.UserCacheDir(); bin == "" && err == nil {
		bin = filepath.Join(cache, "coffer-test", "docker-registry")
	}
	if _, err := os.Stat(bin); err != nil {
		t.Skip("Debian's docker-registry is not there: sh test/deps.sh gets it")
	}
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host = l.Addr().String()
	l.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, b := range map[string][]byte{
		"cert.pem": cert,
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}),
		"htpasswd": []byte(registryUser + ":" + registryHash + "\n"),
		"config.yml": fmt.Appendf(nil, `version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: %[1]s/data}}
auth: {htpasswd: {realm: test, path: %[1]s/htpasswd}}
http: {addr: %[2]s, tls: {certificate: %[1]s/cert.pem, key: %[1]s/key.pem}}
`, dir, host),
	} {
		if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.Command(bin, "serve", filepath.Join(dir, "config.yml"))
	var log bytes.Buffer
	c.Stdout, c.Stderr = &log, &log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
		if t.Failed() {
			t.Logf("the registry's log:\n%s", log.String())
		}
	})
	until(t, "the registry answers", func() bool {
		conn, err := net.Dial("tcp", host)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return host, cert
}

// customer makes a home that trusts a registry and has logged in to it.
func customer(t *testing.T, host string, cert []byte) *home {
	t.Helper()
	h := newHome(t)
	certs := filepath.Join(h.dir, "certs.d", host)
	if err := os.MkdirAll(certs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(certs, "ca.crt"), cert, 0o600); err != nil {
		t.Fatal(err)
	}
	c := h.cmd("login", "-u", registryUser, "--password-stdin", host)
	c.Stdin = strings.NewReader(registryPassword + "\n")
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("login: %v: %s", err, out)
	}
	return h
}

// noDocker keeps the credentials of whoever runs the tests out of them.
func noDocker(t *testing.T) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir())
}

// TestProxy: registries are reached by the proxy of the environment, where nothing else knows their names.
func TestProxy(t *testing.T) {
	noDocker(t)
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host != "registry.invalid:5000" {
			http.Error(w, "not by this proxy: "+r.URL.Host, http.StatusBadGateway)
			return
		}
		reg.ServeHTTP(w, r)
	}))
	defer proxy.Close()
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "")
	const ref = "registry.invalid:5000/base:1"
	a, b := newHome(t), newHome(t)
	a.run("run", "--rm", "base", "true")
	a.run("tag", "base", ref)
	a.run("push", "--plain-http", ref)
	b.run("pull", "--plain-http", ref)
	if got := b.run("run", "--rm", "--pull", "never", ref, "echo", "hi"); got != "hi" {
		t.Errorf("run: %q", got)
	}
}

// TestRegistry: an image goes through Debian's registry, with TLS and a password, from one home to another.
func TestRegistry(t *testing.T) {
	noDocker(t)
	host, cert := debianRegistry(t)
	a := customer(t, host, cert)
	ref := host + "/team/base:1"
	a.run("run", "--rm", "base", "true")
	a.run("tag", "base", ref)
	a.run("push", ref)
	b := customer(t, host, cert)
	if got := b.run("run", "--rm", ref, "echo", "hi"); got != "hi" {
		t.Errorf("run: %q", got)
	}
	if out := b.run("pull", ref); !strings.Contains(out, "up to date") {
		t.Errorf("pull: %q", out)
	}
	b.run("logout", host)
	if _, errs, code := b.all("pull", ref); code != 125 || !strings.Contains(errs, "coffer login "+host) {
		t.Errorf("without a password: exit code %d: %s", code, errs)
	}
	c := b.cmd("login", "-u", registryUser, "--password-stdin", host)
	c.Stdin = strings.NewReader("wrong\n")
	if out, err := c.CombinedOutput(); err == nil || !strings.Contains(string(out), "does not take this name and password") {
		t.Errorf("with a wrong password: %v: %s", err, out)
	}
	stranger := newHome(t)
	if _, errs, code := stranger.all("pull", ref); code != 125 || !strings.Contains(errs, "signed by nobody who is trusted here") {
		t.Errorf("without its certificate: exit code %d: %s", code, errs)
	}
}

// TestPullKilled: a pull of a real system may be killed, with all that it has started, at any moment. Whatever has come is of use to the
// next one, and the image that comes of it in the end does real work.
func TestPullKilled(t *testing.T) {
	noDocker(t)
	root := debianRoot(t)
	host, cert := debianRegistry(t)
	tag, err := name.NewTag(host + "/debian:12")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "debian.tar")
	if err := tarball.WriteToFile(archive, tag, debianImage(t, root)); err != nil {
		t.Fatal(err)
	}
	a := customer(t, host, cert)
	a.run("load", "-i", archive)
	a.run("push", tag.String())

	b := customer(t, host, cert)
	come := func() (n int64) {
		for _, pattern := range []string{"pull/*.part", "blobs/sha256/*"} {
			files, _ := filepath.Glob(filepath.Join(b.dir, "images", pattern))
			for _, f := range files {
				if fi, err := os.Stat(f); err == nil {
					n += fi.Size()
				}
			}
		}
		return n
	}
	kills, last := 0, int64(0)
	for i := range 12 {
		c := b.cmd("pull", "--progress", "json", tag.String())
		var steps bytes.Buffer
		c.Stderr = &steps
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- c.Wait() }()
		// The moment is given by what has come, and not by the clock.
		want, killed := last+int64(i)<<20, false
	watch:
		for {
			select {
			case err := <-done:
				if err != nil && !killed {
					t.Fatalf("pull: %v: %s", err, steps.String())
				}
				break watch
			case <-time.After(time.Millisecond):
			}
			if !killed && come() > want {
				killed = true
				_ = c.Process.Kill()
				kills++
			}
		}
		// What the pull had started ends with it.
		until(t, "nothing is left of a pull", func() bool { return len(b.live()) == 0 })
		now := come()
		if now < last {
			t.Errorf("round %d: %d bytes had come, and %d are there", i, last, now)
		}
		last = now
		b.run("images")
		if !killed {
			break
		}
	}
	if kills < 5 {
		t.Errorf("only %d of the pulls were killed", kills)
	}
	t.Logf("%d pulls were killed; %d bytes had come by the last one", kills, last)
	b.run("pull", tag.String())
	if left, _ := filepath.Glob(filepath.Join(b.dir, "images", "pull", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if out := b.run("run", "--rm", tag.String(), "python3", "-c", pyWork); strings.TrimSpace(out) != "20 3" {
		t.Errorf("python: %q", out)
	}
	b.run("rmi", tag.String())
	if left, _ := filepath.Glob(filepath.Join(b.dir, "images", "blobs/sha256/*")); len(left) > 0 {
		t.Errorf("left after rmi: %v", left)
	}
}

// TestPullsTogether: processes that pull the same image at once fetch it once, and every one succeeds.
func TestPullsTogether(t *testing.T) {
	noDocker(t)
	host, cert := debianRegistry(t)
	a := customer(t, host, cert)
	a.run("run", "--rm", "base", "true")
	for i := range 2 {
		a.run("tag", "base", host+"/base:"+strconv.Itoa(i))
		a.run("push", host+"/base:"+strconv.Itoa(i))
	}
	b := customer(t, host, cert)
	var cmds []*exec.Cmd
	var outs []*bytes.Buffer
	for i := range 6 {
		c := b.cmd("pull", "--progress", "json", host+"/base:"+strconv.Itoa(i%2))
		var out bytes.Buffer
		c.Stderr = &out
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		cmds, outs = append(cmds, c), append(outs, &out)
	}
	downloads := 0
	for i, c := range cmds {
		if err := c.Wait(); err != nil {
			t.Errorf("pull: %v: %s", err, outs[i])
		}
		if strings.Contains(outs[i].String(), `"downloading"`) {
			downloads++
		}
	}
	if downloads != 1 {
		t.Errorf("%d of them downloaded", downloads)
	}
}
