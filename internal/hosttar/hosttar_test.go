package hosttar

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entry is one of an archive. The type is told by what is set.
type entry struct {
	name     string
	content  string
	link     string // a symbolic link's target
	hard     string // a hard link's
	dir      bool
	typeflag byte // another type
	mode     int64
}

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.content)), Typeflag: tar.TypeReg, ModTime: time.Unix(1, 0), Uid: 7, Gid: 8}
		switch {
		case e.typeflag != 0:
			h.Typeflag = e.typeflag
		case e.dir:
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case e.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		case e.hard != "":
			h.Typeflag, h.Linkname = tar.TypeLink, e.hard
		}
		if e.mode != 0 {
			h.Mode = e.mode
		}
		must(t, w.WriteHeader(h))
		_, err := w.Write([]byte(e.content))
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// tree is what is below a directory: "dir", a file's content after "=", or a link's target after "->".
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		must(t, err)
		switch {
		case d.IsDir():
			out[rel] = "dir"
		case d.Type() == fs.ModeSymlink:
			l, err := os.Readlink(p)
			must(t, err)
			out[rel] = "->" + l
		case d.Type().IsRegular():
			b, err := os.ReadFile(p)
			must(t, err)
			out[rel] = "=" + string(b)
		default:
			out[rel] = d.Type().String()
		}
		return nil
	}))
	return out
}

// home is a directory to unpack in, as a user has it, beside another.
func home(t testing.TB) (base, dir string) {
	t.Helper()
	base = t.TempDir()
	dir = filepath.Join(base, "home")
	for _, d := range []string{"home/.ssh", "outside"} {
		must(t, os.MkdirAll(filepath.Join(base, d), 0o755))
	}
	for _, f := range []string{"home/.ssh/keys", "home/.profile", "outside/file"} {
		must(t, os.WriteFile(filepath.Join(base, f), []byte("mine"), 0o644))
	}
	return base, dir
}

func untouched() map[string]string {
	return map[string]string{
		"home": "dir", "home/.ssh": "dir", "home/.ssh/keys": "=mine", "home/.profile": "=mine", "outside": "dir", "outside/file": "=mine",
	}
}

func with(more map[string]string) map[string]string {
	m := untouched()
	for k, v := range more {
		m[k] = v
	}
	return m
}

func TestUnpack(t *testing.T) {
	base, dir := home(t)
	data := archive(t,
		entry{name: "src", dir: true, mode: 0o7550}, entry{name: "src/f", content: "content", mode: 0o6755}, entry{name: "src/sub/", dir: true},
		entry{name: "src/sub/l", link: "../../../outside/file"}, entry{name: "src/sub/h", hard: "src/f"}, entry{name: "src/abs", link: "/etc/passwd"},
		entry{name: "src/null", typeflag: tar.TypeChar}, entry{name: "src/disk", typeflag: tar.TypeBlock}, entry{name: "src/pipe", typeflag: tar.TypeFifo},
	)
	must(t, Unpack(t.Context(), bytes.NewReader(data), dir, "new", false))
	if d := cmp.Diff(with(map[string]string{
		"home/new": "dir", "home/new/f": "=content", "home/new/sub": "dir", "home/new/sub/l": "->../../../outside/file",
		"home/new/sub/h": "=content", "home/new/abs": "->/etc/passwd",
	}), tree(t, base)); d != "" {
		t.Error(d)
	}
	st, err := os.Stat(filepath.Join(dir, "new/f"))
	must(t, err)
	if st.Mode()&^0o755 != 0 || st.Mode()&0o700 != 0o700 || !st.ModTime().Equal(time.Unix(1, 0)) {
		t.Errorf("mode %v, time %v", st.Mode(), st.ModTime())
	}
	if h, err := os.Stat(filepath.Join(dir, "new/sub/h")); err != nil || !os.SameFile(st, h) {
		t.Errorf("no hard link: %v", err)
	}
	if st, err := os.Stat(filepath.Join(dir, "new")); err != nil || st.Mode()&^0o050 != fs.ModeDir|0o500 || !st.ModTime().Equal(time.Unix(1, 0)) {
		t.Errorf("directory %v, %v", st.Mode(), err)
	}
	must(t, os.Chmod(filepath.Join(dir, "new"), 0o700))
	// The root of a box has no name of its own in the archive.
	root := archive(t, entry{name: "./", dir: true}, entry{name: "etc/", dir: true}, entry{name: "etc/f", content: "content"}, entry{name: "f", hard: "etc/f"})
	must(t, Unpack(t.Context(), bytes.NewReader(root), dir, "whole", true))
	if got := tree(t, filepath.Join(dir, "whole")); got["etc/f"] != "=content" || got["f"] != "=content" || len(got) != 3 {
		t.Errorf("%v", got)
	}
	// What is in it, into a directory that is there.
	must(t, Unpack(t.Context(), bytes.NewReader(data), filepath.Join(base, "outside"), ".", false))
	if got := tree(t, filepath.Join(base, "outside")); got["f"] != "=content" || got["sub/h"] != "=content" || got["file"] != "=mine" {
		t.Errorf("%v", got)
	}
}

