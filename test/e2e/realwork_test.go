package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// debianRoot is the archive of a Debian 12 root file system with an interpreter, a compiler and a database in it, made once.
func debianRoot(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("a Debian root takes a minute to make; this is -short")
	}
	path, err := makeDebian()
	if err != nil {
		t.Fatal(err)
	}
	if path == "" {
		t.Skip("making a Debian root needs root and mmdebstrap (apt-get install mmdebstrap)")
	}
	return path
}

var makeDebian = sync.OnceValues(func() (string, error) {
	path := filepath.Join(os.TempDir(), "coffer-test-bookworm-2.tar")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil || os.Geteuid() != 0 {
		return "", nil
	}
	// Of its own, for several test programs may make it at once, and renamed when it is whole.
	dir, err := os.MkdirTemp(os.TempDir(), "coffer-debian-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "root.tar")
	c := exec.Command("mmdebstrap", "--quiet", "--format=tar", "--variant=minbase", "--include=python3,gcc,libc6-dev,sqlite3", "bookworm", tmp)
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Run(); err != nil {
		return "", &exec.Error{Name: "mmdebstrap: " + errs.String(), Err: err}
	}
	if err := os.Chmod(tmp, 0o644); err != nil {
		return "", err
	}
	return path, os.Rename(tmp, path)
})

// TestDebianRoot makes the root that other tests use, so that it is there for those of an ordinary user, who cannot.
func TestDebianRoot(t *testing.T) { t.Log(debianRoot(t)) }

const pyWork = `
import sqlite3, subprocess, threading
db = sqlite3.connect('/root/work.db')
db.execute('create table t (x integer)')
sums = []
threads = [threading.Thread(target=lambda i=i: sums.append(sum(range(i)))) for i in range(20)]
[t.start() for t in threads]
[t.join() for t in threads]
db.executemany('insert into t values (?)', [(s,) for s in sums])
db.commit()
rc = subprocess.run('exit 3', shell=True).returncode
out = subprocess.check_output(['sqlite3', '/root/work.db', 'select count(*) from t']).decode().strip()
print(out, rc)
`

const debWork = `set -e
mkdir -p /tmp/p/DEBIAN /tmp/p/opt
printf 'Package: hi\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.com>\nDescription: x\n' > /tmp/p/DEBIAN/control
echo data > /tmp/p/opt/hi
dpkg-deb -b /tmp/p /tmp/hi.deb > /dev/null
dpkg -i /tmp/hi.deb > /dev/null
cat /opt/hi
dpkg -s hi | grep ^Status`

// TestRealWork loads a real system in every format and does real work in it.
func TestRealWork(t *testing.T) {
	root := debianRoot(t)
	dir := t.TempDir()
	img := debianImage(t, root)
	tag, err := name.NewTag("debian-test:archive")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "archive.tar")
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		t.Fatal(err)
	}
	oci := filepath.Join(dir, "oci")
	p, err := layout.Write(oci, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "debian-test:oci"})); err != nil {
		t.Fatal(err)
	}
	h := newHome(t)
	h.run("load", "-i", archive)
	h.run("load", "-i", oci)
	h.run("import", root, "debian-test:plain", "-c", "CMD [\"/bin/bash\"]")
	for _, ref := range []string{"debian-test:archive", "debian-test:oci", "debian-test:plain"} {
		if os.Geteuid() != 0 && ref != "debian-test:oci" {
			continue // how an image was loaded is the same for everybody, and root has seen all
		}
		t.Run(ref, func(t *testing.T) { realWork(t, h, ref) })
	}
	// Where the box's kernel holds the pages of files itself.
	t.Run("with a quota", func(t *testing.T) {
		realWork(t, h, "debian-test:oci", "--disk-size", "1g")
		mappedWork(t, h, "debian-test:oci")
	})
	t.Run("gigabyte", func(t *testing.T) { gigabyte(t, h) })
}

func debianImage(t *testing.T, root string) v1.Image {
	t.Helper()
	layer, err := tarball.LayerFromFile(root)
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer, oddLayer(t))
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture = "linux", runtime.GOARCH
	cf.Config.Cmd = []string{"/bin/bash"}
	cf.Config.Env = []string{"GREETING=hello"}
	img, err = mutate.ConfigFile(img, cf)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// oddLayer holds what layers may hold beside plain files.
