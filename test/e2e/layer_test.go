package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRenameToOwnLink: what any user of a box may do to two names of one file does not end the box.
func TestRenameToOwnLink(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "cd /root && mkdir d && echo hello >a && ln a b && ln a d/c")
	for _, to := range []string{"b", "d/c"} {
		// Some programs rename, as here, some remove the old name; neither may lose the file.
		h.try("exec", "b", "mv", "/root/a", "/root/"+to)
		if got := h.run("exec", "b", "cat", "/root/a", "/root/"+to); got != "hello\nhello" {
			t.Errorf("after mv a %s: %q", to, got)
		}
	}
	if got := h.run("exec", "b", "sh", "-c", "cd /root && mv a e && rm b d/c && cat e && ls"); got != "hello\nd\ne" {
		t.Errorf("at the end: %q", got)
	}
	h.run("rm", "-f", "b")
}

// TestVolumeOwners: what cannot be done to a volume's file fails in the box, too, and any of its users can make files where all may.
func TestVolumeOwners(t *testing.T) {
	h := newHome(t)
	vol := t.TempDir()
	for _, d := range []string{filepath.Dir(vol), vol} { // for the box's user, and in the box for everybody
		if err := os.Chmod(d, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	h.run("run", "-d", "--name", "b", "-v", vol+":/vol", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "echo root >/vol/root && touch /vol/root && chmod 640 /vol/root && ln -s root /vol/link")
	if out, code := h.try("exec", "b", "sh", "-c", "chown 4000000000 /vol/root 2>&1"); code == 0 || !strings.Contains(out, "not permitted") {
		t.Errorf("a file was given to an id that there is not: code %d, %q", code, out)
	}
	if got := h.run("exec", "-u", "1000", "b", "sh", "-c", "echo user >/vol/user && mkdir /vol/dir && cat /vol/user"); got != "user" {
		t.Errorf("%q", got)
	}
	h.run("rm", "-f", "b")
}

// TestCoveredProc runs a box where no /proc can be mounted, as in the containers of Docker and Podman.
func TestCoveredProc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("covering a part of /proc needs root")
	}
	h := newHome(t)
	vol := t.TempDir()
	script := `mount -t tmpfs none /proc/fs && exec "$0" "$@"`
	c := h.cmd("run", "--rm", "-v", vol+":/vol", "base", "sh", "-c",
		"cd /root && echo hello >f && ln f g && chmod 600 g && touch f && cat g /etc/hostname >/dev/null && cp f /vol/f && chmod 604 /vol/f && cat f")
	c.Args = append([]string{"unshare", "-m", "sh", "-c", script, c.Path}, c.Args[1:]...)
	var err error
	if c.Path, err = exec.LookPath("unshare"); err != nil {
		t.Skip(err)
	}
	if out, err := c.CombinedOutput(); err != nil || string(out) != "hello\n" {
		t.Errorf("%v: %s", err, out)
	}
	if st, err := os.Stat(filepath.Join(vol, "f")); err != nil || st.Mode() != 0o604 {
		t.Errorf("%v, %v", st, err)
	}
}

// TestOpaqueMark: the mark by which a directory hides what the image has of it is where it needs no room: in the mode of the directory on
// the host, under whatever name the box's kernel sets it.
func TestOpaqueMark(t *testing.T) {
	h := newHome(t)
	id := h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "rm -r /etc; mkdir /etc; echo x > /etc/only")
	dir := filepath.Join(h.dir, "boxes", id, "state", "upper", "etc")
	fi, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode()&os.ModeSticky == 0 {
		t.Errorf("mode %v", fi.Mode())
	}
	names := make([]byte, 4096)
	n, err := unix.Listxattr(dir, names)
	if err != nil || strings.Contains(string(names[:n]), "opaque") {
		t.Errorf("attributes %q, %v", names[:n], err)
	}
	h.run("stop", "-t", "0", "b")
	h.run("start", "b")
	if got := h.run("exec", "b", "ls", "/etc"); got != "hostname\nhosts\nonly\nresolv.conf" {
		t.Errorf("after a restart: %q", got)
	}
}