// TestHostile unpacks archives that try to write elsewhere. Each has a file of the user's in mind, in the same directory or beside it.
func TestHostile(t *testing.T) {
	for name, entries := range map[string][]entry{
		"dotdot":                   {{name: "../outside/file", content: "evil"}},
		"dotdot deep":              {{name: "x", dir: true}, {name: "x/../../outside/file", content: "evil"}},
		"dotdot first":             {{name: "..", dir: true}, {name: "../file", content: "evil"}},
		"absolute":                 {{name: "/outside/file", content: "evil"}},
		"link, then through it":    {{name: "x", dir: true}, {name: "x/l", link: "../../outside"}, {name: "x/l/file", content: "evil"}},
		"link inside, through it":  {{name: "x", dir: true}, {name: "x/l", link: "../.ssh"}, {name: "x/l/keys", content: "evil"}},
		"the name itself":          {{name: "x", link: "."}, {name: "x/.profile", content: "evil"}},
		"the name itself, below":   {{name: "x", link: ".ssh"}, {name: "x/keys", content: "evil"}},
		"link as directory":        {{name: "x", dir: true}, {name: "x/l", link: "../.ssh"}, {name: "x/l", dir: true}, {name: "x/l/keys", content: "evil"}},
		"link to link":             {{name: "x", dir: true}, {name: "x/a", link: "b"}, {name: "x/b", link: "../.ssh"}, {name: "x/a/keys", content: "evil"}},
		"remove through link":      {{name: "x", dir: true}, {name: "x/l", link: "../.ssh"}, {name: "x/l/keys", link: "elsewhere"}},
		"mkdir through link":       {{name: "x", dir: true}, {name: "x/l", link: "../../outside"}, {name: "x/l/new", dir: true}},
		"hard link out":            {{name: "x", dir: true}, {name: "x/h", hard: "../outside/file"}},
		"hard link absolute":       {{name: "x", dir: true}, {name: "x/h", hard: "/etc/passwd"}},
		"hard link beside":         {{name: "x", dir: true}, {name: "x/l", link: "../.ssh"}, {name: "x/h", hard: "x/l/keys"}},
		"hard link placed outside": {{name: "x", dir: true}, {name: "x/f", content: "evil"}, {name: "x/l", link: "../.ssh"}, {name: "x/l/new", hard: "x/f"}},
		"hard link to itself":      {{name: "x", dir: true}, {name: "x/f", content: "evil"}, {name: "x/f", hard: "x/f"}},
	} {
		t.Run(name, func(t *testing.T) {
			base, dir := home(t)
			err := Unpack(t.Context(), bytes.NewReader(archive(t, entries...)), dir, "x", false)
			if err == nil {
				t.Error("not refused")
			}
			got := tree(t, base)
			for p := range got {
				if p == "home/x" || strings.HasPrefix(p, "home/x/") {
					delete(got, p)
				}
			}
			if d := cmp.Diff(untouched(), got); d != "" {
				t.Errorf("%v\n%s", err, d)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "x/h")); err == nil {
				t.Errorf("linked to %q", b)
			}
		})
	}
	// The same first element, whatever it is, is where the user said.
	base, dir := home(t)
	must(t, Unpack(t.Context(), bytes.NewReader(archive(t, entry{name: ".ssh", dir: true}, entry{name: ".ssh/keys", content: "evil"})), dir, "x", false))
	if d := cmp.Diff(with(map[string]string{"home/x": "dir", "home/x/keys": "=evil"}), tree(t, base)); d != "" {
		t.Error(d)
	}
}

