package boxfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
)

func lmode(m uint16) linux.FileMode { return linux.FileMode(m) }

// look is what the guest sees of an object.
type look struct {
	Mode         uint16
	UID, GID     uint32
	Major, Minor uint32
}

func looks(st lisafs.Statx) look {
	return look{Mode: st.Mode, UID: st.UID, GID: st.GID, Major: st.RdevMajor, Minor: st.RdevMinor}
}

// makeAll makes one object of every kind that a layer keeps, with owners and modes that the serving user could not give on the host.
func makeAll(t *testing.T, p *peer) map[string]look {
	t.Helper()
	dir, err := p.root.MkdirAt(p.ctx, "dir", 0o3777, 7, 8)
	must(t, err)
	d := p.c.NewFD(dir.ControlFD)
	if _, id, donated, err := d.OpenCreateAt(p.ctx, "file", unix.O_WRONLY, 0o6755, 1234, 5678); err != nil {
		t.Fatal(err)
	} else {
		unix.Close(donated)
		p.c.CloseFD(p.ctx, id, true)
	}
	_, err = d.SymlinkAt(p.ctx, "link", "/somewhere/else", 9, 10)
	must(t, err)
	_, err = d.MknodAt(p.ctx, "null", unix.S_IFCHR|0o666, 0, 0, 3, 1)
	must(t, err)
	_, err = d.MknodAt(p.ctx, "disk", unix.S_IFBLK|0o660, 0, 6, 1, 259)
	must(t, err)
	_, err = d.MknodAt(p.ctx, "node", unix.S_IFREG, 1, 2, 0, 0)
	must(t, err)
	return map[string]look{
		"dir":      {Mode: unix.S_IFDIR | 0o3777, UID: 7, GID: 8},
		"dir/file": {Mode: unix.S_IFREG | 0o6755, UID: 1234, GID: 5678},
		"dir/link": {Mode: unix.S_IFLNK | 0o777, UID: 9, GID: 10},
		"dir/null": {Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3},
		"dir/disk": {Mode: unix.S_IFBLK | 0o660, GID: 6, Major: 259, Minor: 1},
		"dir/node": {Mode: unix.S_IFREG, UID: 1, GID: 2},
	}
}

func TestLayerKeepsWhatTheGuestGives(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	want := makeAll(t, p)
	check := func(p *peer) {
		t.Helper()
		for path, w := range want {
			_, st := p.at(path)
			if d := cmp.Diff(w, looks(st)); d != "" {
				t.Errorf("%s: %s", path, d)
			}
		}
		link, _ := p.at("dir/link")
		if target, err := link.ReadLinkAt(p.ctx); err != nil || target != "/somewhere/else" {
			t.Errorf("link to %q, %v", target, err)
		}
		d, _ := p.at("dir")
		types := map[string]uint8{"file": unix.DT_REG, "link": unix.DT_LNK, "null": unix.DT_CHR, "disk": unix.DT_BLK, "node": unix.DT_REG}
		if d := cmp.Diff(types, p.list(d)); d != "" {
			t.Errorf("directory: %s", d)
		}
		stats, err := p.root.WalkStat(p.ctx, []string{"", "dir", "link", "beyond"})
		if err != nil || len(stats) != 3 || looks(stats[2]) != want["dir/link"] {
			t.Errorf("walk to a link: %v, %v", stats, err)
		}
	}
	check(p)
	p.close()
	check(newPeer(t, y.root, Options{})) // nothing of it is only in memory

	checkStored(t, y.root)
	// The attribute is what docs/internals.md says.
	buf := make([]byte, 64)
	n, err := unix.Getxattr(filepath.Join(y.root, "dir/disk"), "user.coffer.stat", buf)
	must(t, err)
	stored := []byte("\x01\x00\x00\x00\xb0\x01\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00\x03\x01\x00\x00\x01\x00\x00\x00")
	if !bytes.Equal(buf[:n], stored) {
		t.Errorf("attribute %q, want %q", buf[:n], stored)
	}
}

// checkStored sees that a layer is on the host nothing but plain files and directories, the serving user's and closed to others,
// whatever the guest made of it.
func checkStored(t *testing.T, root string) {
	t.Helper()
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		kind := st.Mode & unix.S_IFMT
		dir := kind == unix.S_IFDIR && st.Mode&0o7777&^opaqueBit == 0o700
		// What kind of object a plain file stands for is in the group's bits.
		file := kind == unix.S_IFREG && st.Mode&0o7707 == 0o600
		if int(st.Uid) != os.Geteuid() || !dir && !file {
			t.Errorf("%s is on the host %o of user %d", path, st.Mode, st.Uid)
		}
		return nil
	}))
}

