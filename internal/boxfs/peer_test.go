package boxfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/lisafs"
	"gvisor.dev/gvisor/pkg/unet"
)

// secret is what stands in every file beside the served tree, and must never come out of it.
const secret = "not the guest's to read"

// yard is a served directory and, beside it, one that is not served.
type yard struct {
	root, outside string
	before        string // what stands outside
}

func newYard(t testing.TB) yard {
	t.Helper()
	dir := t.TempDir()
	y := yard{root: filepath.Join(dir, "root"), outside: filepath.Join(dir, "outside")}
	for _, d := range []string{y.root, y.outside, filepath.Join(y.outside, "sub")} {
		must(t, os.Mkdir(d, 0o700))
	}
	for _, f := range []string{"secret", "sub/secret"} {
		must(t, os.WriteFile(filepath.Join(y.outside, f), []byte(secret), 0o644))
	}
	if err := unix.Setxattr(y.root, "user.test", nil, 0); err != nil {
		t.Skipf("no user attributes in %s: %v", dir, err)
	}
	must(t, unix.Removexattr(y.root, "user.test"))
	y.before = describe(t, y.outside)
	return y
}

// untouched fails the test if anything outside the served tree has changed.
func (y yard) untouched(t testing.TB) {
	t.Helper()
	if now := describe(t, y.outside); now != y.before {
		t.Fatalf("changed outside the tree:\n%s\nwas:\n%s", now, y.before)
	}
	entries, err := os.ReadDir(filepath.Dir(y.root))
	must(t, err)
	if len(entries) != 2 {
		t.Fatalf("beside the tree: %v", entries)
	}
}

// describe writes down everything about a tree that a file server can change.
func describe(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %o %d:%d links %d size %d mtime %d ctime %d", p, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Mtim.Nano(), st.Ctim.Nano())
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", data)
		}
		buf := make([]byte, 4096)
		if n, err := unix.Llistxattr(p, buf); err == nil {
			fmt.Fprintf(&b, " %q", buf[:n])
		}
		b.WriteByte('\n')
		return nil
	}))
	return b.String()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wants fails the test unless the error is the wanted one; 0 is success.
func wants(t testing.TB, what string, err error, want unix.Errno) {
	t.Helper()
	if want == 0 && err == nil || want != 0 && errors.Is(err, want) {
		return
	}
	t.Errorf("%s: got %v, want %v", what, err, want)
}

// serve serves a directory on a socket until that is closed, and returns the other end and Serve's answer.
func serve(t testing.TB, root string, o Options) (int, <-chan error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	dir, err := os.OpenFile(root, unix.O_PATH|unix.O_CLOEXEC, 0)
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- Serve(os.NewFile(uintptr(pair[0]), "server"), dir, o) }()
	return pair[1], done
}

// over waits for a file server's end.
func over(t testing.TB, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(30 * time.Second):
		t.Fatal("the file server still runs though its peer is gone")
		return nil
	}
}

// peer is a well-behaved client of a served directory.
type peer struct {
	t    testing.TB
	ctx  context.Context
	c    *lisafs.Client
	root lisafs.ClientFD
	done <-chan error

	bounded bool // the tree has a quota
}

func newPeer(t testing.TB, root string, o Options) *peer {
	t.Helper()
	fd, done := serve(t, root, o)
	sock, err := unet.NewSocket(fd)
	must(t, err)
	c, inode, _, err := lisafs.NewClient(sock)
	must(t, err)
	p := &peer{t: t, ctx: context.Background(), c: c, root: c.NewFD(inode.ControlFD), done: done, bounded: o.Quota != nil}
	t.Cleanup(p.close)
	return p
}

// close ends the connection and sees the server go.
func (p *peer) close() {
	p.t.Helper()
	if p.done == nil {
		return
	}
	p.c.Close()
	if err := over(p.t, p.done); err != nil {
		p.t.Errorf("serve: %v", err)
	}
	p.done = nil
}

// at walks a path that must be there.
func (p *peer) at(path string) (lisafs.ClientFD, lisafs.Statx) {
	p.t.Helper()
	fd, st, err := p.walk(path)
	if err != nil {
		p.t.Fatalf("walk %s: %v", path, err)
	}
	return fd, st
}

