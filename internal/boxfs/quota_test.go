package boxfs

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
)

const mib = 1 << 20

// bounded is a quota that has counted what the yard's tree holds.
func bounded(t testing.TB, y yard, size int64) Options {
	t.Helper()
	q := NewQuota(size)
	count(t, q, y.root)
	return Options{Quota: q}
}

func count(t testing.TB, q *Quota, root string) {
	t.Helper()
	f, err := os.Open(root)
	must(t, err)
	defer f.Close()
	must(t, q.Count(f))
}

// du is what a tree takes on the host's disk.
func du(t testing.TB, root string) int64 {
	t.Helper()
	var sum int64
	seen := map[uint64]bool{}
	must(t, filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
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
	}))
	return sum
}

// exact fails the test unless a quota without a client has charged exactly what is there, and no less than that takes on the disk.
func exact(t testing.TB, q *Quota, roots ...string) {
	t.Helper()
	if len(q.open) > 0 {
		t.Errorf("%d objects are still open", len(q.open))
	}
	fresh := NewQuota(q.size)
	var disk int64
	for _, root := range roots {
		count(t, fresh, root)
		disk += du(t, root)
	}
	if q.charged() != fresh.charged() {
		t.Errorf("charged %d, and a look finds %d", q.charged(), fresh.charged())
	}
	if disk > q.charged() {
		t.Errorf("charged %d, and it takes %d", q.charged(), disk)
	}
}

// file makes a file without a descriptor of the host's, and returns it and what it is opened as.
func (p *peer) file(dir lisafs.ClientFD, name string) (lisafs.ClientFD, lisafs.ClientFD, error) {
	p.t.Helper()
	inode, id, donated, err := dir.OpenCreateAt(p.ctx, name, unix.O_RDWR, 0o644, lisafs.NoUID, lisafs.NoGID)
	if err != nil {
		return lisafs.ClientFD{}, lisafs.ClientFD{}, err
	}
	if donated >= 0 {
		unix.Close(donated)
		p.t.Errorf("a descriptor of %s left the server", name)
	}
	return p.c.NewFD(inode.ControlFD), p.c.NewFD(id), nil
}

func (p *peer) closeAll(fds ...lisafs.ClientFD) {
	for _, fd := range fds {
		p.c.CloseFD(p.ctx, fd.ID(), true)
	}
}

func (p *peer) resize(f lisafs.ClientFD, size uint64) error {
	_, failure, err := f.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_SIZE, Size: size})
	return errors.Join(failure, err)
}

// TestQuota fills a tree up, sees that nothing is lost, and makes room again.
func TestQuota(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, mib)
	p := newPeer(t, y.root, o)
	var was, now lisafs.StatFS
	must(t, p.root.StatFSTo(p.ctx, &was))
	if was.Blocks*uint64(was.BlockSize) != mib || was.BlocksFree == 0 || was.BlocksFree >= was.Blocks || was.FilesFree == 0 {
		t.Errorf("%+v", was)
	}
	f, open, err := p.file(p.root, "f")
	must(t, err)
	// As much of a write as there is room for is written, and the next one fails.
	n, err := open.Write(p.ctx, make([]byte, 2*mib), 0)
	if wants(t, "write too much", err, 0); n == 0 || n >= mib {
		t.Errorf("wrote %d", n)
	}
	_, err = open.Write(p.ctx, []byte("x"), n)
	wants(t, "write to what is full", err, unix.ENOSPC)
	_, _, err = p.file(p.root, "g")
	wants(t, "create", err, unix.ENOSPC)
	_, _, err = p.file(p.root, "f")
	wants(t, "create what is there", err, unix.EEXIST)
	_, err = p.root.MkdirAt(p.ctx, "f", 0o700, 0, 0)
	wants(t, "mkdir what is there", err, unix.EEXIST)
	_, err = p.root.LinkAt(p.ctx, f.ID(), "f")
	wants(t, "link to what is there", err, unix.EEXIST)
	rest := mib - o.Quota.charged() // less than a block
	o.Quota.add(rest)
	wants(t, "set an attribute", f.SetXattr(p.ctx, "user.a", "v", 0), unix.ENOSPC)
	o.Quota.add(-rest)
	must(t, p.root.StatFSTo(p.ctx, &now))
	if now.BlocksFree != 0 || now.BlocksAvailable != 0 || now.FilesFree != 0 || now.Blocks != was.Blocks {
		t.Errorf("%+v", now)
	}
	// What is there stays, and can be changed in its place.
	if _, err := open.Write(p.ctx, []byte("kept"), 0); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 4)
	if _, err := open.Read(p.ctx, buf, 0); err != nil || string(buf) != "kept" {
		t.Errorf("%q, %v", buf, err)
	}
	var st lisafs.Statx
	if must(t, open.StatTo(p.ctx, &st)); st.Size != n {
		t.Errorf("%d bytes, of %d", st.Size, n)
	}
	// Room is made by what is shorter, and by what is gone when it is closed.
	must(t, p.resize(f, 100))
	if n, err := open.Write(p.ctx, make([]byte, 8192), 100); n != 8192 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	must(t, p.root.UnlinkAt(p.ctx, "f", 0))
	p.closeAll(open, f)
	must(t, p.root.StatFSTo(p.ctx, &now))
	if now.BlocksFree != was.BlocksFree {
		t.Errorf("%d blocks free, of %d", now.BlocksFree, was.BlocksFree)
	}
	p.close()
	exact(t, o.Quota, y.root)
}

