package assets

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	gvisor "gvisor.dev/gvisor/pkg/erofs"
)

// parts is what a build would embed.
func parts(t *testing.T, version string) fstest.MapFS {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	m := Manifest{Version: version, GOARCH: runtime.GOARCH, Files: map[string]File{}}
	src := fstest.MapFS{}
	for _, name := range []string{FileAgent, FileSentry, FileRegistry, FileBase} {
		b := []byte("contents of " + name + " " + version)
		h := sha256.Sum256(b)
		m.Files[name] = File{Size: int64(len(b)), SHA256: hex.EncodeToString(h[:])}
		src["data/"+name+".zst"] = &fstest.MapFile{Data: enc.EncodeAll(b, nil)}
	}
	j, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	src["data/"+FileManifest] = &fstest.MapFile{Data: j}
	return src
}

func check(t *testing.T, set Set, version string) {
	t.Helper()
	for path, want := range map[string]string{set.Agent: FileAgent, set.Sentry: FileSentry, set.Registry: FileRegistry} {
		b, err := os.ReadFile(path)
		if err != nil || string(b) != "contents of "+want+" "+version {
			t.Errorf("%s: %q, %v", path, b, err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o555 {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
	r, err := set.OpenBase()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "contents of "+FileBase+" "+version {
		t.Errorf("base: %q, %v", b, err)
	}
}

func TestEnsure(t *testing.T) {
	home := t.TempDir()
	set, err := ensure(t.Context(), parts(t, "v1"), home)
	if err != nil {
		t.Fatal(err)
	}
	check(t, set, "v1")
	before, err := os.Stat(set.Sentry)
	if err != nil {
		t.Fatal(err)
	}
	again, err := ensure(t.Context(), parts(t, "v1"), home)
	if err != nil || again.Sentry != set.Sentry {
		t.Fatalf("%+v, %v", again, err)
	}
	if after, err := os.Stat(set.Sentry); err != nil || !os.SameFile(before, after) {
		t.Errorf("what was there is written again: %v", err)
	}
	newer, err := ensure(t.Context(), parts(t, "v2"), home)
	if err != nil {
		t.Fatal(err)
	}
	check(t, newer, "v2")
	check(t, set, "v1") // boxes may run from it
	for _, s := range []Set{set, again, newer} {
		s.Close()
	}
}

func TestEnsureRepairs(t *testing.T) {
	for name, damage := range map[string]func(Set) error{
		"missing file":     func(s Set) error { return os.Remove(s.Agent) },
		"missing scaffold": func(s Set) error { return os.Remove(s.Scaffold) },
		"empty directory":  func(s Set) error { return errors.Join(os.Remove(s.Agent), os.Remove(s.Sentry), os.Remove(s.Scaffold)) },
		"short file":       func(s Set) error { return errors.Join(os.Chmod(s.Sentry, 0o755), os.Truncate(s.Sentry, 3)) },
		"unfinished work": func(s Set) error {
			return errors.Join(os.RemoveAll(filepath.Dir(s.Sentry)), os.MkdirAll(filepath.Join(filepath.Dir(filepath.Dir(s.Sentry)), ".new-dead", "x"), 0o755))
		},
	} {
		t.Run(name, func(t *testing.T) {
			home := t.TempDir()
			set, err := ensure(t.Context(), parts(t, "v1"), home)
			if err != nil {
				t.Fatal(err)
			}
			if err := damage(set); err != nil {
				t.Fatal(err)
			}
			if set, err = ensure(t.Context(), parts(t, "v1"), home); err != nil {
				t.Fatal(err)
			}
			check(t, set, "v1")
			var left []string
			entries, err := os.ReadDir(filepath.Join(home, "assets"))
			for _, e := range entries {
				left = append(left, e.Name())
			}
			if diff := cmp.Diff([]string{"lock", "v1"}, left); diff != "" || err != nil {
				t.Errorf("%s %v", diff, err)
			}
		})
	}
}

func TestEnsureAtOnce(t *testing.T) {
	home := t.TempDir()
	src := parts(t, "v1")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			set, err := ensure(t.Context(), src, home)
			if err != nil {
				t.Error(err)
				return
			}
			check(t, set, "v1")
		})
	}
	wg.Wait()
}

func TestPrune(t *testing.T) {
	home := t.TempDir()
	old, err := ensure(t.Context(), parts(t, "v1"), home)
	if err != nil {
		t.Fatal(err)
	}
	also, err := ensure(t.Context(), parts(t, "v1"), home)
	if err != nil {
		t.Fatal(err)
	}
	own, err := ensure(t.Context(), parts(t, "v2"), home)
	if err != nil {
		t.Fatal(err)
	}
	own.Close()
	if err := os.MkdirAll(filepath.Join(home, "assets", ".new-dead", "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, held := range []Set{old, also} {
		if v, n, err := prune(t.Context(), parts(t, "v2"), home); err != nil || len(v) > 0 || n > 0 {
			t.Errorf("%v, %d bytes, %v", v, n, err)
		}
		check(t, old, "v1")
		held.Close()
	}
	// Who has no version cannot say which are others'.
	if v, _, err := prune(t.Context(), fstest.MapFS{}, home); err != nil || len(v) > 0 {
		t.Errorf("%v, %v", v, err)
	}
	v, n, err := prune(t.Context(), parts(t, "v2"), home)
	if err != nil || n < 1000 || cmp.Diff([]string{"v1"}, v) != "" {
		t.Errorf("%v, %d bytes, %v", v, n, err)
	}
	check(t, own, "v2")
	if left, err := os.ReadDir(filepath.Join(home, "assets")); err != nil || len(left) != 2 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, _, err := prune(t.Context(), parts(t, "v2"), filepath.Join(home, "none")); err != nil {
		t.Errorf("a home without any: %v", err)
	}
}

// However often another version prunes, what Ensure returned stays while it is held.
func TestPruneAtOnce(t *testing.T) {
	home := t.TempDir()
	var wg sync.WaitGroup
	done := make(chan struct{})
	mine, theirs := parts(t, "v1"), parts(t, "v2")
	wg.Go(func() {
		defer close(done)
		for range 30 {
			set, err := ensure(t.Context(), mine, home)
			if err != nil {
				t.Error(err)
				return
			}
			check(t, set, "v1")
			set.Close()
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if _, _, err := prune(t.Context(), theirs, home); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}

func TestMissing(t *testing.T) {
	if _, err := ensure(t.Context(), fstest.MapFS{"data/README.md": {}}, t.TempDir()); !errors.Is(err, ErrMissing) {
		t.Errorf("nothing embedded: %v", err)
	}
	src := parts(t, "v1")
	delete(src, "data/"+FileAgent+".zst")
	home := t.TempDir()
	if _, err := ensure(t.Context(), src, home); !errors.Is(err, ErrMissing) {
		t.Errorf("agent not embedded: %v", err)
	}
	src = parts(t, "v1")
	src["data/"+FileAgent+".zst"] = src["data/"+FileSentry+".zst"]
	if _, err := ensure(t.Context(), src, home); err == nil {
		t.Error("a part that does not match the manifest is taken")
	}
	src = parts(t, "v1")
	other := bytes.Replace(src["data/"+FileManifest].Data, []byte(runtime.GOARCH), []byte("other"), 1)
	src["data/"+FileManifest] = &fstest.MapFile{Data: other}
	if _, err := ensure(t.Context(), src, home); err == nil || !strings.Contains(err.Error(), "make build") {
		t.Errorf("parts for another machine: %v", err)
	}
	if _, err := os.Stat(filepath.Join(home, "assets", "v1")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failure leaves a version: %v", err)
	}
}

func TestScaffold(t *testing.T) {
	set, err := ensure(t.Context(), parts(t, "v1"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(set.Scaffold)
	if err != nil {
		t.Fatal(err)
	}
	img, err := gvisor.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	got := map[string]uint16{}
	root, err := img.Inode(img.RootNid())
	if err != nil {
		t.Fatal(err)
	}
	if err := root.IterDirents(func(name string, _ uint8, nid uint64) error {
		n, err := img.Inode(nid)
		got[name] = n.Mode()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]uint16{".": 0o40755, "..": 0o40755, "agent": 0o100555, "tmp": 0o41777}
	for _, d := range []string{"dev", "lower", "newroot", "proc", "state", "sys", "vol"} {
		want[d] = 0o40755
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func BenchmarkEnsure(b *testing.B) {
	home := b.TempDir()
	if _, err := Ensure(b.Context(), home); errors.Is(err, ErrMissing) {
		b.Skip("nothing is embedded; run make build")
	} else if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		set, err := Ensure(b.Context(), home)
		if err != nil {
			b.Fatal(err)
		}
		set.Close()
	}
}
