package boxfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// white makes a whiteout as the overlay in the guest's kernel does after a rename or removal. An error of it ends a box.
func (p *peer) white(dir lisafs.ClientFD, name string) error {
	inode, err := dir.MknodAt(p.ctx, name, unix.S_IFCHR, 0, 0, 0, 0)
	if err == nil {
		p.c.CloseFD(p.ctx, inode.ControlFD, true)
	}
	return err
}

// TestRenameToOwnLink renames one name of a file to another of it, of which both stay.
func TestRenameToOwnLink(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	d := p.mkdir("d")
	a := p.put("a", "content")
	for _, where := range []struct {
		dir        lisafs.ClientFD
		name, path string
	}{{p.root, "b", "b"}, {d, "c", "d/c"}} {
		_, err := where.dir.LinkAt(p.ctx, a.ID(), where.name)
		must(t, err)
		must(t, p.root.RenameAt(p.ctx, "a", where.dir.ID(), where.name, 0))
		inode, err := p.root.MknodAt(p.ctx, "a", unix.S_IFCHR, 0, 0, 0, 0)
		must(t, err)
		if inode.Stat.Mode&unix.S_IFMT != unix.S_IFREG || inode.Stat.Nlink < 2 {
			t.Errorf("made %+v", inode.Stat)
		}
		if p.content("a") != "content" || p.content(where.path) != "content" {
			t.Errorf("%s: a name is gone", where.path)
		}
		// The object of the old name's is no longer held to be in the tree by the protocol's own book-keeping.
		a, _ = p.at("a")
	}
	// Nothing else is taken for that.
	p.put("one", "")
	must(t, p.white(p.root, "white"))
	must(t, p.white(p.root, "white2"))
	for _, name := range []string{"one", "d", "white"} {
		wants(t, "whiteout over "+name, p.white(p.root, name), unix.EEXIST)
	}
}

func TestWhiteouts(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	d := p.mkdir("d")
	must(t, p.white(d, "first"))
	// The file that they are links to is made again where it is missing, and full ones are left alone.
	must(t, os.Remove(filepath.Join(y.root, whiteName)))
	must(t, p.white(d, "second"))
	p.close()
	p = newPeer(t, y.root, Options{})
	for _, name := range []string{"first", "second"} {
		if _, st := p.at("d/" + name); looks(st) != (look{Mode: unix.S_IFCHR}) {
			t.Errorf("%s: %+v", name, looks(st))
		}
	}
	d, _ = p.at("d")
	if got := p.list(d); len(got) != 2 || got["second"] != unix.DT_CHR {
		t.Errorf("listed: %v", got)
	}
	if got := p.list(p.root); len(got) != 1 {
		t.Errorf("the layer's own files are seen: %v", got)
	}
	wants(t, "whiteout of a reserved name", p.white(d, whiteName), unix.EPERM)
	// Neither are other devices links to it.
	_, err := d.MknodAt(p.ctx, "null", unix.S_IFCHR|0o666, 0, 0, 3, 1)
	must(t, err)
	if _, st := p.at("d/null"); st.Nlink != 1 {
		t.Errorf("%+v", st)
	}
}

// TestWhiteoutLinks makes more whiteouts than a file can have links.
func TestWhiteoutLinks(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 66000 links")
	}
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	d := p.mkdir("d")
	for i := range 66000 {
		if err := p.white(d, fmt.Sprint("w", i)); err != nil {
			t.Fatalf("whiteout %d: %v", i, err)
		}
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(y.root, whiteName), &st))
	if st.Nlink > manyLinks+1 {
		t.Errorf("%d links", st.Nlink)
	}
}