func TestLayerChanges(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	f := p.put("file", "content")
	set := func(st linux.Statx) {
		t.Helper()
		if failed, why, err := f.SetStat(p.ctx, &st); err != nil || failed != 0 {
			t.Fatalf("set %#x: failed %#x: %v, %v", st.Mask, failed, why, err)
		}
	}
	set(linux.Statx{Mask: unix.STATX_UID, UID: 4294967294})
	set(linux.Statx{Mask: unix.STATX_GID, GID: 77})
	set(linux.Statx{Mask: unix.STATX_MODE, Mode: unix.S_IFREG | 0o4711})
	set(linux.Statx{Mask: unix.STATX_SIZE, Size: 3})
	set(linux.Statx{Mask: unix.STATX_ATIME | unix.STATX_MTIME, Atime: linux.StatxTimestamp{Sec: 1, Nsec: 2}, Mtime: linux.StatxTimestamp{Sec: -3, Nsec: 4}})
	_, st := p.at("file")
	if got := looks(st); got != (look{Mode: unix.S_IFREG | 0o4711, UID: 4294967294, GID: 77}) {
		t.Errorf("%+v", got)
	}
	if st.Size != 3 || st.Atime != (lisafs.StatxTimestamp{Sec: 1, Nsec: 2}) || st.Mtime != (lisafs.StatxTimestamp{Sec: -3, Nsec: 4}) {
		t.Errorf("size %d, times %v %v", st.Size, st.Atime, st.Mtime)
	}
	// Owner and mode in one request end as both were asked for.
	set(linux.Statx{Mask: unix.STATX_UID | unix.STATX_MODE, UID: 5, Mode: 0o6755})
	if _, st := p.at("file"); looks(st) != (look{Mode: unix.S_IFREG | 0o6755, UID: 5, GID: 77}) {
		t.Errorf("%+v", looks(st))
	}
	if got := p.content("file"); got != "con" {
		t.Errorf("content %q", got)
	}
	// A file that is open lives on without a name.
	id, donated, err := f.OpenAt(p.ctx, unix.O_RDWR)
	must(t, err)
	unix.Close(donated)
	must(t, p.root.UnlinkAt(p.ctx, "file", 0))
	set(linux.Statx{Mask: unix.STATX_UID, UID: 6})
	open := p.c.NewFD(id)
	must(t, open.Allocate(p.ctx, 0, 0, 100))
	if n, err := open.Write(p.ctx, []byte("more"), 3); n != 4 || err != nil {
		t.Errorf("write to an unlinked file: %d, %v", n, err)
	}
	var now lisafs.Statx
	must(t, open.StatTo(p.ctx, &now))
	if now.Size != 100 || now.UID != 6 || now.Nlink != 0 {
		t.Errorf("unlinked: %+v", now)
	}
}

// TestLostAttribute reads objects whose server was killed before it could write their attribute, or whose attribute is damaged.
func TestLostAttribute(t *testing.T) {
	y := newYard(t)
	for name, attr := range map[string][]byte{
		"none": nil, "short": []byte("\x01"), "long": make([]byte, 200), "later version": append([]byte{2}, make([]byte, 23)...),
	} {
		for kind, want := range map[string]uint16{"file": unix.S_IFREG | 0o600, "dir": unix.S_IFDIR | 0o700} {
			path := filepath.Join(y.root, name+" "+kind)
			if kind == "dir" {
				must(t, os.Mkdir(path, 0o755))
			} else {
				must(t, os.WriteFile(path, nil, 0o604))
			}
			if attr != nil {
				must(t, unix.Setxattr(path, metaAttr, attr, 0))
			}
			p := newPeer(t, y.root, Options{})
			fd, st := p.at(name + " " + kind)
			if looks(st) != (look{Mode: want}) {
				t.Errorf("%s %s: %+v", name, kind, looks(st))
			}
			if failed, why, err := fd.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_UID, UID: 3}); failed != 0 || err != nil {
				t.Errorf("%s %s cannot be given an owner: %v, %v", name, kind, why, err)
			}
			if _, st := p.at(name + " " + kind); looks(st) != (look{Mode: want, UID: 3}) {
				t.Errorf("%s %s afterwards: %+v", name, kind, looks(st))
			}
		}
	}
}

