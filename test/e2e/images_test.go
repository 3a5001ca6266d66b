package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// refName is where an OCI layout keeps the name of an image.
const refName = "org.opencontainers.image.ref.name"

// realImage is an image of Debian's packages: its layers, besides the one that all share, and its configuration.
type realImage struct {
	layers []string
	config v1.Config
}

func realImages() map[string]realImage {
	path := "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	return map[string]realImage{
		"minbase": {config: v1.Config{Env: []string{path}, Cmd: []string{"bash"}}},
		"python": {[]string{"python", "app"}, v1.Config{Env: []string{path, "PYTHONUNBUFFERED=1"}, User: "app", WorkingDir: "/srv/app",
			Entrypoint: []string{"python3"}, Cmd: []string{"-"}}},
		"gcc": {[]string{"gcc"}, v1.Config{Env: []string{path}, WorkingDir: "/src", Cmd: []string{"bash"}}},
		"node": {[]string{"node"}, v1.Config{Env: []string{path, "NODE_ENV=production"}, User: "nobody:nogroup", Entrypoint: []string{"node"},
			Cmd: []string{"-"}}},
		"postgres": {[]string{"postgres", "data"}, v1.Config{Env: []string{path + ":/usr/lib/postgresql/15/bin", "PGDATA=/var/lib/postgresql/data"},
			User: "postgres", Entrypoint: []string{"/usr/local/bin/entry"}, Cmd: []string{"postgres"}, StopSignal: "SIGINT",
			Volumes: map[string]struct{}{"/var/lib/postgresql/data": {}}, ExposedPorts: map[string]struct{}{"5432/tcp": {}}}},
	}
}

// imagesLayout is the OCI layout that holds the real images, made once.
func imagesLayout(t *testing.T) layout.Path {
	t.Helper()
	if testing.Short() {
		t.Skip("images of Debian's packages take a minute to make; this is -short")
	}
	dir, why, err := makeImages()
	if err != nil {
		t.Fatal(err)
	}
	if why != "" {
		t.Skip("making images of Debian's packages: " + why)
	}
	p, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

//go:embed testdata/images.sh
var imagesScript []byte

var makeImages = onceMade(func() (dir, why string, err error) {
	dir = filepath.Join(os.TempDir(), "coffer-test-images-1")
	if _, err := os.Stat(dir); err == nil {
		return dir, "", nil
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil || os.Geteuid() != 0 {
		return "", "it takes root and mmdebstrap (apt-get install mmdebstrap)", nil
	}
	work, err := os.MkdirTemp(os.TempDir(), "coffer-images-")
	if err != nil {
		return "", "", err
	}
	defer os.RemoveAll(work)
	at := func(elem ...string) string { return filepath.Join(append([]string{work}, elem...)...) }
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.MkdirAll(at("try", d), 0o755); err != nil {
			return "", "", err
		}
	}
	if out, err := exec.Command("unshare", "-m", "--propagation", "private", "mount", "-t", "overlay", "overlay", "-o",
		fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", at("try")), at("try", "merged")).CombinedOutput(); err != nil {
		return "", fmt.Sprintf("this host mounts no overlay in %s: %v: %s", os.TempDir(), err, out), nil
	}
	if err := os.WriteFile(at("images.sh"), imagesScript, 0o600); err != nil {
		return "", "", err
	}
	c := exec.Command("mmdebstrap", "--quiet", "--format=tar", "--variant=minbase", "--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=force-unsafe-io",
		fmt.Sprintf("--customize-hook=sh %s \"$1\" %s", at("images.sh"), at("layers")), "bookworm", at("base.tar"))
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Run(); err != nil {
		return "", "", fmt.Errorf("mmdebstrap: %w: %s", err, errs.String())
	}
	if err := writeImages(at("layout"), at("base.tar"), at("layers")); err != nil {
		return "", "", err
	}
	if out, err := exec.Command("chmod", "-R", "a+rX", at("layout")).CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("chmod: %w: %s", err, out)
	}
	// In one step, so that nobody ever finds half of it; who was first has made the same.
	if err := os.Rename(at("layout"), dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", "", err
	}
	return dir, "", nil
})