func oddLayer(t *testing.T) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "odd/", Mode: 0o2775, Uid: 70000, Gid: 70001},
		{Typeflag: tar.TypeReg, Name: "odd/file", Mode: 0o4750, Uid: 1234, Gid: 5678},
		{Typeflag: tar.TypeLink, Name: "odd/hard", Linkname: "odd/file"},
		{Typeflag: tar.TypeReg, Name: "odd/told", Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.origin": "image"}},
		{Typeflag: tar.TypeChar, Name: "odd/null", Mode: 0o666, Devmajor: 1, Devminor: 3},
		{Typeflag: tar.TypeFifo, Name: "odd/fifo", Mode: 0o600},
		{Typeflag: tar.TypeReg, Name: "etc/.wh.issue"},
		{Typeflag: tar.TypeReg, Name: "usr/games/.wh..wh..opq"},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	addTree(t, w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// addTree adds the tree that pyFiles works on.
func addTree(t *testing.T, w *tar.Writer) {
	t.Helper()
	add := func(h tar.Header, content string) {
		h.Name, h.Size, h.ModTime = "tree/"+h.Name, int64(len(content)), time.Unix(2000, 0)
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"", "d/", "d/sub/", "full/", "full/x/", "links/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}, "")
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "e/", Mode: 0o1777}, "")
	for _, f := range []string{"a", "c", "d/sub/g", "full/x/y"} {
		add(tar.Header{Typeflag: tar.TypeReg, Name: f}, strings.Repeat(f, 10))
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "big"}, strings.Repeat("big", 100000))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "b", Mode: 0o4711}, "b")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "d/f", Uid: 70000, Gid: 123}, "f")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "c2", Linkname: "tree/c"}, "")
	for name, target := range map[string]string{"s": "a", "d/up": "../a", "dangling": "nowhere", "d/dl": "sub", "longlink": strings.Repeat("x", 3000)} {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, Uid: 5, Gid: 6}, "")
	}
	add(tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"}, "")
	for i := range 300 {
		add(tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("links/n%d", i)}, "n")
	}
}

// pyFiles does the same things to files of an image and to files in memory.
//
//go:embed testdata/files.py
var pyFiles string

// pyOdd tells what became of oddLayer's files.
const pyOdd = `
import os, stat
s = os.stat('/odd/file')
print(oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink, os.path.samefile('/odd/file', '/odd/hard'), os.getxattr('/odd/told', 'user.origin'))
d = os.stat('/odd'); n = os.stat('/odd/null')
print(oct(d.st_mode), d.st_uid, d.st_gid, stat.S_ISCHR(n.st_mode), os.major(n.st_rdev), os.minor(n.st_rdev), stat.S_ISFIFO(os.stat('/odd/fifo').st_mode))
print(os.path.exists('/etc/issue'), os.path.exists('/etc/issue.net'))
`

func realWork(t *testing.T, h *home, ref string, flags ...string) {
	h.run(slices.Concat([]string{"run", "-d", "--name", "w"}, flags, []string{ref, "sleep", "10000"})...)
	defer h.run("rm", "-f", "w")
	if got := h.run("exec", "w", "python3", "-c", pyWork); got != "20 3" {
		t.Errorf("python: %q", got)
	}
	const c = `printf '#include <stdio.h>\nint main(){puts("compiled");}\n' > /root/a.c && gcc -o /root/a /root/a.c && /root/a`
	if got := h.run("exec", "w", "sh", "-c", c); got != "compiled" {
		t.Errorf("C: %q", got)
	}
	if got := h.run("exec", "w", "sh", "-c", debWork); got != "data\nStatus: install ok installed" {
		t.Errorf("dpkg: %q", got)
	}
	h.run("exec", "w", "sh", "-c", "tar --one-file-system -cf - / 2>&1 | cat > /dev/null")
	if got := h.run("exec", "w", "stat", "-c", "%a %U", "/usr/bin/passwd", "/tmp"); got != "4755 root\n1777 root" {
		t.Errorf("modes: %q", got)
	}
	if ref != "debian-test:plain" { // that is of the root alone
		want := "0o104750 1234 5678 2 True b'image'\n0o42775 70000 70001 True 1 3 True\nFalse True"
		if got := h.run("exec", "w", "python3", "-c", pyOdd); got != want {
			t.Errorf("odd files: %q, want %q", got, want)
		}
		h.run("exec", "w", "sh", "-c", "mkdir /dev/shm/m && cp -a /tree /dev/shm/m/tree")
		if got := h.run("exec", "w", "python3", "-c", pyFiles, "/dev/shm/m/tree", "/tree"); got != "differences: 0" {
			t.Errorf("files of the image and in memory:\n%s", got)
		}
	}
	h.run("stop", "-t", "5", "w")
	for name, tc := range map[string]struct{ handler, ended, file string }{
		"obeys":   {"lambda *a: (open('/root/last', 'w').write('flushed'), sys.exit(3))", "3 stopped", "flushed"},
		"ignores": {"signal.SIG_IGN", "137 stopped", ""},
	} {
		h.run("run", "-d", "--name", name, ref, "python3", "-c", "import signal, sys, time; signal.signal(signal.SIGTERM, "+tc.handler+
			"); print('ready', flush=True); time.sleep(10000)")
		until(t, "it has its handler", func() bool { return h.run("logs", name) == "ready" })
		h.run("stop", "-t", "2", name)
		if got := h.field(name, "{{.ExitCode}} {{.Reason}}"); got != tc.ended {
			t.Errorf("a program that %s SIGTERM ended with %s", name, got)
		}
		if tc.file != "" {
			if out := h.run("cp", name+":/root/last", "-"); !strings.Contains(out, tc.file) {
				t.Errorf("what it wrote at its end: %q", out)
			}
		}
		h.run("rm", name)
	}
	h.run("start", "w")
	if got := h.run("exec", "w", "sh", "-c", "/root/a; sqlite3 /root/work.db 'select count(*) from t'"); got != "compiled\n20" {
		t.Errorf("after a restart: %q", got)
	}
}