func TestNames(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume(), "bounded": {Quota: NewQuota(mib)}} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			if o.Quota != nil {
				count(t, o.Quota, y.root)
			}
			p := newPeer(t, y.root, o)
			d := p.mkdir("d")
			e := p.mkdir("e")
			f := p.put("f", "f")
			p.put("g", "g")

			wants(t, "rename onto another, kept", p.root.RenameAt(p.ctx, "f", p.root.ID(), "g", unix.RENAME_NOREPLACE), unix.EEXIST)
			must(t, p.root.RenameAt(p.ctx, "f", p.root.ID(), "g", unix.RENAME_EXCHANGE))
			if p.content("f")+p.content("g") != "gf" {
				t.Error("not exchanged")
			}
			must(t, p.root.RenameAt(p.ctx, "g", d.ID(), "h", 0))
			if p.content("d/h") != "f" {
				t.Error("not moved")
			}
			_, _, err := p.walk("g")
			wants(t, "walk to what has moved", err, unix.ENOENT)
			must(t, p.root.RenameAt(p.ctx, "f", d.ID(), "h", 0))
			if p.content("d/h") != "g" {
				t.Error("not replaced")
			}
			wants(t, "rename a directory into itself", p.root.RenameAt(p.ctx, "d", d.ID(), "x", 0), unix.EINVAL)
			wants(t, "rename onto a full directory", p.root.RenameAt(p.ctx, "e", p.root.ID(), "d", 0), unix.ENOTEMPTY)
			wants(t, "rename with a flag of whiteouts", p.root.RenameAt(p.ctx, "d", p.root.ID(), "w", unix.RENAME_WHITEOUT), unix.EINVAL)

			// f now names what was moved and then replaced: it has no name any more.
			_, err = e.LinkAt(p.ctx, f.ID(), "again")
			wants(t, "link to what has no name", err, unix.EINVAL)
			h, _ := p.at("d/h")
			inode, err := e.LinkAt(p.ctx, h.ID(), "link")
			must(t, err)
			if _, st := p.at("d/h"); st.Nlink != 2 || st.Ino != inode.Stat.Ino {
				t.Errorf("link: %+v, %+v", st, inode.Stat)
			}
			_, err = e.LinkAt(p.ctx, h.ID(), "link")
			wants(t, "link onto another", err, unix.EEXIST)
			_, err = e.LinkAt(p.ctx, d.ID(), "dir")
			wants(t, "link to a directory", err, unix.EPERM)

			wants(t, "unlink a directory", p.root.UnlinkAt(p.ctx, "d", 0), unix.EISDIR)
			wants(t, "rmdir a full directory", p.root.UnlinkAt(p.ctx, "d", unix.AT_REMOVEDIR), unix.ENOTEMPTY)
			wants(t, "rmdir a file", d.UnlinkAt(p.ctx, "h", unix.AT_REMOVEDIR), unix.ENOTDIR)
			wants(t, "unlink nothing", p.root.UnlinkAt(p.ctx, "nothing", 0), unix.ENOENT)
			must(t, d.UnlinkAt(p.ctx, "h", 0))
			must(t, p.root.UnlinkAt(p.ctx, "d", unix.AT_REMOVEDIR))
			wants(t, "create in a removed directory", func() error { _, err := d.MkdirAt(p.ctx, "x", 0o700, 0, 0); return err }(), unix.EINVAL)
			if p.content("e/link") != "g" {
				t.Error("the other name went too")
			}

			_, err = p.root.MkdirAt(p.ctx, "e", 0o700, 0, 0)
			wants(t, "mkdir again", err, unix.EEXIST)
			_, err = p.root.SymlinkAt(p.ctx, "e", "x", lisafs.NoUID, lisafs.NoGID)
			wants(t, "symlink again", err, unix.EEXIST)
			_, _, _, err = p.root.OpenCreateAt(p.ctx, "e", unix.O_RDWR, 0o600, lisafs.NoUID, lisafs.NoGID)
			wants(t, "create again", err, unix.EEXIST)
			_, err = p.root.MkdirAt(p.ctx, strings.Repeat("n", 256), 0o700, lisafs.NoUID, lisafs.NoGID)
			wants(t, "mkdir with a long name", err, unix.ENAMETOOLONG)

			if names := slices.Sorted(maps.Keys(p.list(p.root))); !slices.Equal(names, []string{"e"}) {
				t.Errorf("left: %v", names)
			}
			y.untouched(t)
			if o.Quota != nil {
				p.close()
				exact(t, o.Quota, y.root)
			}
		})
	}
}

