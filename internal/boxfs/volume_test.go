package boxfs

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// volume is a volume as the jail serves it: the box's root is the serving user.
func volume() Options { return Options{Host: true, IDOffset: uint32(os.Geteuid())} }

// TestVolumeLinks serves a host directory with links out of it. The server tells where they lead, as the guest's kernel wants to
// know, and follows none.
func TestVolumeLinks(t *testing.T) {
	y := newYard(t)
	for name, target := range map[string]string{
		"dir": "../outside", "file": "../outside/secret", "absolute": filepath.Join(y.outside, "secret"), "dangling": "../outside/new",
	} {
		must(t, os.Symlink(target, filepath.Join(y.root, name)))
	}
	must(t, os.Mkdir(filepath.Join(y.root, "sub"), 0o755))
	p := newPeer(t, y.root, volume())
	sub, _ := p.at("sub")
	for _, name := range []string{"dir", "file", "absolute", "dangling"} {
		link, st := p.at(name)
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Fatalf("%s has mode %o", name, st.Mode)
		}
		target, err := link.ReadLinkAt(p.ctx)
		must(t, err)
		if want, _ := os.Readlink(filepath.Join(y.root, name)); target != want {
			t.Errorf("%s leads to %q, want %q", name, target, want)
		}
		if stats, err := p.root.WalkStat(p.ctx, []string{name, "secret"}); err != nil || len(stats) != 1 {
			t.Errorf("stat through %s: %v, %v", name, stats, err)
		}
		if status, inodes, err := p.root.WalkMultiple(p.ctx, []string{name, "secret"}); err != nil || len(inodes) != 1 || status != lisafs.WalkComponentSymlink {
			t.Errorf("walk through %s: %v, %v, %v", name, status, inodes, err)
		}
		_, _, err = link.OpenAt(p.ctx, unix.O_RDONLY)
		wants(t, "open "+name, err, unix.EINVAL)
		_, _, _, err = p.root.OpenCreateAt(p.ctx, name, unix.O_RDWR|unix.O_TRUNC, 0o600, lisafs.NoUID, lisafs.NoGID)
		wants(t, "create "+name, err, unix.EEXIST)
		_, err = link.MkdirAt(p.ctx, "new", 0o700, lisafs.NoUID, lisafs.NoGID)
		wants(t, "mkdir in "+name, err, unix.ENOTDIR)
		wants(t, "unlink in "+name, link.UnlinkAt(p.ctx, "secret", 0), unix.ENOTDIR)
		wants(t, "rename in "+name, p.root.RenameAt(p.ctx, "sub", link.ID(), "sub", 0), unix.ENOTDIR)

		for mask, want := range map[uint32]unix.Errno{
			unix.STATX_MODE: unix.EOPNOTSUPP, unix.STATX_MTIME: 0, unix.STATX_SIZE: unix.ELOOP, unix.STATX_UID: 0,
		} {
			_, failure, err := link.SetStat(p.ctx, &linux.Statx{Mask: mask, Mode: 0o777})
			wants(t, "setstat "+name, errors.Join(failure, err), want)
		}
		wants(t, "set attribute of "+name, link.SetXattr(p.ctx, "user.a", "b", 0), unix.EOPNOTSUPP)
		_, err = link.GetXattr(p.ctx, "user.a", 100)
		wants(t, "get attribute of "+name, err, unix.EOPNOTSUPP)
		if names, err := link.ListXattr(p.ctx, 100); err != nil || len(names) != 0 {
			t.Errorf("attributes of %s: %v, %v", name, names, err)
		}
		// A hard link to it is one to the link itself.
		_, err = sub.LinkAt(p.ctx, link.ID(), name)
		must(t, err)
		if _, st := p.at("sub/" + name); st.Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("hard link to %s has mode %o", name, st.Mode)
		}
		must(t, sub.UnlinkAt(p.ctx, name, 0))
		must(t, p.root.UnlinkAt(p.ctx, name, 0))
	}
	y.untouched(t)
}

// TestVolumeRace replaces what a guest has open by links out of the tree, as a program on the host could.
func TestVolumeRace(t *testing.T) {
	y := newYard(t)
	must(t, os.Mkdir(filepath.Join(y.root, "dir"), 0o755))
	must(t, os.WriteFile(filepath.Join(y.root, "secret"), []byte("inside"), 0o644))
	p := newPeer(t, y.root, volume())
	dir, _ := p.at("dir")
	file, _ := p.at("secret")
	for _, name := range []string{"dir", "secret"} {
		must(t, os.Rename(filepath.Join(y.root, name), filepath.Join(y.root, name+".was")))
	}
	must(t, os.Symlink("../outside", filepath.Join(y.root, "dir")))
	must(t, os.Symlink("../outside/secret", filepath.Join(y.root, "secret")))
	if _, err := dir.Walk(p.ctx, "secret"); !errors.Is(err, unix.ENOENT) {
		t.Errorf("walk: %v", err)
	}
	_, err := dir.MkdirAt(p.ctx, "new", 0o755, lisafs.NoUID, lisafs.NoGID)
	must(t, err)
	if _, failure, err := file.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_SIZE | unix.STATX_MODE, Size: 1, Mode: 0o600}); err != nil || failure != nil {
		t.Errorf("setstat: %v, %v", failure, err)
	}
	id, donated, err := file.OpenAt(p.ctx, unix.O_RDWR)
	must(t, err)
	unix.Close(donated)
	buf := make([]byte, 100)
	open := p.c.NewFD(id)
	if n, err := open.Read(p.ctx, buf, 0); err != nil || string(buf[:n]) != "i" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	y.untouched(t)
}

