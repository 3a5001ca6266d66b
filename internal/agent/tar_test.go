package agent

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

func TestTarRoundTrip(t *testing.T) {
	c := startAgent(t, nil)
	src, dst := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(src+"/sub/deep", 0o755))
	must(os.WriteFile(src+"/file", bytes.Repeat([]byte("x"), 300_000), 0o640))
	must(os.Chmod(src+"/file", 0o640|os.ModeSetuid))
	must(os.Link(src+"/file", src+"/sub/hard"))
	must(os.Symlink("../file", src+"/sub/soft"))
	must(os.WriteFile(src+"/sub/deep/"+strings.Repeat("n", 200), nil, 0o600))
	must(unix.Mkfifo(src+"/fifo", 0o600))
	root := os.Getuid() == 0
	if root {
		must(os.Lchown(src+"/sub/deep", 70000, 80000))
	}
	xattr := unix.Setxattr(src+"/sub", "user.note", []byte("hello"), 0) == nil
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	must(os.Chtimes(src+"/sub", old, old))

	var buf bytes.Buffer
	must(c.TarOut(t.Context(), src, false, &buf))
	must(c.TarIn(t.Context(), dst+"/new", &buf, wire.TarInOptions{Mkdir: true}))

	got := dst + "/new/tree"
	fi, err := os.Stat(got + "/file")
	must(err)
	if fi.Size() != 300_000 || fi.Mode() != 0o640|os.ModeSetuid {
		t.Errorf("file: %v %d", fi.Mode(), fi.Size())
	}
	hard, err := os.Stat(got + "/sub/hard")
	must(err)
	if !os.SameFile(fi, hard) {
		t.Error("hard link is a copy")
	}
	if l, err := os.Readlink(got + "/sub/soft"); l != "../file" {
		t.Error(l, err)
	}
	if fi, err := os.Lstat(got + "/fifo"); err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		t.Error("fifo", err)
	}
	if fi, err := os.Stat(got + "/sub"); err != nil || !fi.ModTime().Equal(old) {
		t.Error("time of a directory", fi.ModTime(), err)
	}
	if _, err := os.Stat(got + "/sub/deep/" + strings.Repeat("n", 200)); err != nil {
		t.Error(err)
	}
	if info, err := c.Stat(t.Context(), got+"/sub/deep", false); err != nil || root && (info.UID != 70000 || info.GID != 80000) {
		t.Error(info, err)
	}
	if info, err := c.Stat(t.Context(), got+"/sub/soft", false); err != nil || info.Link != "../file" {
		t.Error(info, err)
	}
	if info, err := c.Stat(t.Context(), got+"/sub/soft", true); err != nil || info.Path != got+"/file" {
		t.Error(info, err)
	}
	if xattr {
		val := make([]byte, 100)
		if n, err := unix.Getxattr(got+"/sub", "user.note", val); err != nil || string(val[:n]) != "hello" {
			t.Error("extended attribute", err)
		}
	}
	if _, err := c.Stat(t.Context(), "/no/such", false); !errors.Is(err, wire.ErrNoFile) {
		t.Error(err)
	}
	if err := c.TarOut(t.Context(), "/no/such", false, &buf); !errors.Is(err, wire.ErrNoFile) {
		t.Error(err)
	}
	if err := c.TarIn(t.Context(), "/no/such", &buf, wire.TarInOptions{}); !errors.Is(err, wire.ErrNoFile) {
		t.Error(err)
	}
}

// Whatever an archive says, nothing outside the destination changes.
func TestTarInStaysInside(t *testing.T) {
	type entry = tar.Header
	for name, entries := range map[string][]entry{
		"dot dot":               {{Name: "../evil", Typeflag: tar.TypeReg}},
		"absolute":              {{Name: "/evil", Typeflag: tar.TypeReg}},
		"through a link":        {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/evil", Typeflag: tar.TypeReg}},
		"through absolute link": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUT"}, {Name: "l/evil", Typeflag: tar.TypeReg}},
		"onto a link":           {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../evil"}, {Name: "l", Typeflag: tar.TypeReg}},
		"hard link out":         {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../victim"}, {Name: "h", Typeflag: tar.TypeReg, Mode: 0o777}},
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			dest := out + "/dest"
			os.Mkdir(dest, 0o755)
			os.WriteFile(out+"/victim", []byte("safe"), 0o600)
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			for _, e := range entries {
				e.Linkname = strings.Replace(e.Linkname, "OUT", out, 1)
				if e.Typeflag == tar.TypeReg {
					e.Size = 4
				}
				w.WriteHeader(&e)
				if e.Size > 0 {
					w.Write([]byte("evil"))
				}
			}
			w.Close()
			readTar(&buf, wire.TarInRequest{Path: dest}, nil)
			names, _ := os.ReadDir(out)
			victim, _ := os.ReadFile(out + "/victim")
			st, _ := os.Stat(out + "/victim")
			if len(names) != 2 || string(victim) != "safe" || st.Mode() != 0o600 {
				t.Fatalf("outside has changed: %v, %q", names, victim)
			}
		})
	}
}

func TestTarInBrokenArchive(t *testing.T) {
	c := startAgent(t, nil)
	// Longer than the window: the agent gives up early, and the sender must not be stuck.
	err := c.TarIn(t.Context(), t.TempDir(), strings.NewReader(strings.Repeat("garbage!", 1<<20)), wire.TarInOptions{})
	if err == nil || !strings.Contains(err.Error(), "archive") {
		t.Fatal(err)
	}
	if err := c.TarIn(t.Context(), t.TempDir(), failingReader{}, wire.TarInOptions{}); err == nil || !strings.Contains(err.Error(), "torn") {
		t.Fatal(err)
	}
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, errors.New("torn") }