// TestNoNameLeadsOut tries every operation that takes a name with names that are no names.
func TestNoNameLeadsOut(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			p := newPeer(t, y.root, o)
			d := p.mkdir("d")
			f := p.put("f", "")
			for _, bad := range []string{"..", ".", "", "/", "../outside", "d/../..", "d/x", y.outside, "../outside/secret", "x\x00y"} {
				try := func(op string, err error) {
					t.Helper()
					wants(t, op+" "+bad, err, unix.EINVAL)
				}
				// Two levels deep, so that one step up stays inside and is refused all the same.
				for _, dir := range []lisafs.ClientFD{p.root, d} {
					_, _, err := dir.WalkMultiple(p.ctx, []string{bad})
					try("walk", err)
					_, _, err = dir.WalkMultiple(p.ctx, []string{"d", bad})
					if dir == p.root {
						try("walk on", err)
					}
					if bad != "" { // the empty name is the directory's own there
						_, err = dir.WalkStat(p.ctx, []string{bad, "outside"})
						try("walk and stat", err)
					}
					_, _, _, err = dir.OpenCreateAt(p.ctx, bad, unix.O_RDWR, 0o600, lisafs.NoUID, lisafs.NoGID)
					try("create", err)
					_, err = dir.MkdirAt(p.ctx, bad, 0o700, lisafs.NoUID, lisafs.NoGID)
					try("mkdir", err)
					_, err = dir.MknodAt(p.ctx, bad, unix.S_IFREG|0o600, lisafs.NoUID, lisafs.NoGID, 0, 0)
					try("mknod", err)
					_, err = dir.SymlinkAt(p.ctx, bad, "target", lisafs.NoUID, lisafs.NoGID)
					try("symlink", err)
					_, err = dir.LinkAt(p.ctx, f.ID(), bad)
					try("link", err)
					try("unlink", dir.UnlinkAt(p.ctx, bad, 0))
					try("rmdir", dir.UnlinkAt(p.ctx, bad, unix.AT_REMOVEDIR))
					try("rename from", dir.RenameAt(p.ctx, bad, d.ID(), "x", 0))
					try("rename to", p.root.RenameAt(p.ctx, "f", dir.ID(), bad, 0))
					try("exchange", p.root.RenameAt(p.ctx, "f", dir.ID(), bad, unix.RENAME_EXCHANGE))
				}
			}
			if names := slices.Sorted(maps.Keys(p.list(p.root))); !slices.Equal(names, []string{"d", "f"}) {
				t.Errorf("left: %v", names)
			}
			y.untouched(t)
		})
	}
}

// TestPlantedLinks serves a layer into which links were put that no guest can make. They lead nowhere.
func TestPlantedLinks(t *testing.T) {
	y := newYard(t)
	must(t, os.Symlink("../outside", filepath.Join(y.root, "dir")))
	must(t, os.Symlink("../outside/secret", filepath.Join(y.root, "file")))
	must(t, os.Mkdir(filepath.Join(y.root, "sub"), 0o700))
	p := newPeer(t, y.root, Options{})
	for _, path := range []string{"dir", "file", "dir/secret"} {
		if _, _, err := p.walk(path); err == nil {
			t.Errorf("walked to %s", path)
		}
		if stats, err := p.root.WalkStat(p.ctx, strings.Split(path, "/")); err == nil && len(stats) > 0 {
			t.Errorf("saw %s: %v", path, stats)
		}
	}
	// A directory replaced by a link after it was opened.
	sub, _ := p.at("sub")
	must(t, os.Rename(filepath.Join(y.root, "sub"), filepath.Join(y.root, "moved")))
	must(t, os.Symlink("../outside", filepath.Join(y.root, "sub")))
	_, err := sub.MkdirAt(p.ctx, "here", 0o700, 0, 0)
	must(t, err)
	if _, err := os.Stat(filepath.Join(y.root, "moved/here")); err != nil {
		t.Error(err)
	}
	y.untouched(t)
}