// smallDisk mounts a file system with hardly an inode to spare on a directory.
func smallDisk(t *testing.T, kind, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	must(t, os.Mkdir(dir, 0o700))
	args := []string{"-t", "tmpfs", "-o", "nr_inodes=40,size=1m", "small", dir}
	if kind == "ext4" {
		img := dir + ".img"
		must(t, os.WriteFile(img, nil, 0o600))
		must(t, os.Truncate(img, 2<<20))
		if out, err := exec.Command("mkfs.ext4", "-q", "-N", "64", img).CombinedOutput(); err != nil {
			t.Skipf("make a small file system: %v: %s", err, out)
		}
		args = []string{"-o", "loop", img, dir}
	}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Skipf("mount a small file system: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	if err := unix.Setxattr(dir, "user.test", nil, 0); err != nil {
		t.Skipf("no user attributes in this %s (a tmpfs has them since Linux 6.6): %v", kind, err)
	}
}

// TestFullDisk moves and removes files of the image on a disk without inodes. Whatever is not refused must be finished.
func TestFullDisk(t *testing.T) {
	for kind, all := range map[string]bool{"ext4": true, "tmpfs": false} { // in a tmpfs a link needs an inode, too
		t.Run(kind, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "disk")
			smallDisk(t, kind, dir)
			p := newPeer(t, dir, Options{})
			for i := range 6 {
				p.put(fmt.Sprint("file", i), "")
			}
			var full error
			for i := 0; full == nil; i++ {
				_, full = p.root.MknodAt(p.ctx, fmt.Sprint("fill", i), unix.S_IFREG|0o600, 0, 0, 0, 0)
			}
			wants(t, "fill the disk", full, unix.ENOSPC)
			done := 0
			for i := range 6 {
				name := fmt.Sprint("file", i)
				var refused error
				if i%2 == 0 {
					refused = p.root.RenameAt(p.ctx, name, p.root.ID(), "moved"+name, 0)
				} else {
					// It stays open, and so keeps its inode.
					f, _ := p.at(name)
					_, donated, err := f.OpenAt(p.ctx, unix.O_RDONLY)
					must(t, err)
					defer unix.Close(donated)
					refused = p.root.UnlinkAt(p.ctx, name, 0)
				}
				if refused != nil {
					wants(t, "what there is no room for", refused, unix.ENOSPC)
					continue
				}
				if err := p.white(p.root, name); err != nil {
					t.Fatalf("whiteout of %s: %v", name, err)
				}
				done++
			}
			if done == 0 || (done == 6) != all {
				t.Errorf("%d of 6 could be moved or removed", done)
			}
		})
	}
}

// TestOpaque: a directory whose attributes are full can be marked all the same, and layers of before keep their marks.
func TestOpaque(t *testing.T) {
	y := newYard(t)
	must(t, os.Mkdir(filepath.Join(y.root, "old"), 0o700))
	must(t, unix.Setxattr(filepath.Join(y.root, "old"), guestAttrs+opaqueAttr, []byte("y"), 0))
	p := newPeer(t, y.root, Options{})
	d := p.mkdir("d")
	for _, size := range []int{1000, 100, 10, 0} {
		for i := 0; d.SetXattr(p.ctx, fmt.Sprint("user.", size, i), strings.Repeat("x", size), 0) == nil; i++ {
			if i == 1000 {
				t.Skip("attributes have no bound on this file system")
			}
		}
	}
	if _, err := d.GetXattr(p.ctx, opaqueAttr, 1); !errors.Is(err, unix.ENODATA) {
		t.Errorf("marked already: %v", err)
	}
	must(t, d.SetXattr(p.ctx, opaqueAttr, "y", 0))
	p.close()
	p = newPeer(t, y.root, Options{})
	for _, name := range []string{"d", "old"} {
		dir, st := p.at(name)
		if v, err := dir.GetXattr(p.ctx, opaqueAttr, 1); v != "y" || err != nil {
			t.Errorf("%s: %q, %v", name, v, err)
		}
		if st.Mode&unix.S_ISVTX != 0 {
			t.Errorf("%s has mode %o", name, st.Mode)
		}
		must(t, dir.RemoveXattr(p.ctx, opaqueAttr))
		_, err := dir.GetXattr(p.ctx, opaqueAttr, 1)
		wants(t, "after its removal", err, unix.ENODATA)
	}
	checkStored(t, y.root)
}