// TestOverwrite is what docker cp does with what is there.
func TestOverwrite(t *testing.T) {
	const kept = "kept"
	for name, tc := range map[string]struct {
		there string // "dir", "full", "file", "link", "linkdir"
		entry entry
		want  string // what is there then; kept, if it is refused
	}{
		"file on nothing":        {"", entry{content: "new"}, "=new"},
		"file on file":           {"file", entry{content: "new"}, "=new"},
		"file on link":           {"link", entry{content: "new"}, "=new"},
		"file on empty dir":      {"dir", entry{content: "new"}, kept},
		"file on full dir":       {"full", entry{content: "new"}, kept},
		"file on link to dir":    {"linkdir", entry{content: "new"}, "=new"},
		"link on file":           {"file", entry{link: "t"}, "->t"},
		"link on link":           {"link", entry{link: "t"}, "->t"},
		"link on empty dir":      {"dir", entry{link: "t"}, kept},
		"hard on file":           {"file", entry{hard: "x/other"}, "=other"},
		"hard on empty dir":      {"dir", entry{hard: "x/other"}, kept},
		"dir on dir":             {"full", entry{dir: true}, "dir"},
		"dir on file":            {"file", entry{dir: true}, kept},
		"dir on link":            {"link", entry{dir: true}, kept},
		"dir on link to dir":     {"linkdir", entry{dir: true}, kept},
		"device on file":         {"file", entry{typeflag: tar.TypeChar}, "=old"},
		"fifo on file":           {"file", entry{typeflag: tar.TypeFifo}, "=old"},
		"hard to nothing":        {"", entry{hard: "x/none"}, ""},
		"file in what is a file": {"file", entry{name: "x/p/below", content: "new"}, kept},
	} {
		t.Run(name, func(t *testing.T) {
			base, dir := home(t)
			must(t, os.Mkdir(filepath.Join(dir, "x"), 0o755))
			must(t, os.WriteFile(filepath.Join(dir, "x/other"), []byte("other"), 0o644))
			p := filepath.Join(dir, "x/p")
			switch tc.there {
			case "file":
				must(t, os.WriteFile(p, []byte("old"), 0o644))
			case "dir":
				must(t, os.Mkdir(p, 0o755))
			case "full":
				must(t, os.MkdirAll(filepath.Join(p, "sub"), 0o755))
			case "link":
				must(t, os.Symlink("../../outside/file", p))
			case "linkdir":
				must(t, os.Symlink("../../outside", p))
			}
			before := tree(t, base)
			if tc.entry.name == "" {
				tc.entry.name = "x/p"
			}
			err := Unpack(t.Context(), bytes.NewReader(archive(t, entry{name: "x", dir: true}, tc.entry)), dir, "x", false)
			after := tree(t, base)
			want := before
			switch tc.want {
			case kept:
				if err == nil {
					t.Error("not refused")
				}
			case "":
				if err == nil {
					t.Error("not refused")
				}
			default:
				must(t, err)
				want["home/x/p"] = tc.want
			}
			if d := cmp.Diff(want, after); d != "" {
				t.Errorf("%v\n%s", err, d)
			}
		})
	}
}