func TestReservedNames(t *testing.T) {
	y := newYard(t)
	must(t, os.MkdirAll(filepath.Join(y.root, "full", tmpPrefix+"dir"), 0o700))
	must(t, os.WriteFile(filepath.Join(y.root, "full", tmpPrefix+"file"), nil, 0o600))
	must(t, os.MkdirAll(filepath.Join(y.root, "other", tmpPrefix+"dir"), 0o700))
	must(t, os.MkdirAll(filepath.Join(y.root, "both", tmpPrefix+"dir"), 0o700))
	must(t, os.WriteFile(filepath.Join(y.root, "both", "kept"), nil, 0o600))
	p := newPeer(t, y.root, Options{})
	f := p.put("f", "")
	full, _ := p.at("full")
	if got := p.list(full); len(got) != 0 {
		t.Errorf("seen: %v", got)
	}
	_, _, err := p.walk("full/" + tmpPrefix + "file")
	wants(t, "walk", err, unix.ENOENT)
	if stats, err := full.WalkStat(p.ctx, []string{tmpPrefix + "file"}); err != nil || len(stats) != 0 {
		t.Errorf("stat: %v, %v", stats, err)
	}
	name := tmpPrefix + "mine"
	_, _, _, err = full.OpenCreateAt(p.ctx, name, unix.O_RDWR, 0o600, 0, 0)
	wants(t, "create", err, unix.EPERM)
	_, err = full.MkdirAt(p.ctx, name, 0o700, 0, 0)
	wants(t, "mkdir", err, unix.EPERM)
	_, err = full.SymlinkAt(p.ctx, name, "x", 0, 0)
	wants(t, "symlink", err, unix.EPERM)
	_, err = full.MknodAt(p.ctx, name, unix.S_IFREG, 0, 0, 0, 0)
	wants(t, "mknod", err, unix.EPERM)
	_, err = full.LinkAt(p.ctx, f.ID(), name)
	wants(t, "link", err, unix.EPERM)
	wants(t, "rename to", p.root.RenameAt(p.ctx, "f", full.ID(), name, 0), unix.EINVAL)
	wants(t, "rename from", full.RenameAt(p.ctx, tmpPrefix+"file", full.ID(), "mine", 0), unix.ENOENT)
	wants(t, "unlink", full.UnlinkAt(p.ctx, tmpPrefix+"file", 0), unix.ENOENT)

	// What a killed server left does not keep a directory that the guest sees empty, and only that.
	wants(t, "rmdir a directory with a file", p.root.UnlinkAt(p.ctx, "both", unix.AT_REMOVEDIR), unix.ENOTEMPTY)
	must(t, p.root.UnlinkAt(p.ctx, "full", unix.AT_REMOVEDIR))
	p.mkdir("new")
	must(t, p.root.RenameAt(p.ctx, "new", p.root.ID(), "other", 0))
	if names := slices.Sorted(maps.Keys(p.list(p.root))); !slices.Equal(names, []string{"both", "f", "other"}) {
		t.Errorf("left: %v", names)
	}
}

func TestLayerAttributes(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	f := p.put("f", "")
	for _, name := range []string{"user.a", "user.overlay.opaque", "security.capability", "system.posix_acl_access", metaAttr} {
		must(t, f.SetXattr(p.ctx, name, "value of "+name, unix.XATTR_CREATE))
		wants(t, "create again "+name, f.SetXattr(p.ctx, name, "", unix.XATTR_CREATE), unix.EEXIST)
		if v, err := f.GetXattr(p.ctx, name, 4096); err != nil || v != "value of "+name {
			t.Errorf("%s: %q, %v", name, v, err)
		}
		if v, err := f.GetXattr(p.ctx, name, 0); err != nil || v != "value of "+name {
			t.Errorf("%s by size 0: %q, %v", name, v, err)
		}
		_, err := f.GetXattr(p.ctx, name, 3)
		wants(t, "read into too little", err, unix.ERANGE)
	}
	got, err := f.ListXattr(p.ctx, 4096)
	must(t, err)
	slices.Sort(got)
	if want := []string{"security.capability", "system.posix_acl_access", "user.a", metaAttr, "user.overlay.opaque"}; !slices.Equal(got, want) {
		t.Errorf("listed: %v", got)
	}
	// An attribute of the guest's of that name changes nothing of what the layer keeps.
	if _, st := p.at("f"); looks(st) != (look{Mode: unix.S_IFREG | 0o644}) {
		t.Errorf("%+v", looks(st))
	}
	must(t, f.RemoveXattr(p.ctx, metaAttr))
	if _, st := p.at("f"); looks(st) != (look{Mode: unix.S_IFREG | 0o644}) {
		t.Errorf("%+v", looks(st))
	}
	_, err = f.GetXattr(p.ctx, metaAttr, 100)
	wants(t, "read a removed one", err, unix.ENODATA)
	wants(t, "remove again", f.RemoveXattr(p.ctx, metaAttr), unix.ENODATA)
	wants(t, "replace nothing", f.SetXattr(p.ctx, "user.none", "", unix.XATTR_REPLACE), unix.ENODATA)
	wants(t, "a long name", f.SetXattr(p.ctx, "user."+strings.Repeat("n", 245), "", 0), unix.ERANGE)
	// Not even the type that a link has keeps it from attributes of its own.
	inode, err := p.root.SymlinkAt(p.ctx, "link", "target", 0, 0)
	must(t, err)
	link := p.c.NewFD(inode.ControlFD)
	must(t, link.SetXattr(p.ctx, "trusted.x", "y", 0))
}