// TestQuotaHasNoWayAround takes, in each way that there is, until that is refused, and looks at the host's disk.
func TestQuotaHasNoWayAround(t *testing.T) {
	const size = 2 * mib
	long := strings.Repeat("n", 240)
	ways := map[string]func(p *peer, i int) error{
		"files": func(p *peer, i int) error {
			f, open, err := p.file(p.root, fmt.Sprint(i))
			if err == nil {
				p.closeAll(open, f)
			}
			return err
		},
		"directories": func(p *peer, i int) error {
			_, err := p.root.MkdirAt(p.ctx, fmt.Sprint(i), 0o700, 0, 0)
			return err
		},
		"symbolic links": func(p *peer, i int) error {
			_, err := p.root.SymlinkAt(p.ctx, fmt.Sprint(i), strings.Repeat("x", 4000), 0, 0)
			return err
		},
		"devices": func(p *peer, i int) error {
			_, err := p.root.MknodAt(p.ctx, fmt.Sprint(i), unix.S_IFCHR|0o600, 0, 0, 1, 3)
			return err
		},
		"names of one file": func(p *peer, i int) error {
			f, _, err := p.walk("f")
			if err != nil {
				f, _, err = p.file(p.root, "f")
			}
			if err == nil {
				_, err = p.root.LinkAt(p.ctx, f.ID(), fmt.Sprint(i, long))
			}
			return err
		},
		"attributes": func(p *peer, i int) error {
			f, _, err := p.walk(fmt.Sprint("f", i/8))
			if err != nil {
				f, _, err = p.file(p.root, fmt.Sprint("f", i/8))
			}
			if err == nil {
				err = f.SetXattr(p.ctx, fmt.Sprint("user.", i), strings.Repeat("v", 400), 0) // ext4 has 4 KiB for those of a file
			}
			return err
		},
		"writes": func(p *peer, i int) error {
			_, open, err := p.file(p.root, fmt.Sprint(i))
			if err == nil {
				_, err = open.Write(p.ctx, make([]byte, 10000), 0)
			}
			return err
		},
		"writes far out": func(p *peer, i int) error {
			_, open, err := p.file(p.root, fmt.Sprint(i))
			if err == nil {
				_, err = open.Write(p.ctx, []byte("x"), 300000)
			}
			return err
		},
		"truncation": func(p *peer, i int) error {
			f, _, err := p.file(p.root, fmt.Sprint(i))
			if err == nil {
				err = p.resize(f, 300000)
			}
			return err
		},
		"allocation": func(p *peer, i int) error {
			_, open, err := p.file(p.root, fmt.Sprint(i))
			if err == nil {
				err = open.Allocate(p.ctx, []uint64{0, unix.FALLOC_FL_ZERO_RANGE}[i%2], 0, 300000)
			}
			return err
		},
		"files that are deleted and open": func(p *peer, i int) error {
			_, open, err := p.file(p.root, "f")
			if err == nil {
				if _, err = open.Write(p.ctx, make([]byte, 50000), 0); err == nil {
					err = p.root.UnlinkAt(p.ctx, "f", 0)
				}
			}
			return err
		},
		"files that are replaced and open": func(p *peer, i int) error {
			_, open, err := p.file(p.root, "new")
			if err == nil {
				if _, err = open.Write(p.ctx, make([]byte, 50000), 0); err == nil {
					err = p.root.RenameAt(p.ctx, "new", p.root.ID(), "f", 0)
				}
			}
			return err
		},
		"deleted files that are written to": func(p *peer, i int) error {
			_, open, err := p.file(p.root, "f")
			if err == nil {
				if err = p.root.UnlinkAt(p.ctx, "f", 0); err == nil {
					_, err = open.Write(p.ctx, make([]byte, 50000), 0)
				}
			}
			return err
		},
		// On ext4 a directory stays as long as it was.
		"directories that were full": func(p *peer, i int) error {
			d, err := p.root.MkdirAt(p.ctx, fmt.Sprint(i), 0o700, 0, 0)
			if err != nil {
				return err
			}
			dir := p.c.NewFD(d.ControlFD)
			for n := range 100 {
				f, open, err := p.file(dir, fmt.Sprint(n, long))
				if err != nil {
					return err
				}
				p.closeAll(open, f)
			}
			for n := range 100 {
				must(p.t, dir.UnlinkAt(p.ctx, fmt.Sprint(n, long), 0))
			}
			if i > 1000 {
				return unix.ENOSPC // where they get shorter again, there is nothing to be had
			}
			return nil
		},
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			o := bounded(t, y, size)
			p := newPeer(t, y.root, o)
			var err error
			for i := 0; err == nil; i++ {
				if err = way(p, i); o.Quota.charged() > size+64<<10 {
					t.Fatalf("charged %d", o.Quota.charged())
				}
				if i > 20000 {
					t.Fatal("it never ends")
				}
			}
			wants(t, name, err, unix.ENOSPC)
			if o.Quota.charged() < size/2 && name != "directories that were full" {
				t.Errorf("refused with %d charged", o.Quota.charged())
			}
			if n := du(t, y.root) + heldDeleted(t, y.root); n > size+64<<10 {
				t.Errorf("it takes %d", n)
			}
			p.close()
			exact(t, o.Quota, y.root)
		})
	}
}