// TestVolumeModes makes files with every mode that programs use. Their maker may write to them whatever it is, as on Linux.
func TestVolumeModes(t *testing.T) {
	// The jail's first process runs without one; here it would hide the modes.
	defer unix.Umask(unix.Umask(0))
	y := newYard(t)
	p := newPeer(t, y.root, volume())
	for name, mode := range map[string]uint16{"usual": 0o644, "readable": 0o444, "closed": 0, "write-only": 0o200, "all": 0o777} {
		p.putMode(name, "content of "+name, mode)
		st, err := os.Lstat(filepath.Join(y.root, name))
		must(t, err)
		if st.Mode() != os.FileMode(mode) || st.Size() != int64(len("content of "+name)) {
			t.Errorf("%s: mode %v, %d bytes", name, st.Mode(), st.Size())
		}
	}
	// Another's rights are never given away on the host.
	p.putMode("setuid", "", 0o6755)
	inode, err := p.root.MkdirAt(p.ctx, "setgid", 0o7777, lisafs.NoUID, lisafs.NoGID)
	must(t, err)
	_, err = p.root.MknodAt(p.ctx, "node", unix.S_IFREG|0o6711, lisafs.NoUID, lisafs.NoGID, 0, 0)
	must(t, err)
	f, _ := p.at("usual")
	d := p.c.NewFD(inode.ControlFD)
	check := func(name string, want uint32) {
		t.Helper()
		var st unix.Stat_t
		must(t, unix.Lstat(filepath.Join(y.root, name), &st))
		if st.Mode&0o7777 != want {
			t.Errorf("%s: mode %o, want %o", name, st.Mode&0o7777, want)
		}
	}
	check("setuid", 0o755)
	check("setgid", 0o1777)
	check("node", 0o711)
	for name, fd := range map[string]lisafs.ClientFD{"usual": f, "setgid": d} {
		if _, failure, err := fd.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_MODE, Mode: 0o7755}); failure != nil || err != nil {
			t.Fatal(failure, err)
		}
		check(name, 0o1755)
	}
}

// TestVolumeOwners: ids are moved by the offset, and those that have no place are shown as nobody's.
func TestVolumeOwners(t *testing.T) {
	y := newYard(t)
	me := uint32(os.Geteuid())
	p := newPeer(t, y.root, Options{Host: true, IDOffset: me})
	f := p.put("f", "")
	if _, st := p.at("f"); st.UID != 0 {
		t.Errorf("the serving user's file belongs to %d", st.UID)
	}
	other := newPeer(t, y.root, Options{Host: true, IDOffset: me + 1})
	if _, st := other.at("f"); st.UID != overflow || st.GID != overflow {
		t.Errorf("a file below the offset belongs to %d:%d", st.UID, st.GID)
	}
	var before unix.Stat_t
	must(t, unix.Lstat(filepath.Join(y.root, "f"), &before))
	_, failure, err := f.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_UID | unix.STATX_GID, UID: 12, GID: 34})
	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(y.root, "f"), &st))
	if me != 0 {
		// In the error itself: where the guest's kernel caches nothing it looks at no mask of what failed.
		wants(t, "give a file away", err, unix.EPERM)
		if st.Uid != before.Uid || st.Gid != before.Gid {
			t.Errorf("owner %d:%d", st.Uid, st.Gid)
		}
		// What others make stays this user's.
		_, id, donated, err := p.root.OpenCreateAt(p.ctx, "file", unix.O_RDWR, 0o600, 12, 34)
		must(t, err)
		unix.Close(donated)
		p.c.CloseFD(p.ctx, id, true)
		_, err = p.root.MkdirAt(p.ctx, "dir", 0o700, 12, 34)
		must(t, err)
		_, err = p.root.MknodAt(p.ctx, "node", unix.S_IFREG|0o600, 12, 34, 0, 0)
		must(t, err)
		_, err = p.root.SymlinkAt(p.ctx, "link", "target", 12, 34)
		must(t, err)
		for _, name := range []string{"file", "dir", "node", "link"} {
			if _, st := p.at(name); st.UID != 0 {
				t.Errorf("%s belongs to %d", name, st.UID)
			}
		}
		return
	}
	must(t, err)
	if failure != nil || st.Uid != 12 || st.Gid != 34 {
		t.Errorf("owner %d:%d, %v", st.Uid, st.Gid, failure)
	}
	moved := newPeer(t, y.root, Options{Host: true, IDOffset: 10})
	fd, shown := moved.at("f")
	if shown.UID != 2 || shown.GID != 24 {
		t.Errorf("shown as %d:%d", shown.UID, shown.GID)
	}
	if _, failure, err := fd.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_UID, UID: 5}); failure != nil || err != nil {
		t.Fatal(failure, err)
	}
	must(t, unix.Lstat(filepath.Join(y.root, "f"), &st))
	if st.Uid != 15 || st.Gid != 34 {
		t.Errorf("owner %d:%d", st.Uid, st.Gid)
	}
}