func (p *peer) walk(path string) (lisafs.ClientFD, lisafs.Statx, error) {
	names := strings.Split(path, "/")
	_, inodes, err := p.root.WalkMultiple(p.ctx, names)
	if err == nil && len(inodes) != len(names) {
		err = unix.ENOENT
	}
	if err != nil {
		return lisafs.ClientFD{}, lisafs.Statx{}, err
	}
	last := inodes[len(inodes)-1]
	return p.c.NewFD(last.ControlFD), last.Stat, nil
}

func (p *peer) mkdir(name string) lisafs.ClientFD {
	p.t.Helper()
	inode, err := p.root.MkdirAt(p.ctx, name, 0o755, lisafs.NoUID, lisafs.NoGID)
	if err != nil {
		p.t.Fatalf("mkdir %s: %v", name, err)
	}
	return p.c.NewFD(inode.ControlFD)
}

// put makes a file in the root, mode 0644 and root's.
func (p *peer) put(name, content string) lisafs.ClientFD {
	p.t.Helper()
	return p.putMode(name, content, 0o644)
}

func (p *peer) putMode(name, content string, mode uint16) lisafs.ClientFD {
	p.t.Helper()
	inode, id, donated, err := p.root.OpenCreateAt(p.ctx, name, unix.O_RDWR, lmode(mode), lisafs.NoUID, lisafs.NoGID)
	if err != nil {
		p.t.Fatalf("create %s: %v", name, err)
	}
	switch {
	case p.bounded && donated >= 0:
		p.t.Fatalf("create %s: a descriptor left a tree with a quota", name)
	case p.bounded:
		open := p.c.NewFD(id)
		_, err = open.Write(p.ctx, []byte(content), 0)
	case donated < 0:
		p.t.Fatalf("create %s: no descriptor came with it", name)
	default:
		defer unix.Close(donated)
		_, err = unix.Pwrite(donated, []byte(content), 0)
	}
	if err != nil {
		p.t.Fatalf("write %s: %v", name, err)
	}
	p.c.CloseFD(p.ctx, id, true)
	return p.c.NewFD(inode.ControlFD)
}

// content reads a file by asking the server, not through a donated descriptor.
func (p *peer) content(path string) string {
	p.t.Helper()
	fd, _ := p.at(path)
	id, donated, err := fd.OpenAt(p.ctx, unix.O_RDONLY)
	if err != nil {
		p.t.Fatalf("open %s: %v", path, err)
	}
	if donated >= 0 {
		unix.Close(donated)
	}
	open := p.c.NewFD(id)
	defer open.Close(p.ctx, true)
	buf := make([]byte, 4096)
	n, err := open.Read(p.ctx, buf, 0)
	if err != nil {
		p.t.Fatalf("read %s: %v", path, err)
	}
	return string(buf[:n])
}

// list reads a directory: the entries' names with the types that the server tells.
func (p *peer) list(dir lisafs.ClientFD) map[string]uint8 {
	p.t.Helper()
	id, donated, err := dir.OpenAt(p.ctx, unix.O_RDONLY)
	must(p.t, err)
	if donated >= 0 {
		p.t.Errorf("a directory's descriptor left the server")
	}
	open := p.c.NewFD(id)
	defer open.Close(p.ctx, true)
	out := map[string]uint8{}
	for {
		entries, err := open.Getdents64(p.ctx, 512)
		must(p.t, err)
		if len(entries) == 0 {
			return out
		}
		for _, e := range entries {
			if _, twice := out[string(e.Name)]; twice {
				p.t.Errorf("%s is listed twice", e.Name)
			}
			out[string(e.Name)] = uint8(e.Type)
		}
	}
}

// descriptors lists what this process has open, but for what the Go runtime keeps for itself.
func descriptors(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	var out []string
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(link, "/proc/") || strings.HasPrefix(link, "anon_inode:") {
			continue // the listing's own, or the poller's
		}
		out = append(out, e.Name()+" "+link)
	}
	slices.Sort(out)
	return out
}

// TestAsUser runs this package's tests once more as an ordinary user, when this is root.
func TestAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this already is an ordinary user")
	}
	const user = 48231 // in no passwd file
	// Go keeps the program in a directory of its own user's; it is run through a descriptor.
	self, err := os.Open("/proc/self/exe")
	must(t, err)
	defer self.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3", "-test.run=^Test", "-test.timeout=5m")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Dir = "/"
	cmd.Env = []string{"TMPDIR=/tmp"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("as user %d: %v\n%s", user, err, out)
	}
}