// TestNoPipesOrSockets: those live in the guest's kernel, which asks first and makes its own when refused.
func TestNoPipesOrSockets(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			p := newPeer(t, y.root, o)
			modes := []uint16{unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFLNK, unix.S_IFDIR, 0o110000}
			if o.Host {
				modes = append(modes, unix.S_IFCHR, unix.S_IFBLK)
			}
			for _, m := range modes {
				_, err := p.root.MknodAt(p.ctx, "node", lmode(m|0o600), lisafs.NoUID, lisafs.NoGID, 3, 1)
				wants(t, "mknod", err, unix.EPERM)
			}
			_, _, err := p.root.BindAt(p.ctx, unix.SOCK_STREAM, "sock", 0o600, lisafs.NoUID, lisafs.NoGID)
			wants(t, "bind", err, unix.EPERM)
			if got := p.list(p.root); len(got) != 0 {
				t.Errorf("made: %v", got)
			}
		})
	}
}

func TestReadOnly(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			p := newPeer(t, y.root, o)
			p.put("f", "content")
			p.mkdir("d")
			f, _ := p.at("f")
			must(t, f.SetXattr(p.ctx, "user.a", "b", 0))
			p.close()

			before := describe(t, y.root)
			o.ReadOnly = true
			p = newPeer(t, y.root, o)
			f, _ = p.at("f")
			d, _ := p.at("d")
			try := func(op string, err error) { t.Helper(); wants(t, op, err, unix.EROFS) }
			for _, flags := range []uint32{unix.O_WRONLY, unix.O_RDWR, unix.O_ACCMODE, unix.O_TRUNC, unix.O_RDONLY | unix.O_TRUNC} {
				_, _, err := f.OpenAt(p.ctx, flags)
				try("open", err)
			}
			_, _, _, err := p.root.OpenCreateAt(p.ctx, "new", unix.O_RDONLY, 0o600, lisafs.NoUID, lisafs.NoGID)
			try("create", err)
			_, err = p.root.MkdirAt(p.ctx, "new", 0o700, lisafs.NoUID, lisafs.NoGID)
			try("mkdir", err)
			_, err = p.root.MknodAt(p.ctx, "new", unix.S_IFREG, lisafs.NoUID, lisafs.NoGID, 0, 0)
			try("mknod", err)
			_, err = p.root.SymlinkAt(p.ctx, "new", "x", lisafs.NoUID, lisafs.NoGID)
			try("symlink", err)
			_, err = p.root.LinkAt(p.ctx, f.ID(), "new")
			try("link", err)
			_, _, err = p.root.BindAt(p.ctx, unix.SOCK_STREAM, "new", 0o600, lisafs.NoUID, lisafs.NoGID)
			try("bind", err)
			try("unlink", p.root.UnlinkAt(p.ctx, "f", 0))
			try("rmdir", p.root.UnlinkAt(p.ctx, "d", unix.AT_REMOVEDIR))
			try("rename", p.root.RenameAt(p.ctx, "f", d.ID(), "f", 0))
			try("exchange", p.root.RenameAt(p.ctx, "f", p.root.ID(), "d", unix.RENAME_EXCHANGE))
			try("set attribute", f.SetXattr(p.ctx, "user.a", "c", 0))
			try("remove attribute", f.RemoveXattr(p.ctx, "user.a"))
			for _, m := range []uint32{unix.STATX_MODE, unix.STATX_UID, unix.STATX_GID, unix.STATX_SIZE, unix.STATX_MTIME} {
				_, _, err := f.SetStat(p.ctx, &linux.Statx{Mask: m, Mode: 0o777, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())})
				try("setstat", err)
			}
			id, donated, err := f.OpenAt(p.ctx, unix.O_RDONLY)
			must(t, err)
			open := p.c.NewFD(id)
			_, err = open.Write(p.ctx, []byte("x"), 0)
			try("write", err)
			try("allocate", open.Allocate(p.ctx, 0, 0, 100))
			// Nor does the descriptor that leaves the server write.
			_, err = unix.Write(donated, []byte("x"))
			wants(t, "write to the donated descriptor", err, unix.EBADF)
			wants(t, "truncate the donated descriptor", unix.Ftruncate(donated, 0), unix.EINVAL)
			unix.Close(donated)
			// What remains is reading.
			if got := p.content("f"); got != "content" {
				t.Errorf("content %q", got)
			}
			if v, err := f.GetXattr(p.ctx, "user.a", 100); v != "b" || err != nil {
				t.Errorf("attribute %q, %v", v, err)
			}
			p.close()
			if now := describe(t, y.root); now != before {
				t.Errorf("now:\n%s\nwas:\n%s", now, before)
			}
		})
	}
}

