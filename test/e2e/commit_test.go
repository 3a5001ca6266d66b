package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// pyList tells of every file of a box all that an image keeps, in a line each. What Coffer writes into every box itself is left out, and so
// is what other file systems are mounted on.
const pyList = `
import hashlib, os, stat
out = []
def tell(p):
    st = os.lstat(p)
    w = [p, oct(st.st_mode), str(st.st_uid), str(st.st_gid)]
    if stat.S_ISREG(st.st_mode):
        w += [str(st.st_size), hashlib.sha256(open(p, 'rb').read()).hexdigest(), str(st.st_nlink), str(int(st.st_mtime))]
        w += sorted(n + '=' + repr(os.getxattr(p, n)) for n in os.listxattr(p) if n.startswith('user.'))
    elif stat.S_ISLNK(st.st_mode):
        w.append(os.readlink(p))
    elif not stat.S_ISDIR(st.st_mode):
        w.append(str(st.st_rdev))
    out.append(' '.join(w))
dev = os.lstat('/').st_dev
for top, dirs, files in os.walk('/'):
    dirs[:] = [d for d in dirs if not (top == '/' and d in ('proc', 'sys', 'dev'))]
    for n in dirs + files:
        p = os.path.join(top, n)
        if p not in ('/etc/hostname', '/etc/hosts', '/etc/resolv.conf'):
            tell(p)
print('\n'.join(sorted(out)))
`

// pyChange does to a box what can be done to files.
const pyChange = `
import os, shutil, subprocess
os.makedirs('/opt/new/deep')
open('/opt/new/file', 'w').write('x' * 100000)
os.link('/opt/new/file', '/opt/new/deep/hard')
os.symlink('../file', '/opt/new/deep/soft')
os.chown('/opt/new/file', 70000, 12)
os.chmod('/opt/new/file', 0o6751)
os.setxattr('/opt/new/deep', 'user.mark', b'a\0b')
os.mknod('/opt/new/null', 0o20622, os.makedev(1, 3))
os.mknod('/opt/new/block', 0o60600, os.makedev(7, 1))
with open('/opt/new/sparse', 'wb') as f:
    f.truncate(5 << 20)
open('/opt/new/' + 'n' * 250, 'w').close()
os.remove('/etc/issue.net')
shutil.rmtree('/usr/share/doc')
os.mkdir('/usr/share/doc')
open('/usr/share/doc/only', 'w').write('1')
os.rename('/usr/share/perl5', '/usr/share/perl-moved')
os.remove('/usr/bin/python3')
os.symlink('python3.11', '/usr/bin/python3')
shutil.rmtree('/usr/games'); open('/usr/games', 'w').close()
os.remove('/etc/legal') if os.path.exists('/etc/legal') else None
os.chmod('/etc/passwd', 0o640)
open('/etc/group', 'a').write('more:x:999:\n')
subprocess.check_call(['sh', '-c', 'cd /tmp && printf "int main(){return 7;}" > a.c && gcc -o /usr/local/bin/seven a.c && rm a.c'])
`

// TestCommit: the image that a box is made into has every file as the box had it, through a second commit and an archive, too.
func TestCommit(t *testing.T) {
	root := debianRoot(t)
	tag, err := name.NewTag("debian-test:commit")
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(t.TempDir(), "debian.tar")
	if err := tarball.WriteToFile(archive, tag, debianImage(t, root)); err != nil {
		t.Fatal(err)
	}
	h := newHome(t)
	h.run("load", "-i", archive)
	// As the box itself sees its files, while it runs.
	h.run("create", "--name", "c", "--entrypoint", "sleep", tag.String(), "1000")
	h.run("start", "c")
	h.run("exec", "c", "python3", "-c", pyChange)
	want := h.run("exec", "c", "python3", "-c", pyList)
	h.run("commit", "-c", `CMD ["sh", "-c", "seven"]`, "-m", "work", "c", "made:1")
	compare(t, "of a box that runs", want, h.run("run", "--rm", "made:1", "python3", "-c", pyList))
	if _, code := h.try("run", "--rm", "made:1"); code != 7 {
		t.Errorf("the new command exits with %d", code)
	}
	h.run("stop", "-t", "0", "c")
	h.run("commit", "c", "made:2")
	compare(t, "of a box that does not run", want, h.run("run", "--rm", "made:2", "python3", "-c", pyList))

	// On top of that once more, and elsewhere.
	h.run("run", "--name", "d", "made:2", "sh", "-c", "rm -r /opt/new; mkdir /opt/new; echo 2 > /opt/new/second; rm /usr/games")
	h.run("commit", "d", "made:3")
	h.run("save", "-o", archive, "made:3")
	other := newHome(t)
	other.run("load", "-i", archive)
	out := other.run("run", "--rm", "made:3", "sh", "-c", "ls /opt/new; cat /opt/new/second; ls -d /usr/games || true; seven; echo $?")
	if out != "second\n2\n7" {
		t.Errorf("elsewhere: %q", out)
	}
	if n := strings.TrimSpace(other.run("image", "inspect", "-f", "{{.Layers}}", "made:3")); n != "4" {
		t.Errorf("%s layers", n)
	}
}

func compare(t *testing.T, what, want, got string) {
	t.Helper()
	in := map[string]bool{}
	for l := range strings.SplitSeq(want, "\n") {
		in[l] = true
	}
	if len(in) < 3000 {
		t.Errorf("%s: only %d files", what, len(in))
	}
	for l := range strings.SplitSeq(got, "\n") {
		if !in[l] {
			t.Errorf("%s: only in the image: %.200s", what, l)
		}
		delete(in, l)
	}
	for l := range in {
		t.Errorf("%s: not in the image: %.200s", what, l)
	}
}
