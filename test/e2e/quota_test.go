package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// disk is what the home takes on the host's disk, but for its database.
func (h *home) disk() int64 { return du(h.t, h.dir) }

func du(t *testing.T, root string) int64 {
	t.Helper()
	var sum int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || strings.HasPrefix(filepath.Base(p), "state.db") {
			return nil
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		if !seen[st.Ino] {
			seen[st.Ino] = true
			sum += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// df is what a box sees of the file system of a path, in KiB.
func (h *home) df(box, path string) (size, free int) {
	h.t.Helper()
	lines := strings.Split(h.run("exec", box, "df", "-k", path), "\n")
	f := strings.Fields(lines[len(lines)-1])
	if len(f) < 4 {
		h.t.Fatalf("df: %q", lines)
	}
	size, serr := strconv.Atoi(f[1])
	free, ferr := strconv.Atoi(f[3])
	if err := errors.Join(serr, ferr); err != nil {
		h.t.Fatalf("df: %q: %v", lines, err)
	}
	return size, free
}

// fails runs a command in a box that must fail for want of room.
func (h *home) fails(box, script string) {
	h.t.Helper()
	if out, code := h.try("exec", box, "sh", "-c", "("+script+") 2>&1"); code == 0 || !strings.Contains(out, "no space left on device") {
		h.t.Errorf("%s: exit code %d: %s", script, code, out)
	}
}

// TestDiskSize fills a box up in several ways, which it survives, makes room again, and starts it anew.
func TestDiskSize(t *testing.T) {
	h := newHome(t)
	const size = 20 << 20
	id := h.run("run", "-d", "--name", "b", "--disk-size", "20m", "-v", "/anon", "base", "sleep", "1000")
	if got := h.field("b", "{{.Resources.DiskSize}}"); got != fmt.Sprint(size) {
		t.Errorf("inspect: %s", got)
	}
	total, empty := h.df("b", "/")
	if total != size>>10 || empty < 18<<10 || empty >= total {
		t.Errorf("%d KiB, %d of them free", total, empty)
	}
	taken := func() int64 {
		return du(t, filepath.Join(h.dir, "boxes", id, "state")) + du(t, filepath.Join(h.dir, "volumes", id))
	}

	h.run("exec", "b", "sh", "-c", "echo kept > /root/kept")
	h.fails("b", "dd if=/dev/zero of=/root/big bs=64k")
	h.fails("b", "echo more > /root/more && cat /root/big >> /root/more")
	h.fails("b", "echo more > /anon/more && cat /root/big >> /anon/more")
	if _, free := h.df("b", "/"); free > 8 {
		t.Errorf("%d KiB are free", free)
	}
	if n := taken(); n > size || n < size-1<<20 {
		t.Errorf("it takes %d on the host", n)
	}
	if got := h.run("exec", "b", "sh", "-c", "cat /root/kept; rm /root/big /root/more /anon/more; cat /root/kept"); got != "kept\nkept" {
		t.Errorf("%q", got)
	}
	if _, free := h.df("b", "/"); free < empty-64 {
		t.Errorf("%d KiB are free, of %d before", free, empty)
	}

	// What is in the volume counts, and the other way round.
	h.run("exec", "b", "dd", "if=/dev/zero", "of=/anon/f", "bs=1024k", "count=15")
	if total, free := h.df("b", "/anon"); total != size>>10 || free > 5<<10 {
		t.Errorf("the volume has %d KiB, %d of them free", total, free)
	}
	h.fails("b", "dd if=/dev/zero of=/root/big bs=64k")
	h.run("exec", "b", "rm", "/root/big")
	// Neither what has no name any more nor what has only holes is a way out.
	h.run("exec", "-d", "b", "sh", "-c", "{ rm /root/gone && dd if=/dev/zero bs=64k count=32 && touch /root/written && sleep 1000; } > /root/gone")
	until(t, "the file without a name is written", func() bool { _, code := h.try("exec", "b", "test", "-e", "/root/written"); return code == 0 })
	h.fails("b", "dd if=/dev/zero of=/root/big bs=1024k count=3")
	h.fails("b", "dd if=/dev/zero of=/root/sparse bs=1 count=1 seek=100000000000")
	h.run("exec", "b", "rm", "-f", "/root/big", "/root/sparse")
	if n := taken(); n > size {
		t.Errorf("it takes %d on the host", n)
	}

	// A start finds out what is there: after a stop, and after the supervisor was killed.
	_, before := h.df("b", "/")
	for _, end := range []func(){
		func() { h.run("stop", "-t", "0", "b") },
		func() {
			pid, err := strconv.Atoi(h.field("b", "{{.ShimPID}}"))
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			until(t, "the box has ended", func() bool { return h.field("b", "{{.Status}}") != "running" })
		},
	} {
		end()
		h.run("start", "b")
		_, free := h.df("b", "/")
		if had := before + 2<<10; free < had-64 || free > had+64 { // the file without a name is gone
			t.Errorf("%d KiB are free, of %d before", free, had)
		}
		h.fails("b", "dd if=/dev/zero of=/root/big bs=1024k")
		h.run("exec", "b", "sh", "-c", "rm -f /root/big; cat /root/kept >/dev/null")
	}

	// Empty files fill it as well, and what the image has can be removed when nothing else can be done.
	h.fails("b", "mkdir /root/many && cd /root/many && i=0 && while : >$i; do i=$((i+1)); done; touch $i")
	h.run("exec", "b", "sh", "-c", "rm /etc/os-release && mv /etc/passwd /etc/passwd.old 2>/dev/null; rm -r /root/many")
	if got := h.field("b", "{{.Status}}"); got != "running" {
		t.Errorf("the box is %s", got)
	}
	h.run("rm", "-f", "-v", "b")
}

// TestDiskSizeReclaimed: what a box took is the host's again when rm has returned.
func TestDiskSizeReclaimed(t *testing.T) {
	h := newHome(t)
	h.run("run", "--rm", "-v", "/anon", "base", "true") // what is unpacked at the first use stays
	before := h.disk()
	const fill = "dd if=/dev/zero of=/root/f bs=1024k count=12 2>/dev/null; dd if=/dev/zero of=/anon/f bs=1024k 2>/dev/null; i=0; while [ $i -lt 500 ]; do : >/root/$i; i=$((i+1)); done"
	for _, args := range [][]string{{"run", "--name", "b"}, {"run", "--rm"}} {
		h.try(append(args, "--disk-size", "24m", "-v", "/anon", "base", "sh", "-c", fill)...)
		if args[1] == "--name" {
			if took := h.disk() - before; took < 20<<20 || took > 25<<20 {
				t.Errorf("the box takes %d", took)
			}
			h.run("rm", "-v", "b")
		}
		if left := h.disk() - before; left != 0 {
			t.Errorf("%d bytes are left after %v", left, args)
		}
	}

	t.Run("as the file system sees it", func(t *testing.T) { reclaimed(t, h, fill) })
}

// reclaimed has a box fill a file system that is nobody else's.
func reclaimed(t *testing.T, h *home, fill string) {
	if os.Geteuid() != 0 {
		t.Skip("a file system of the home's own needs root")
	}
	sh, err := exec.LookPath("unshare")
	if err != nil {
		t.Skip(err)
	}
	const script = `set -e
mount -t tmpfs -o size=1g none "$COFFER_HOME"
free() { stat -f -c '%a %S' "$COFFER_HOME"; }
"$0" run --rm base true; free
"$0" run --name b --disk-size 24m -v /anon base sh -c "$1" || true; free
"$0" rm -v b; free`
	c := h.cmd()
	c.Path, c.Args = sh, []string{"unshare", "-m", "sh", "-c", script, h.bin, fill}
	c.Env = append(os.Environ(), "COFFER_HOME="+t.TempDir())
	out, err := c.CombinedOutput()
	if err != nil {
		if strings.Contains(string(out), "attributes") {
			t.Skipf("no user attributes on tmpfs here (Linux 6.6 has them): %s", out)
		}
		t.Fatalf("%v: %s", err, out)
	}
	var free []int64
	for line := range strings.Lines(string(out)) {
		var blocks, size int64
		if n, _ := fmt.Sscan(line, &blocks, &size); n == 2 {
			free = append(free, blocks*size)
		}
	}
	if len(free) != 3 {
		t.Fatalf("%s", out)
	}
	if took := free[0] - free[1]; took < 20<<20 {
		t.Errorf("the box took %d: this test has tried nothing", took)
	}
	if left := free[0] - free[2]; left > 1<<20 {
		t.Errorf("%d bytes are left", left)
	}
}