// pyMapped writes to files through mappings, in holes and over what is there, and has several processes write to one database by a
// mapped index.
const pyMapped = `
import errno, mmap, multiprocessing, os, sqlite3, sys
top = sys.argv[1]
size = 4 << 20
with open(top + '/holes', 'w+b') as f:
    f.truncate(size)
    with mmap.mmap(f.fileno(), size) as m:
        for i in range(0, size, 4096):
            m[i:i + 4] = (i >> 12).to_bytes(4, 'big')
with open(top + '/read-first', 'w+b') as f:
    f.truncate(size)
    with mmap.mmap(f.fileno(), size) as m:
        assert m[:] == bytes(size)
        f.write(b'written')
        f.flush()
        assert m[:7] == b'written'
        m[size - 3:] = b'end'
        assert os.pread(f.fileno(), 3, size - 3) == b'end'
def insert(i):
    db = sqlite3.connect(top + '/wal.db', timeout=60)
    for k in range(50):
        db.execute('insert into t values (?)', (i * 1000 + k,))
        db.commit()
db = sqlite3.connect(top + '/wal.db')
assert db.execute('pragma journal_mode=wal').fetchone() == ('wal',)
db.execute('create table t (x integer unique)')
db.commit()
ps = [multiprocessing.Process(target=insert, args=(i,)) for i in range(4)]
[p.start() for p in ps]
[p.join() for p in ps]
print(db.execute('select count(*) from t').fetchone()[0], db.execute('pragma integrity_check').fetchone()[0])
# A mapping has room for all of it, or there is none to be had.
with open(top + '/large', 'w+b') as f:
    for grow in (lambda: f.truncate(1 << 40), lambda: os.posix_fallocate(f.fileno(), 0, 1 << 40), lambda: os.pwrite(f.fileno(), b'x', 1 << 40)):
        try:
            grow()
        except OSError as e:
            print(errno.errorcode[e.errno])
`

const pyLookMapped = `
import sqlite3, sys
top = sys.argv[1]
holes, read = open(top + '/holes', 'rb').read(), open(top + '/read-first', 'rb').read()
print(len(holes), sum(int.from_bytes(holes[i:i + 4], 'big') != i >> 12 for i in range(0, len(holes), 4096)))
print(len(read), read[:7].decode(), read[-3:].decode())
print(sqlite3.connect(top + '/wal.db').execute('select count(*) from t').fetchone()[0])
`

// mappedWork maps files of a box with a quota, of which the last must not be lost when there is no room.
func mappedWork(t *testing.T, h *home, ref string) {
	h.run("run", "-d", "--name", "m", "--disk-size", "40m", "-v", "/anon", ref, "sleep", "10000")
	defer h.run("rm", "-f", "-v", "m")
	for _, dir := range []string{"/root", "/anon"} {
		if got := h.run("exec", "m", "python3", "-c", pyMapped, dir); got != "200 ok\nENOSPC\nENOSPC\nENOSPC" {
			t.Errorf("in %s: %q", dir, got)
		}
	}
	// With the box full, what is mapped already can be written to and is kept all the same.
	h.try("exec", "m", "dd", "if=/dev/zero", "of=/root/full", "bs=4k")
	const late = "import mmap\nf = open('/root/holes', 'r+b')\nm = mmap.mmap(f.fileno(), 0)\nm[100:104] = b'late'\n"
	h.run("exec", "m", "python3", "-c", late)
	h.run("stop", "-t", "5", "m")
	h.run("start", "m")
	h.run("exec", "m", "rm", "/root/full") // to read a database SQLite makes files
	for _, dir := range []string{"/root", "/anon"} {
		if got := h.run("exec", "m", "python3", "-c", pyLookMapped, dir); got != "4194304 0\n4194304 written end\n200" {
			t.Errorf("in %s after a restart: %q", dir, got)
		}
	}
	if got := h.run("exec", "m", "sh", "-c", "dd if=/root/holes bs=1 skip=100 count=4 2>/dev/null"); got != "late" {
		t.Errorf("what was written last: %q", got)
	}
}