// heldDeleted is what this process, which the server is in, has open of a tree and no name leads to.
func heldDeleted(t testing.TB, root string) int64 {
	t.Helper()
	var sum int64
	seen := map[uint64]bool{}
	for _, d := range descriptors(t) {
		fd, path, _ := strings.Cut(d, " ")
		var st unix.Stat_t
		if !strings.HasPrefix(path, root) || unix.Stat("/proc/self/fd/"+fd, &st) != nil || st.Nlink > 0 || seen[st.Ino] {
			continue
		}
		seen[st.Ino] = true
		sum += st.Blocks * 512
	}
	return sum
}

// TestQuotaAllocate: what a file has beyond its end cannot be counted later, and is refused.
func TestQuotaAllocate(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, mib)
	p := newPeer(t, y.root, o)
	_, open, err := p.file(p.root, "f")
	must(t, err)
	_, err = open.Write(p.ctx, make([]byte, 100000), 0)
	must(t, err)
	used := o.Quota.charged()
	for mode, want := range map[uint64]unix.Errno{
		unix.FALLOC_FL_KEEP_SIZE: unix.EOPNOTSUPP, unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_ZERO_RANGE: unix.EOPNOTSUPP,
		unix.FALLOC_FL_COLLAPSE_RANGE: unix.EOPNOTSUPP, unix.FALLOC_FL_INSERT_RANGE: unix.EOPNOTSUPP, 1 << 40: unix.EOPNOTSUPP,
		unix.FALLOC_FL_KEEP_SIZE | unix.FALLOC_FL_PUNCH_HOLE: 0, 0: unix.ENOSPC, unix.FALLOC_FL_ZERO_RANGE: unix.ENOSPC,
	} {
		wants(t, fmt.Sprintf("allocate %#x", mode), open.Allocate(p.ctx, mode, 0, 4*mib), want)
	}
	wants(t, "allocate inside", open.Allocate(p.ctx, unix.FALLOC_FL_KEEP_SIZE, 0, 100000), 0)
	wants(t, "allocate far out", open.Allocate(p.ctx, 0, 1<<63, 1), unix.EINVAL)
	wants(t, "allocate round", open.Allocate(p.ctx, 0, 1<<63-1, 1<<63-1), unix.EINVAL)
	for _, off := range []uint64{1 << 63, 1<<64 - 1} {
		_, err := open.Write(p.ctx, []byte("x"), off)
		wants(t, "write far out", err, unix.EINVAL)
	}
	_, err = open.Write(p.ctx, []byte("xy"), 1<<63-1)
	wants(t, "write across the end", err, unix.EFBIG)
	_, err = open.Write(p.ctx, []byte("x"), 1<<63-2)
	wants(t, "write at the end", err, unix.ENOSPC)
	f, _ := p.at("f")
	wants(t, "truncate to the end", p.resize(f, 1<<63-1), unix.ENOSPC)
	wants(t, "truncate beyond", p.resize(f, 1<<63), unix.EINVAL)
	if o.Quota.charged() != used {
		t.Errorf("charged %d, was %d", o.Quota.charged(), used)
	}
}