// TestOpenRights sees that a descriptor can do what it was opened for and no more.
func TestOpenRights(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			p := newPeer(t, y.root, o)
			f := p.put("f", "content")
			buf := make([]byte, 16)
			for flags, can := range map[uint32]struct{ read, write bool }{
				unix.O_RDONLY: {read: true}, unix.O_WRONLY: {write: true}, unix.O_RDWR: {true, true}, unix.O_ACCMODE: {},
			} {
				id, donated, err := f.OpenAt(p.ctx, flags)
				must(t, err)
				open := p.c.NewFD(id)
				check := func(op string, can bool, err error) {
					t.Helper()
					want := unix.Errno(0)
					if !can {
						want = unix.EBADF
					}
					wants(t, op, err, want)
				}
				_, err = open.Read(p.ctx, buf, 0)
				check("read", can.read, err)
				_, err = open.Write(p.ctx, []byte("content"), 0)
				check("write", can.write, err)
				check("allocate", can.write, open.Allocate(p.ctx, unix.FALLOC_FL_KEEP_SIZE, 0, 1))
				_, err = unix.Pread(donated, buf, 0)
				check("read directly", can.read, err)
				_, err = unix.Pwrite(donated, []byte("content"), 0)
				check("write directly", can.write, err)
				unix.Close(donated)
				p.c.CloseFD(p.ctx, id, true)
				_, err = open.Read(p.ctx, buf, 0)
				wants(t, "read after close", err, unix.EBADF)
			}
			// Offsets that no file has.
			id, donated, err := f.OpenAt(p.ctx, unix.O_RDWR)
			must(t, err)
			unix.Close(donated)
			open := p.c.NewFD(id)
			for _, off := range []uint64{1 << 63, 1<<64 - 1} {
				_, err := open.Write(p.ctx, []byte("x"), off)
				wants(t, "write far out", err, unix.EINVAL)
				wants(t, "allocate far out", open.Allocate(p.ctx, 0, off, 1), unix.EINVAL)
			}
			if n, err := open.Read(p.ctx, buf, 1<<40); n != 0 || !errors.Is(err, io.EOF) {
				t.Errorf("read beyond the end: %d, %v", n, err)
			}
			// Truncation by opening.
			id, donated, err = f.OpenAt(p.ctx, unix.O_WRONLY|unix.O_TRUNC)
			must(t, err)
			unix.Close(donated)
			p.c.CloseFD(p.ctx, id, true)
			if _, st := p.at("f"); st.Size != 0 {
				t.Errorf("size %d", st.Size)
			}
		})
	}
}

// TestChannels does the same over shared memory, as a guest's kernel does.
func TestChannels(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, Options{})
	must(t, p.c.StartChannels())
	want := makeAll(t, p)
	for path, w := range want {
		if _, st := p.at(path); looks(st) != w {
			t.Errorf("%s: %+v", path, looks(st))
		}
	}
	p.put("f", "through a descriptor sent beside the channel")
	if got := p.content("f"); got != "through a descriptor sent beside the channel" {
		t.Errorf("content %q", got)
	}
}