// onceMade is sync.OnceValues for what can be impossible here, too: then it returns why.
func onceMade(fn func() (made, why string, err error)) func() (made, why string, err error) {
	var made, why string
	get := sync.OnceValue(func() (err error) { made, why, err = fn(); return err })
	return func() (string, string, error) { err := get(); return made, why, err }
}

// writeImages writes the layout: from the archive of the shared layer, and the overlays of the others.
func writeImages(to, base, overlays string) error {
	layers, errs := map[string]v1.Layer{}, map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, name := range []string{"base", "python", "app", "gcc", "node", "postgres", "data"} {
		wg.Go(func() {
			l, err := packLayer(filepath.Join(overlays, name+".tar.gz"), func(w io.Writer) error {
				if name != "base" {
					return packUpper(w, filepath.Join(overlays, name, "upper"))
				}
				f, err := os.Open(base)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = io.Copy(w, f)
				return err
			})
			mu.Lock()
			defer mu.Unlock()
			layers[name], errs[name] = l, err
		})
	}
	wg.Wait()
	for name, err := range errs {
		if err != nil {
			return fmt.Errorf("layer %s: %w", name, err)
		}
	}
	p, err := layout.Write(to, empty.Index)
	if err != nil {
		return err
	}
	for ref, ri := range realImages() {
		img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		for _, l := range append([]string{"base"}, ri.layers...) {
			if img, err = mutate.AppendLayers(img, layers[l]); err != nil {
				return err
			}
		}
		cf, err := img.ConfigFile()
		if err != nil {
			return err
		}
		cf = cf.DeepCopy()
		cf.OS, cf.Architecture, cf.Config = "linux", runtime.GOARCH, ri.config
		if img, err = mutate.ConfigFile(img, cf); err != nil {
			return err
		}
		if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{refName: ref})); err != nil {
			return err
		}
	}
	return nil
}

func packLayer(path string, pack func(io.Writer) error) (v1.Layer, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(pack(z), z.Close()); err != nil {
		return nil, err
	}
	return tarball.LayerFromFile(path, tarball.WithMediaType(types.OCILayer))
}