// gigabyte sends 1 GiB through a box and compares what comes back.
func gigabyte(t *testing.T, h *home) {
	h.run("run", "-d", "--name", "g", "base", "sleep", "10000")
	defer h.run("rm", "-f", "g")
	c := h.cmd("exec", "-i", "g", "cat")
	sent, got := sha256.New(), sha256.New()
	src := io.LimitReader(rand.NewChaCha8([32]byte{1}), 1<<30)
	c.Stdin = io.TeeReader(src, sent)
	c.Stdout = got
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Run(); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	if a, b := hex.EncodeToString(sent.Sum(nil)), hex.EncodeToString(got.Sum(nil)); a != b {
		t.Errorf("sent %s, got %s", a, b)
	}
}

// TestVolumes: files and directories, ro enforced, links on neither side lead out.
func TestVolumes(t *testing.T) {
	h := newHome(t)
	dir := filepath.Join(h.dir, "vol")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(h.dir, "one")
	for p, s := range map[string]string{filepath.Join(dir, "f"): "dir", file: "file", filepath.Join(h.dir, "secret"): "secret"} {
		if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(filepath.Join(h.dir, "secret"), filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	h.run("run", "-d", "--name", "b", "-v", dir+":/v", "-v", dir+":/ro:ro", "-v", file+":/etc/one:ro", "base", "sleep", "1000")
	if got := h.run("exec", "b", "cat", "/v/f", "/etc/one"); got != "dirfile" {
		t.Errorf("read: %q", got)
	}
	h.run("exec", "b", "sh", "-c", "echo new > /v/new")
	if b, _ := os.ReadFile(filepath.Join(dir, "new")); string(b) != "new\n" {
		t.Errorf("written by the box: %q", b)
	}
	if st, err := os.Stat(filepath.Join(dir, "new")); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("mode of a file the box made: %v, %v", st.Mode(), err)
	}
	for _, w := range []string{"/ro/x", "/etc/one"} {
		if _, code := h.try("exec", "b", "sh", "-c", "echo no > "+w); code == 0 {
			t.Errorf("%s could be written to", w)
		}
	}
	if out, code := h.try("exec", "b", "cat", "/v/out"); code == 0 || strings.Contains(out, "secret") {
		t.Errorf("a link of the host led out of the volume: %q", out)
	}
	h.run("rm", "-f", "b")
	if _, errs, code := h.all("run", "--rm", "-v", h.dir+"/nope:/v", "base", "true"); code != 125 || !strings.Contains(errs, "does not exist") {
		t.Errorf("missing source: exit code %d: %s", code, errs)
	}
}

// TestCopy: cp both ways, as docker cp does, and a link in the box leads nowhere on the host.
func TestCopy(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	src := filepath.Join(h.dir, "src")
	if err := os.MkdirAll(filepath.Join(src, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(src, "sub", "f"), []byte("content"), 0o640); err != nil {
		t.Fatal(err)
	}
	h.run("cp", src, "b:/root/new")
	h.run("cp", src, "b:/root")
	if got := h.run("exec", "b", "cat", "/root/new/sub/f", "/root/src/sub/f"); got != "contentcontent" {
		t.Errorf("in the box: %q", got)
	}
	out := filepath.Join(h.dir, "out")
	h.run("cp", "b:/root/new", out)
	if b, _ := os.ReadFile(filepath.Join(out, "sub", "f")); string(b) != "content" {
		t.Errorf("copied out: %q", b)
	}
	// The box plants a link and a file behind it.
	h.run("exec", "b", "sh", "-c", "mkdir /root/evil; ln -s "+h.dir+" /root/evil/link")
	h.run("cp", "b:/root/evil", filepath.Join(h.dir, "evil"))
	if l, err := os.Readlink(filepath.Join(h.dir, "evil", "link")); err != nil || l != h.dir {
		t.Errorf("the link: %q, %v", l, err)
	}
	if _, _, code := h.all("cp", "b:/root/none", out); code != 125 {
		t.Errorf("missing source: exit code %d", code)
	}
	h.run("rm", "-f", "b")
}