// TestVolumeSpecialFiles: the host's pipes and sockets can be seen, and neither opened nor reached.
func TestVolumeSpecialFiles(t *testing.T) {
	y := newYard(t)
	must(t, unix.Mkfifo(filepath.Join(y.root, "pipe"), 0o666))
	// A socket's path has room for little more than a hundred bytes.
	dir, err := os.MkdirTemp("/tmp", "boxfs-")
	must(t, err)
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	must(t, err)
	defer l.Close()
	must(t, os.Link(filepath.Join(dir, "sock"), filepath.Join(y.root, "sock")))
	p := newPeer(t, y.root, volume())
	for name, mode := range map[string]uint16{"pipe": unix.S_IFIFO, "sock": unix.S_IFSOCK} {
		fd, st := p.at(name)
		if st.Mode&unix.S_IFMT != mode {
			t.Errorf("%s: mode %o", name, st.Mode)
		}
		for _, flags := range []uint32{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR} {
			_, _, err := fd.OpenAt(p.ctx, flags)
			wants(t, "open "+name, err, unix.EPERM)
		}
		_, failure, err := fd.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_SIZE})
		if err == nil {
			t.Errorf("truncate %s: %v", name, failure)
		}
	}
	sock, _ := p.at("sock")
	_, err = sock.Connect(p.ctx, unix.SOCK_STREAM, lisafs.NoUID, lisafs.NoGID)
	wants(t, "connect", err, unix.EPERM)
	_, err = sock.Connect(p.ctx, unix.SOCK_STREAM, 0, 0)
	wants(t, "connect as root", err, unix.EPERM)
}

func TestVolumeAttributes(t *testing.T) {
	y := newYard(t)
	p := newPeer(t, y.root, volume())
	f := p.put("f", "")
	must(t, f.SetXattr(p.ctx, "user.a", "b", 0))
	if v, err := f.GetXattr(p.ctx, "user.a", 100); v != "b" || err != nil {
		t.Errorf("%q, %v", v, err)
	}
	// An ordinary user may set none of these; root's must not leave the box either.
	for _, name := range []string{"trusted.overlay.opaque", "security.capability", "system.posix_acl_access", "a", "User.a", ""} {
		wants(t, "set "+name, f.SetXattr(p.ctx, name, "x", 0), unix.EOPNOTSUPP)
		_, err := f.GetXattr(p.ctx, name, 100)
		wants(t, "get "+name, err, unix.EOPNOTSUPP)
		wants(t, "remove "+name, f.RemoveXattr(p.ctx, name), unix.EOPNOTSUPP)
	}
	if os.Geteuid() == 0 {
		must(t, unix.Setxattr(filepath.Join(y.root, "f"), "trusted.test", []byte("x"), 0))
	}
	if names, err := f.ListXattr(p.ctx, 4096); err != nil || len(names) != 1 || names[0] != "user.a" {
		t.Errorf("listed: %v, %v", names, err)
	}
}

// TestVolumeFile serves a single file.
func TestVolumeFile(t *testing.T) {
	y := newYard(t)
	path := filepath.Join(y.root, "f")
	must(t, os.WriteFile(path, []byte("content"), 0o644))
	p := newPeer(t, path, volume())
	id, donated, err := p.root.OpenAt(p.ctx, unix.O_RDWR)
	must(t, err)
	defer unix.Close(donated)
	open := p.c.NewFD(id)
	if _, err := open.Write(p.ctx, []byte("C"), 0); err != nil {
		t.Error(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "Content" {
		t.Errorf("%q", b)
	}
	_, _, err = p.root.WalkMultiple(p.ctx, []string{"x"})
	wants(t, "walk in a file", err, unix.ENOTDIR)
	_, err = p.root.MkdirAt(p.ctx, "x", 0o700, lisafs.NoUID, lisafs.NoGID)
	wants(t, "mkdir in a file", err, unix.ENOTDIR)
	y.untouched(t)
}