func TestUnpackFails(t *testing.T) {
	_, dir := home(t)
	data := archive(t, entry{name: "x", dir: true}, entry{name: "x/f", content: strings.Repeat("c", 5000)})
	for cut := range len(data) - 1024 {
		if cut%512 != 0 && cut != 600 && cut != 1700 {
			continue
		}
		if err := Unpack(t.Context(), bytes.NewReader(data[:cut]), dir, fmt.Sprint("n", cut), false); err == nil && cut%512 != 0 {
			t.Errorf("cut at %d: no error", cut)
		}
	}
	if err := Unpack(t.Context(), strings.NewReader(strings.Repeat("no archive", 500)), dir, "n", false); !errors.Is(err, tar.ErrHeader) {
		t.Errorf("no archive: %v", err)
	}
	if err := Unpack(t.Context(), bytes.NewReader(data), filepath.Join(dir, "none"), "n", false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unpack(ctx, bytes.NewReader(data), dir, "cancelled", false); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestPack packs a tree and unpacks it again.
func TestPack(t *testing.T) {
	base, dir := home(t)
	src := filepath.Join(dir, "src")
	must(t, os.MkdirAll(filepath.Join(src, "sub/empty"), 0o755))
	must(t, os.WriteFile(filepath.Join(src, "f"), []byte("content"), 0o640))
	must(t, os.Symlink("../../outside/file", filepath.Join(src, "sub/l")))
	must(t, os.Symlink("src", filepath.Join(dir, "alias")))
	for name, tc := range map[string]struct {
		src    string
		follow bool
		want   map[string]string
	}{
		"tree":      {src: "src", want: map[string]string{"f": "=content", "sub": "dir", "sub/empty": "dir", "sub/l": "->../../outside/file"}},
		"followed":  {src: "alias", follow: true, want: map[string]string{"f": "=content", "sub": "dir", "sub/empty": "dir", "sub/l": "->../../outside/file"}},
		"link":      {src: "alias", want: nil},
		"one file":  {src: "src/f", want: nil},
		"not there": {src: "none", want: nil},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			err := Pack(t.Context(), &b, filepath.Join(dir, tc.src), "packed", tc.follow)
			if name == "not there" {
				if !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%v", err)
				}
				return
			}
			must(t, err)
			to := t.TempDir()
			must(t, Unpack(t.Context(), bytes.NewReader(b.Bytes()), to, "out", false))
			got := tree(t, to)
			switch name {
			case "link":
				if got["out"] != "->src" {
					t.Errorf("%v", got)
				}
			case "one file":
				if st, err := os.Stat(filepath.Join(to, "out")); err != nil || got["out"] != "=content" || st.Mode() != 0o640 {
					t.Errorf("%v, %v", got, err)
				}
			default:
				if d := cmp.Diff(tc.want, tree(t, filepath.Join(to, "out"))); d != "" {
					t.Error(d)
				}
			}
			r := tar.NewReader(&b)
			for h, err := r.Next(); err == nil; h, err = r.Next() {
				if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Name != "packed" && !strings.HasPrefix(h.Name, "packed/") {
					t.Errorf("%+v", h)
				}
			}
		})
	}
	if got := tree(t, base); got["home/src/f"] != "=content" {
		t.Errorf("%v", got)
	}
}

// FuzzUnpack unpacks archives of any content beside a user's files. Whatever they hold, only what was named changes.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, entry{name: "x", dir: true}, entry{name: "x/l", link: "../.ssh"}, entry{name: "x/l/keys", content: "evil"}))
	f.Add(archive(f, entry{name: "x", link: "."}, entry{name: "x/.profile", content: "evil"}))
	f.Add(archive(f, entry{name: "x", dir: true}, entry{name: "x/f", content: "1"}, entry{name: "x/h", hard: "x/f"}, entry{name: "x/l", link: "f"}))
	f.Add(archive(f, entry{name: "../outside/file", content: "evil"}))
	f.Add(archive(f, entry{name: "/outside/file", content: "evil"}, entry{name: "a", typeflag: tar.TypeChar}))
	f.Fuzz(func(t *testing.T, data []byte) {
		base, dir := home(t)
		_ = Unpack(t.Context(), bytes.NewReader(data), dir, "x", false)
		got := map[string]string{}
		must(t, filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
			if p == filepath.Join(dir, "x") {
				if d.Type()&^(fs.ModeDir|fs.ModeSymlink) != 0 {
					t.Errorf("%s is a %v", p, d.Type())
				}
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			if err != nil || p == base {
				return err
			}
			rel, _ := filepath.Rel(base, p)
			if got[rel] = "dir"; !d.IsDir() {
				b, err := os.ReadFile(p)
				if err != nil {
					return err
				}
				got[rel] = "=" + string(b)
			}
			return nil
		}))
		if d := cmp.Diff(untouched(), got); d != "" {
			t.Error(d)
		}
	})
}