// TestQuotaIsShared by trees that are served at the same time, and whose use is found again.
func TestQuotaIsShared(t *testing.T) {
	a, b := newYard(t), newYard(t)
	q := NewQuota(mib)
	write := func(root string, n int) (uint64, error) {
		t.Helper()
		p := newPeer(t, root, Options{Quota: q})
		defer p.close()
		_, open, err := p.file(p.root, fmt.Sprint("f", n))
		if err != nil {
			return 0, err
		}
		return open.Write(p.ctx, make([]byte, n), 0)
	}
	count(t, q, a.root)
	count(t, q, b.root)
	if n, err := write(a.root, 700<<10); n != 700<<10 || err != nil {
		t.Fatal(n, err)
	}
	if n, err := write(b.root, 700<<10); n >= 350<<10 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	exact(t, q, a.root, b.root)
	// A quota that is smaller than what is there lets nothing grow, and is no error.
	for _, size := range []int64{mib, mib / 2} {
		q = NewQuota(size)
		count(t, q, a.root)
		count(t, q, b.root)
		_, err := write(b.root, 8192)
		wants(t, "write", err, unix.ENOSPC)
		p := newPeer(t, b.root, Options{Quota: q})
		var s lisafs.StatFS
		must(t, p.root.StatFSTo(p.ctx, &s))
		if s.BlocksFree != 0 || s.Blocks != uint64(size)/4096 {
			t.Errorf("%+v", s)
		}
		p.close()
	}
	p := newPeer(t, a.root, Options{Quota: q})
	must(t, p.root.UnlinkAt(p.ctx, fmt.Sprint("f", 700<<10), 0))
	p.close()
	if n, err := write(b.root, 8192); n != 8192 || err != nil {
		t.Errorf("wrote %d, %v", n, err)
	}
	exact(t, q, a.root, b.root)
}

// TestQuotaWhiteouts: the overlay in the guest's kernel can hide and move what is in the image when nothing else can be done any more,
// and a hostile one cannot go on with that for ever.
func TestQuotaWhiteouts(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, mib)
	p := newPeer(t, y.root, o)
	var err error
	for i := 0; err == nil; i++ {
		_, err = p.root.MkdirAt(p.ctx, fmt.Sprint(i), 0o700, 0, 0)
	}
	wants(t, "mkdir", err, unix.ENOSPC)
	for i := range 20 {
		must(t, p.white(p.root, fmt.Sprint("white", i)))
	}
	must(t, p.root.RenameAt(p.ctx, "0", p.root.ID(), "moved", 0))
	must(t, p.white(p.root, "0"))
	if o.Quota.charged() <= mib {
		t.Errorf("charged %d: this test has tried nothing", o.Quota.charged())
	}
	_, err = p.root.MkdirAt(p.ctx, "new", 0o700, 0, 0)
	wants(t, "mkdir", err, unix.ENOSPC)
	must(t, p.root.UnlinkAt(p.ctx, "white0", 0))

	o.Quota.add(overdraft + mib)
	must(t, p.white(p.root, "white0")) // owed for the one that is gone
	wants(t, "hide on and on", p.white(p.root, "more"), unix.ENOSPC)
	wants(t, "move on and on", p.root.RenameAt(p.ctx, "1", p.root.ID(), "moved", 0), unix.ENOSPC)
	// What the overlay owes for a name that is gone it can make, once.
	must(t, p.root.UnlinkAt(p.ctx, "1", unix.AT_REMOVEDIR))
	must(t, p.white(p.root, "1"))
	wants(t, "hide on and on", p.white(p.root, "more"), unix.ENOSPC)
	must(t, p.root.UnlinkAt(p.ctx, "1", 0))
	o.Quota.add(-overdraft - mib)
	// The file that whiteouts are links to is exchanged and goes with the last of them.
	tr := &tree{root: mustOpen(t, y.root), o: o}
	must(t, o.Quota.naming([]int{tr.root}, tr.newWhiteout))
	for i := range 20 {
		must(t, p.root.UnlinkAt(p.ctx, fmt.Sprint("white", i), 0))
	}
	unix.Close(tr.root)
	p.close()
	exact(t, o.Quota, y.root)
}