// packUpper packs the upper directory of a kernel's overlay as a layer.
func packUpper(out io.Writer, upper string) error {
	w := tar.NewWriter(out)
	links := map[uint64]string{} // names of files with several, by inode
	err := filepath.WalkDir(upper, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == upper {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(upper, p)
		st := fi.Sys().(*syscall.Stat_t)
		if st.Mode&syscall.S_IFMT == syscall.S_IFCHR && st.Rdev == 0 {
			return w.WriteHeader(&tar.Header{Name: filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), Typeflag: tar.TypeReg})
		}
		var target string
		if fi.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, target)
		if err != nil {
			return err
		}
		h.Format, h.Uname, h.Gname, h.AccessTime, h.ChangeTime = tar.FormatPAX, "", "", time.Time{}, time.Time{}
		h.Name = name
		if fi.IsDir() {
			h.Name += "/"
		}
		if first := links[st.Ino]; first != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else if st.Nlink > 1 && !fi.IsDir() {
			links[st.Ino] = name
		}
		h.PAXRecords = map[string]string{}
		opaque := false
		for _, x := range []string{"security.capability", "trusted.overlay.opaque"} {
			b := make([]byte, 256)
			n, err := unix.Lgetxattr(p, x, b)
			switch {
			case err != nil:
			case x == "trusted.overlay.opaque":
				opaque = n > 0
			case h.Typeflag != tar.TypeLink:
				h.PAXRecords["SCHILY.xattr."+x] = string(b[:n])
			}
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if opaque {
			if err := w.WriteHeader(&tar.Header{Name: filepath.Join(name, ".wh..wh..opq"), Typeflag: tar.TypeReg}); err != nil {
				return err
			}
		}
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
	return errors.Join(err, w.Close())
}

// layoutImages are the images of a layout, by name.
func layoutImages(t *testing.T, p layout.Path) map[string]v1.Image {
	t.Helper()
	idx, err := p.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	man, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	imgs := map[string]v1.Image{}
	for _, d := range man.Manifests {
		if imgs[d.Annotations[refName]], err = p.Image(d.Digest); err != nil {
			t.Fatal(err)
		}
	}
	return imgs
}

// TestImagesLayout makes the images that other tests use, so that they are there for those of an ordinary user, who cannot.
func TestImagesLayout(t *testing.T) { t.Log(imagesLayout(t)) }

// sendImages puts images into a registry, without any of Coffer's doing, and returns their names there.
func sendImages(t *testing.T, host string, cert []byte, imgs map[string]v1.Image) map[string]string {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	rt := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	defer rt.CloseIdleConnections()
	refs := map[string]string{}
	for n, img := range imgs {
		refs[n] = host + "/real/" + n + ":12"
		tag, err := name.NewTag(refs[n])
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(tag, img, remote.WithTransport(rt), remote.WithAuth(&authn.Basic{Username: registryUser, Password: registryPassword})); err != nil {
			t.Fatal(err)
		}
	}
	return refs
}

// TestRealImages pulls images of Debian's packages from Debian's registry and has each do its work.
func TestRealImages(t *testing.T) {
	noDocker(t)
	p := imagesLayout(t)
	imgs := layoutImages(t, p)
	host, cert := debianRegistry(t)
	refs := sendImages(t, host, cert, imgs)
	h := customer(t, host, cert)
	lister := listerProgram(t)
	works := []struct {
		name string
		work func(*testing.T, *home, string)
	}{{"minbase", minbaseWork}, {"gcc", gccWork}, {"python", pythonWork}, {"node", nodeWork}, {"postgres", postgresWork}}
	pulled := false
	for _, w := range works {
		t.Run(w.name, func(t *testing.T) {
			h := &home{t: t, bin: h.bin, dir: h.dir}
			layers, err := imgs[w.name].Layers()
			if err != nil {
				t.Fatal(err)
			}
			base, err := layers[0].Digest()
			if err != nil {
				t.Fatal(err)
			}
			_, steps, code := h.all("pull", "--progress", "json", refs[w.name])
			if code != 0 {
				t.Fatalf("pull: %s", steps)
			}
			// What the images share comes once.
			have := slices.ContainsFunc(strings.Split(steps, "\n"), func(s string) bool {
				return strings.Contains(s, base.String()) && strings.Contains(s, `"exists"`)
			})
			if have != pulled {
				t.Errorf("of a shared layer that had come before (%v) a pull says %v", pulled, have)
			}
			pulled = true
			w.work(t, h, refs[w.name])
			if len(realImages()[w.name].layers) < 2 {
				return // the others have the same lowest layer, and of these each has all that theirs have
			}
			t.Run("files", func(t *testing.T) {
				want := umociListing(t, lister, p, w.name, imgs[w.name])
				conforms(t, boxListing(t, &home{t: t, bin: h.bin, dir: h.dir}, lister, refs[w.name]), want, nil)
			})
		})
	}
}

// feed runs a command with an input and returns what it prints.
func (h *home) feed(input string, args ...string) string {
	h.t.Helper()
	c := h.cmd(args...)
	c.Stdin = strings.NewReader(input)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		h.t.Fatalf("coffer %s: %v: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// minbaseWork: every file of every package is what the package says, and packages are made and installed.
func minbaseWork(t *testing.T, h *home, ref string) {
	const check = `cd / && cat /var/lib/dpkg/info/*.md5sums | grep -v -e ' usr/share/man/' -e ' usr/share/locale/' >/tmp/sums && md5sum --quiet -c /tmp/sums && wc -l </tmp/sums`
	got := h.run("run", "--rm", ref, "bash", "-c", check)
	var files int
	if _, err := fmt.Sscan(got, &files); err != nil || files < 1000 {
		t.Errorf("files that are what their packages say: %q", got)
	}
	if got := h.run("run", "--rm", ref, "sh", "-c", debWork); got != "data\nStatus: install ok installed" {
		t.Errorf("dpkg: %q", got)
	}
}

//go:embed testdata/work.c
var workC string

func gccWork(t *testing.T, h *home, ref string) {
	// The working directory is made for the image wants it.
	got := h.feed(workC, "run", "-i", "--rm", ref, "sh", "-c", "pwd && cat >work.c && gcc -O2 -Wall -Werror -pthread -o work work.c && ./work")
	if got != "/src\n148933" {
		t.Errorf("the compiled program: %q", got)
	}
}

//go:embed testdata/work.py
var workPy string

func pythonWork(t *testing.T, h *home, ref string) {
	if got, want := h.feed(workPy, "run", "-i", "--rm", ref), "(20000, 20000, 199990000) ok\nTLSv1.3\nTrue"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

//go:embed testdata/work.js
var workJS string

func nodeWork(t *testing.T, h *home, ref string) {
	if got, want := h.feed(workJS, "run", "-i", "--rm", ref), "files true\nanswers 20\nthread 499500"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// postgresWork: a database is made, works, is killed at work and comes back with what was committed, and is stopped in order.
func postgresWork(t *testing.T, h *home, ref string) {
	h.run("run", "-d", "--name", "pg", ref)
	defer func() {
		if t.Failed() {
			logs, errs, _ := h.all("logs", "-n", "40", "pg")
			t.Logf("the database's log:\n%s%s", logs, errs)
		}
		h.run("rm", "-f", "-v", "pg")
	}()
	starts := 0
	ready := func() {
		t.Helper()
		starts++
		// Its log is watched, and nothing executed beside it: the main process has not the same number in every start, and a database that
		// finds a process of its user with the number of its predecessor, which was killed, does not start.
		until(t, "the database is ready", func() bool {
			logs, errs, _ := h.all("logs", "pg")
			return strings.Count(logs+errs, "ready to accept connections") == starts
		})
		h.run("exec", "pg", "pg_isready", "-q", "-h", "127.0.0.1")
	}
	query := func(sql string) string {
		t.Helper()
		return h.run("exec", "pg", "psql", "-h", "127.0.0.1", "-Atc", sql, "postgres")
	}
	ready()
	h.run("exec", "pg", "pgbench", "-q", "-i", "-h", "127.0.0.1", "postgres")
	h.run("exec", "pg", "pgbench", "-h", "127.0.0.1", "-c", "4", "-j", "2", "-t", "50", "postgres")
	const count = "select (select count(*) from pgbench_accounts), (select count(*) from pgbench_history), " +
		"(select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)"
	if got := query(count); got != "100000|200|t" {
		t.Errorf("after pgbench: %s", got)
	}

	// Somebody is at work when it is killed: what was told to be committed stays.
	c := h.cmd("exec", "-i", "pg", "psql", "-h", "127.0.0.1", "-qAt", "postgres")
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "create table kept as select generate_series(1, 5000) x; begin; delete from kept; select 'deleted';\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "deleted\n" {
		t.Fatalf("its transaction is not open: %q, %v", line, err)
	}
	h.run("kill", "pg")
	h.run("wait", "pg")
	in.Close()
	_ = c.Wait()
	h.run("start", "pg")
	ready()
	if logs, errs, _ := h.all("logs", "pg"); !strings.Contains(logs+errs, "automatic recovery in progress") {
		t.Errorf("nothing was recovered:\n%s%s", logs, errs)
	}
	if got := query(count); got != "100000|200|t" {
		t.Errorf("after the kill: %s", got)
	}
	if got := query("select count(*) from kept"); got != "5000" {
		t.Errorf("after the kill: %s of the rows that were committed", got)
	}

	h.run("stop", "pg")
	if got := h.field("pg", "{{.ExitCode}} {{.Reason}} {{.StopSignal}}"); got != "0 stopped SIGINT" {
		t.Errorf("it ended with %s", got)
	}
	data := filepath.Join(h.dir, "control")
	if err := os.MkdirAll(filepath.Join(data, "global"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.run("cp", "pg:/var/lib/postgresql/data/global/pg_control", filepath.Join(data, "global", "pg_control"))
	if err := os.Chmod(filepath.Join(data, "global", "pg_control"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := h.run("run", "--rm", "-v", data+":/control:ro", "--entrypoint", "pg_controldata", ref, "/control"); !strings.Contains(got, "shut down\n") {
		t.Errorf("the database was not shut down:\n%s", got)
	}
}
