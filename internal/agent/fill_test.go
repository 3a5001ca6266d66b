package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// TestFill: a new volume gets what the image has in its place, once.
func TestFill(t *testing.T) {
	needNamespaces(t)
	var sc scaffold
	for _, again := range []bool{false, true} {
		lower, state, vol := sc.lower, sc.state, sc.vol
		c := boxed(t, &sc)
		if again { // the same box, started anew
			sc.lower, sc.state, sc.vol = lower, state, vol
		}
		data := sc.lower + "/data"
		if !again {
			if err := errors.Join(os.Mkdir(data+"/sub", 0o700), os.WriteFile(data+"/sub/f", []byte("image's\n"), 0o640), os.Link(data+"/sub/f", data+"/g"),
				os.Symlink("/etc/passwd", data+"/l"), os.Chmod(data, os.ModeSetgid|0o751), unix.Setxattr(data+"/sub", "user.a", []byte("1"), 0),
				os.Symlink("data", sc.lower+"/linked"), os.MkdirAll(sc.vol+"/0/left/over", 0o755), os.Mkdir(sc.vol+"/1", 0o700), os.Mkdir(sc.vol+"/2", 0o755)); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Remove(sc.vol + "/0/sub/f"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Configure(t.Context(), wire.Setup{
			Hostname: "x", Lower: []string{sc.lower}, State: sc.state, ReadOnly: true,
			Volumes: []wire.SetupVolume{{Staging: sc.vol + "/0", Target: "/linked", Fill: true}, {Staging: sc.vol + "/1", Target: "/new/place", Fill: true},
				{Staging: sc.vol + "/2", Target: "/bin/x"}},
		}); err != nil {
			t.Fatal(err)
		}
		if again {
			if got := run(t, c, sh("ls /data/sub; cat /data/sub/f2"), ""); got.out != "f2\nmine\n" {
				t.Errorf("a volume was filled again: %q %q", got.out, got.err)
			}
			break
		}
		if got := run(t, c, sh("ls /data; readlink /data/l; cat /data/sub/f; echo mine > /data/sub/f2; touch /new/place/x"), ""); got.out != "g\nl\nsub\n/etc/passwd\nimage's\n" {
			t.Errorf("%q %q", got.out, got.err)
		}
		for name, mode := range map[string]os.FileMode{"0": 0o751 | os.ModeSetgid, "0/sub": 0o700, "0/sub/f": 0o640, "1": 0o755} {
			if fi, err := os.Stat(filepath.Join(sc.vol, name)); err != nil || fi.Mode()&^os.ModeDir != mode {
				t.Errorf("%s: %v, %v", name, fi.Mode(), err)
			}
		}
		var f, g unix.Stat_t
		if err := errors.Join(unix.Stat(sc.vol+"/0/sub/f", &f), unix.Stat(sc.vol+"/0/g", &g)); err != nil || f.Ino != g.Ino {
			t.Errorf("the link is another file: %v", err)
		}
		buf := make([]byte, 10)
		if n, err := unix.Getxattr(sc.vol+"/0/sub", "user.a", buf); err != nil || string(buf[:n]) != "1" {
			t.Errorf("attribute: %v", err)
		}
		if left, _ := os.ReadDir(sc.vol + "/2"); len(left) > 0 {
			t.Error("a volume of the host's was filled")
		}
		if _, err := c.Shutdown(t.Context(), 0, 0); err != nil {
			t.Fatal(err)
		}
		<-c.Session().Done()
	}
}
