package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// TestImageDevices: what gVisor shows of a device of the image gives way to the device itself, and no time changes.
func TestImageDevices(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mknod(root+"/probe", unix.S_IFBLK, int(unix.Mkdev(7, 7))); err != nil {
		t.Skipf("this user makes no devices: %v", err)
	}
	b := &boxRoot{newroot: root}
	var dirs dirCache
	if err := errors.Join(unix.Mknod(root+"/bare", unix.S_IFBLK|0o600, 0), os.WriteFile(root+"/own", []byte("x"), 0o644)); err != nil {
		t.Fatal(err)
	}
	then := unix.Timespec{Sec: 1e9, Nsec: 5}
	if err := setMtime(root, then); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"bare", "absent", "\xff", "own"} {
		d := wire.SetupDevice{Path: []byte("/" + name), Mode: unix.S_IFBLK | 0o640, UID: 5, GID: 6, Sec: then.Sec, Nsec: then.Nsec, Major: 8, Minor: 1}
		if err := b.imageDevice(&dirs, d); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Fatal(err)
		}
		if name == "own" {
			if st.Mode&unix.S_IFMT != unix.S_IFREG {
				t.Error("a file of the box became a device")
			}
			continue
		}
		if st.Mode != unix.S_IFBLK|0o640 || st.Uid != 5 || st.Gid != 6 || st.Rdev != unix.Mkdev(8, 1) {
			t.Errorf("%q: mode %o, owner %d:%d, device %x", name, st.Mode, st.Uid, st.Gid, st.Rdev)
		}
		var dir unix.Stat_t
		if err := unix.Stat(root, &dir); err != nil || st.Mtim != then || dir.Mtim != then {
			t.Errorf("%q: it is of %v, its directory of %v, %v", name, st.Mtim, dir.Mtim, err)
		}
	}
}

// TestExtras: they come in several messages before the configuration, also for a root that is read-only then; and what cannot be had
// is told of in a few lines.
func TestExtras(t *testing.T) {
	needNamespaces(t)
	var sc scaffold
	c := boxed(t, &sc)
	odd := "/data/\xff"
	for _, name := range []string{odd, "/data/f"} {
		if err := os.WriteFile(sc.lower+name, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("data", sc.lower+"/linked"); err != nil {
		t.Fatal(err)
	}
	send := func(xs ...wire.SetupXattr) []string {
		t.Helper()
		info, err := c.Extras(t.Context(), wire.Extras{Lower: []string{sc.lower}, State: sc.state, Xattrs: xs})
		if err != nil {
			t.Fatal(err)
		}
		return info.Warnings
	}
	if w := send(wire.SetupXattr{Path: []byte(odd), Name: "user.a", Value: []byte("1")}, wire.SetupXattr{Path: []byte("/linked/f"), Name: "user.a", Value: []byte("2")}); w != nil {
		t.Errorf("warnings: %q", w)
	}
	if w := send(wire.SetupXattr{Path: []byte("/data/f"), Name: "user.b", Value: []byte{0, 255}}); w != nil {
		t.Errorf("warnings: %q", w)
	}
	var missing []wire.SetupXattr
	for i := range 3000 {
		missing = append(missing, wire.SetupXattr{Path: fmt.Appendf(nil, "/none/%d", i), Name: "user.a"}, wire.SetupXattr{Path: []byte("/none/x"), Name: fmt.Sprint("user.", i)})
	}
	w := send(missing...)
	if len(w) != maxFailures+1 || w[0] != `set user.a of "/none/0" and of 2999 more files: no such file or directory` || w[maxFailures] != "and 2981 more failures" {
		t.Errorf("%d warnings: %.300q", len(w), w)
	}
	if _, err := c.Configure(t.Context(), wire.Setup{Hostname: "x", Lower: []string{sc.lower}, State: sc.state, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if got := run(t, c, sh("cat /data/f; touch /x 2>/dev/null || echo sealed"), ""); got.out != "xsealed\n" {
		t.Errorf("%q %q", got.out, got.err)
	}
	for _, x := range [][3]string{{odd, "user.a", "1"}, {"/data/f", "user.a", "2"}, {"/data/f", "user.b", "\x00\xff"}} {
		buf := make([]byte, 10)
		n, err := unix.Lgetxattr(sc.state+"/upper"+x[0], x[1], buf)
		if err != nil || string(buf[:n]) != x[2] {
			t.Errorf("%s of %q: %q, %v", x[1], x[0], buf[:max(n, 0)], err)
		}
	}
	if _, err := c.Extras(t.Context(), wire.Extras{}); err == nil || !strings.Contains(err.Error(), "configured already") {
		t.Errorf("extras of a box that is configured: %v", err)
	}
}