// TestQuotaOfManyAttributes: an object has no more attributes than can be listed, so all are found again.
func TestQuotaOfManyAttributes(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, 64*mib)
	p := newPeer(t, y.root, o)
	f := p.put("a", "")
	var err error
	n := 0
	for ; err == nil && n < 1000; n++ {
		err = f.SetXattr(p.ctx, fmt.Sprintf("user.%0200d", n), "x", 0)
	}
	if err == nil {
		t.Errorf("%d attributes of 200 bytes each have names", n)
	}
	p.close()
	exact(t, o.Quota, y.root)
}

// TestQuotaOfOneFileAtOnce changes the size of a file by two of its names, which the protocol's own locks take for two files.
func TestQuotaOfOneFileAtOnce(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, mib)
	p := newPeer(t, y.root, o)
	must(t, p.c.StartChannels())
	f := p.put("a", "")
	_, err := p.root.LinkAt(p.ctx, f.ID(), "b")
	must(t, err)
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		wg.Go(func() {
			f, _ := p.at(name)
			id, _, err := f.OpenAt(p.ctx, unix.O_RDWR)
			if err != nil {
				t.Error(err)
				return
			}
			open := p.c.NewFD(id)
			for range 3000 {
				if _, err := open.Write(p.ctx, []byte("x"), 10000); err != nil {
					t.Error(err)
				}
				if err := p.resize(f, 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	p.close()
	exact(t, o.Quota, y.root)
}

// TestQuotaOfWhatIsGone: between a walk's opening of a file and its note of that, the file may lose its name.
func TestQuotaOfWhatIsGone(t *testing.T) {
	y := newYard(t)
	o := bounded(t, y, mib)
	p := newPeer(t, y.root, o)
	p.closeAll(p.put("f", strings.Repeat("x", 10000)))
	fd, err := unix.Open(filepath.Join(y.root, "f"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	had := o.Quota.charged()
	must(t, p.root.UnlinkAt(p.ctx, "f", 0))
	if gone := had - o.Quota.charged(); gone != 4096+12288 {
		t.Errorf("%d given back", gone)
	}
	i := o.Quota.hold(fd)
	if o.Quota.charged() != had {
		t.Errorf("charged %d for what is open, was %d", o.Quota.charged(), had)
	}
	o.Quota.letGo(i, fd)
	p.close()
	exact(t, o.Quota, y.root)
}

func mustOpen(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	must(t, err)
	return fd
}

// TestQuotaOfDeepTrees counts what a guest has nested deeper than a process may have files open.
func TestQuotaOfDeepTrees(t *testing.T) {
	y := newYard(t)
	dir, err := os.OpenRoot(y.root)
	must(t, err)
	const depth = 300
	for range depth {
		must(t, dir.Mkdir("d", 0o700))
		must(t, dir.WriteFile("f", []byte("x"), 0o600))
		next, err := dir.OpenRoot("d")
		must(t, err)
		dir.Close()
		dir = next
	}
	dir.Close()
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 50, Max: was.Max}))
	defer func() { must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()
	q := bounded(t, y, 1<<30).Quota
	if want := int64(depth * (4096 + 4096 + 4096)); q.charged() < want {
		t.Errorf("charged %d, want at least %d", q.charged(), want)
	}
}

// TestQuotaIsWhatIsThere does whatever comes, also many things at a time, and compares what was charged with what a look at the
// tree finds.
func TestQuotaIsWhatIsThere(t *testing.T) {
	for _, at := range []int{1, 4} {
		t.Run(fmt.Sprint(at, " at a time"), func(t *testing.T) {
			for seed := range int64(8) {
				y := newYard(t)
				o := bounded(t, y, 300<<10)
				p := newPeer(t, y.root, o)
				must(t, p.c.StartChannels())
				for _, d := range []string{"a", "b"} {
					p.mkdir(d)
				}
				var wg sync.WaitGroup
				for n := range int64(at) {
					wg.Go(func() { p.anything(rand.New(rand.NewSource(seed*100+n)), 600) })
				}
				wg.Wait()
				if o.Quota.charged() > 300<<10+64<<10 {
					t.Errorf("charged %d", o.Quota.charged())
				}
				p.close()
				exact(t, o.Quota, y.root)
				checkStored(t, y.root)
				if t.Failed() {
					t.Fatalf("with seed %d", seed)
				}
			}
		})
	}
}

// anything does n things, some of which fail, and keeps some objects open.
func (p *peer) anything(r *rand.Rand, n int) {
	type held struct{ file, open lisafs.ClientFD }
	var hold []held
	names := []string{"x", "y", "z", strings.Repeat("long", 50)}
	name := func() string { return names[r.Intn(len(names))] }
	dir := func() lisafs.ClientFD {
		if fd, _, err := p.walk([]string{"a", "b"}[r.Intn(2)]); err == nil {
			return fd
		}
		return p.root
	}
	some := func() (lisafs.ClientFD, bool) {
		fd, _, err := p.walk([]string{"a/", "b/"}[r.Intn(2)] + name())
		return fd, err == nil
	}
	ops := map[string]func(){
		"create": func() {
			if f, open, err := p.file(dir(), name()); err == nil {
				hold = append(hold, held{f, open})
			}
		},
		"write": func() {
			if len(hold) > 0 {
				open := hold[r.Intn(len(hold))].open
				_, _ = open.Write(p.ctx, make([]byte, r.Intn(30000)), uint64(r.Intn(100000)))
			}
		},
		"resize": func() {
			if f, ok := some(); ok {
				_ = p.resize(f, uint64(r.Intn(100000)))
			}
		},
		"allocate": func() {
			if len(hold) > 0 {
				open := hold[r.Intn(len(hold))].open
				modes := []uint64{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE}
				_ = open.Allocate(p.ctx, modes[r.Intn(len(modes))], uint64(r.Intn(50000)), uint64(1+r.Intn(50000)))
			}
		},
		"open": func() {
			if f, ok := some(); ok {
				flags := []uint32{unix.O_RDONLY, unix.O_RDWR, unix.O_RDWR | unix.O_TRUNC}[r.Intn(3)]
				if id, donated, err := f.OpenAt(p.ctx, flags); err == nil {
					if donated >= 0 {
						unix.Close(donated)
						p.t.Error("a descriptor left the server")
					}
					hold = append(hold, held{f, p.c.NewFD(id)})
				}
			}
		},
		"close": func() {
			if len(hold) > 0 {
				i := r.Intn(len(hold))
				p.closeAll(hold[i].open, hold[i].file)
				hold = slices.Delete(hold, i, i+1)
			}
		},
		"unlink": func() { d := dir(); _ = d.UnlinkAt(p.ctx, name(), 0) },
		"rmdir":  func() { d := dir(); _ = d.UnlinkAt(p.ctx, name(), unix.AT_REMOVEDIR) },
		"mkdir":  func() { d := dir(); _, _ = d.MkdirAt(p.ctx, name(), 0o700, 0, 0) },
		"symlink": func() {
			d := dir()
			_, _ = d.SymlinkAt(p.ctx, name(), strings.Repeat("t", 1+r.Intn(4000)), 0, 0)
		},
		"whiteout": func() { _ = p.white(dir(), name()) },
		"link": func() {
			if f, ok := some(); ok {
				d := dir()
				_, _ = d.LinkAt(p.ctx, f.ID(), name())
			}
		},
		"rename": func() {
			from, to := dir(), dir()
			_ = from.RenameAt(p.ctx, name(), to.ID(), name(), []uint32{0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE}[r.Intn(3)])
		},
		"set attribute": func() {
			if f, ok := some(); ok {
				_ = f.SetXattr(p.ctx, "user."+name(), strings.Repeat("v", r.Intn(1500)), 0)
			}
		},
		"remove attribute": func() {
			if f, ok := some(); ok {
				_ = f.RemoveXattr(p.ctx, "user."+name())
			}
		},
		"mode": func() {
			if f, ok := some(); ok {
				_, _, _ = f.SetStat(p.ctx, &linux.Statx{Mask: unix.STATX_MODE | unix.STATX_UID, Mode: 0o600, UID: 7})
			}
		},
	}
	keys := slices.Sorted(maps.Keys(ops))
	for range n {
		ops[keys[r.Intn(len(keys))]]()
	}
}
