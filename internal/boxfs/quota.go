package boxfs

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// What an object is charged follows from its attributes alone, so that use can be found again by looking, and is the same on every
// file system: a block, the file's size as if it had no holes, and something for each further name and each attribute of the guest's. A
// directory's size is what the host says, which on some file systems never shrinks.
//
// Holes count because the guest's kernel keeps pages that are mapped, and writes them back when nobody can be told of a failure any more:
// within a file's size there must be room. It says to its programs, too, that files have no holes.
const (
	chargeBlock = 4096
	chargeLink  = 256
	chargeAttr  = 64 // and the lengths of name and value
)

// overdraft is how far whiteouts and moves of names may go beyond a quota. The overlay in the guest's kernel cannot do without them once it
// has begun, and they are how a full box makes room.
const overdraft = 32 << 20

// Quota bounds what the trees that share it may take on the host, whatever their clients do. A client of such a tree gets no descriptor of
// the host's, with which it could write past the server, or keep files that are deleted. Its methods may be called concurrently; those of a nil Quota
// bound nothing.
type Quota struct {
	size int64

	names sync.Mutex // held while names come or go, before an inode's

	mu   sync.Mutex
	used int64
	owed int // whiteouts that the overlay will want for names that are gone
	open map[inodeKey]*inode
}

// NewQuota makes one of so many bytes.
func NewQuota(size int64) *Quota { return &Quota{size: size, open: map[inodeKey]*inode{}} }

type inodeKey struct{ dev, ino uint64 }

// inode is an object that a server holds open. It stays charged while it is, with a name or without.
type inode struct {
	key  inodeKey
	refs int
	mu   sync.Mutex // held while its size, names or attributes change
}

// charge is what an object takes, but for its attributes.
func charge(st *unix.Stat_t) int64 {
	n := int64(chargeBlock) + blocks(st.Size)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
		n += chargeLink * int64(st.Nlink-1)
	}
	return n
}

func blocks(size int64) int64 {
	return int64((uint64(size) + chargeBlock - 1) &^ (chargeBlock - 1))
}

// maxAttrNames bounds the names of an object's attributes, which a file system may keep more of than it can list.
const maxAttrNames = 32 << 10

// chargeAttrs is what the guest's attributes of an object take.
func chargeAttrs(path string) (int64, error) {
	buf := make([]byte, 256) // most have one, of ours
	n, err := unix.Listxattr(path, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 65536)
		n, err = unix.Listxattr(path, buf)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	var sum int64
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if strings.HasPrefix(name, guestAttrs) {
			sum += attrCharge(path, name)
		}
	}
	return sum, nil
}

// chargeOpen is what an open object takes, as far as it can be found out.
func chargeOpen(fd int, st *unix.Stat_t) int64 {
	attrs, _ := chargeAttrs(procPath(fd))
	return charge(st) + attrs
}

func attrCharge(path, key string) int64 {
	n, err := unix.Getxattr(path, key, nil)
	if err != nil {
		return 0
	}
	return int64(chargeAttr + len(key) + n)
}

// take charges, if there is room.
func (q *Quota) take(n int64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if n > 0 && n > q.size-q.used {
		return unix.ENOSPC
	}
	q.used += n
	return nil
}

// takeBlocks charges up to n bytes, whole blocks, and returns how many.
func (q *Quota) takeBlocks(n int64) int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	n = min(n, max(q.size-q.used, 0)&^(chargeBlock-1))
	q.used += n
	return n
}

// add charges what is there already, or gives it back.
func (q *Quota) add(n int64) {
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used += n
}

// maxOwed bounds the whiteouts that are owed at a time, so that none are saved up: the overlay wants each before long.
const maxOwed = 1024

// owe notes that a name is gone, at which the overlay may want a whiteout.
func (q *Quota) owe() {
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.owed = min(q.owed+1, maxOwed)
}

// hide lets a whiteout be made, unless the overdraft is used up and it is not owed.
func (q *Quota) hide() error {
	if q == nil {
		return nil
	}
	q.mu.Lock()
	owed := q.owed > 0
	if owed {
		q.owed--
	}
	q.mu.Unlock()
	if owed {
		return nil
	}
	return q.overdrawn()
}

// overdrawn reports an error when the overdraft is used up, too.
func (q *Quota) overdrawn() error {
	if q != nil && q.charged()-overdraft > q.size {
		return unix.ENOSPC
	}
	return nil
}

func (q *Quota) charged() int64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used
}

// hold notes that a descriptor of an object is open.
func (q *Quota) hold(fd int) *inode {
	if q == nil {
		return nil
	}
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return &inode{refs: 1} // a disk that fails; nothing was charged for it
	}
	key := inodeKey{dev: uint64(st.Dev), ino: st.Ino}
	q.mu.Lock()
	defer q.mu.Unlock()
	i := q.open[key]
	if i == nil {
		i = &inode{key: key}
		q.open[key] = i
		// It may have lost its last name after it was opened. Then it was given back, and is there all the same.
		if unix.Fstat(fd, &st) == nil && st.Nlink == 0 {
			q.used += chargeOpen(fd, &st)
		}
	}
	i.refs++
	return i
}

// again notes one more descriptor of an object that is held.
func (q *Quota) again(i *inode) *inode {
	if i != nil {
		q.mu.Lock()
		defer q.mu.Unlock()
		i.refs++
	}
	return i
}

// letGo notes that a descriptor is about to be closed. What has no name and is nowhere open is given back.
func (q *Quota) letGo(i *inode, fd int) {
	if i == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i.refs--; i.refs > 0 {
		return
	}
	delete(q.open, i.key)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) == nil && st.Nlink == 0 {
		q.used -= chargeOpen(fd, &st)
	}
}

// extend runs a change of a file's size, to no more than end unless it is longer.
func (q *Quota) extend(i *inode, fd int, end int64, change func() error) error {
	if q == nil {
		return change()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	was := blocks(st.Size)
	var more int64
	if end > st.Size {
		if end > q.size {
			return unix.ENOSPC
		}
		more = blocks(end) - was
	}
	if err := q.take(more); err != nil {
		return err
	}
	err := change()
	if serr := unix.Fstat(fd, &st); serr != nil {
		return errors.Join(err, serr)
	}
	q.add(blocks(st.Size) - was - more)
	return err
}

// inside runs a change of a file if it is that long already.
func (q *Quota) inside(i *inode, fd int, end int64, change func() error) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if end > blocks(st.Size) {
		return unix.EOPNOTSUPP
	}
	return change()
}

// fit is how much of a write there is room for. The caller holds the inode, and settles when it has written.
func (q *Quota) fit(fd int, length int, off uint64) (n int, settle func(), err error) {
	if off > math.MaxInt64 {
		return 0, nil, unix.EINVAL
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, nil, err
	}
	was, start := blocks(st.Size), int64(off)
	if start > math.MaxInt64-int64(length) {
		return 0, nil, unix.EFBIG
	}
	end, got := start+int64(length), int64(0)
	if end > was {
		if start > max(was, q.size) {
			return 0, nil, unix.ENOSPC
		}
		got = q.takeBlocks(blocks(min(end, max(was, q.size))) - was)
		if end = min(end, was+got); end <= start {
			q.add(-got)
			return 0, nil, unix.ENOSPC
		}
	}
	return int(end - start), func() {
		if unix.Fstat(fd, &st) == nil {
			q.add(blocks(st.Size) - was - got)
		}
	}, nil
}

// attribute runs a change of an attribute after which its value has length bytes, or -1 for none.
func (q *Quota) attribute(i *inode, path, key string, length int, change func() error) error {
	if q == nil {
		return change()
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	was := attrCharge(path, key)
	var more int64
	if length >= 0 {
		names, err := unix.Listxattr(path, nil)
		if was == 0 && (err != nil || names+len(key)+1 > maxAttrNames) {
			return unix.ENOSPC
		}
		more = max(int64(chargeAttr+len(key)+length)-was, 0)
	}
	if err := q.take(more); err != nil {
		return err
	}
	err := change()
	q.add(attrCharge(path, key) - was - more)
	return err
}

// naming runs a change of names in directories. What those grow by is charged afterwards: nobody knows before.
func (q *Quota) naming(dirs []int, change func() error) error {
	if q == nil {
		return change()
	}
	q.names.Lock()
	defer q.names.Unlock()
	was := dirSizes(dirs)
	err := change()
	q.add(dirSizes(dirs) - was)
	return err
}

// dirSizes is what directories take, each counted once.
func dirSizes(dirs []int) int64 {
	var sum int64
	var seen []inodeKey
	for _, fd := range dirs {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		if key := (inodeKey{dev: uint64(st.Dev), ino: st.Ino}); !slices.Contains(seen, key) {
			seen = append(seen, key)
			sum += blocks(st.Size)
		}
	}
	return sum
}

// making runs the making of an object, under a name of a directory, that takes about cost bytes.
func (q *Quota) making(dir int, name string, cost int64, mk func() (int, error)) (int, error) {
	if q == nil {
		return mk()
	}
	fd := -1
	return fd, q.naming([]int{dir}, func() (err error) {
		if err := q.takeFor(dir, name, cost); err != nil {
			return err
		}
		if fd, err = mk(); err != nil {
			q.add(-cost)
			return err
		}
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil {
			q.add(charge(&st) - cost)
		}
		return nil
	})
}

// takeFor is take for a new name. That it is there already is what programs that make sure of a directory, say, want to hear first.
func (q *Quota) takeFor(dir int, name string, n int64) error {
	err := q.take(n)
	var st unix.Stat_t
	if err != nil && unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
		return unix.EEXIST
	}
	return err
}

// linking runs the making of one more name of an object in a directory.
func (q *Quota) linking(dir int, name string, link func() error) error {
	return q.naming([]int{dir}, func() error {
		if q == nil {
			return link()
		}
		if err := q.takeFor(dir, name, chargeLink); err != nil {
			return err
		}
		err := link()
		if err != nil {
			q.add(-chargeLink)
		}
		return err
	})
}

// losing runs a change that may take a name from an object. It is called while names are held.
func (q *Quota) losing(dir int, name string, change func() error) error {
	if q == nil {
		return change()
	}
	fd, err := unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return change()
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return q.losingOpen(fd, change)
}

// losingOpen is losing for an object that is open.
func (q *Quota) losingOpen(fd int, change func() error) error {
	if q == nil {
		return change()
	}
	i := q.hold(fd)
	defer q.letGo(i, fd)
	i.mu.Lock()
	defer i.mu.Unlock()
	var was, now unix.Stat_t
	if err := unix.Fstat(fd, &was); err != nil {
		return err
	}
	err := change()
	if serr := unix.Fstat(fd, &now); serr != nil {
		return errors.Join(err, serr)
	}
	q.add(charge(&now) - charge(&was))
	return err
}

// statFS is what the guest sees of a file system of the quota's size. No more of it is free than on the host.
func (q *Quota) statFS(s lisafs.StatFS) lisafs.StatFS {
	free := uint64(max(q.size-q.charged(), 0)) / chargeBlock
	host := s.BlocksAvailable * uint64(s.BlockSize) / chargeBlock
	s.BlockSize = chargeBlock
	s.Blocks = uint64(q.size) / chargeBlock
	s.BlocksFree = min(free, host)
	s.BlocksAvailable = s.BlocksFree
	// Every object takes a block, so there are no more than those.
	inodes := s.BlocksFree
	if s.Files != 0 { // on some file systems inodes are not counted
		inodes = min(inodes, s.FilesFree)
	}
	s.Files, s.FilesFree = s.Blocks, inodes
	return s
}

// Count charges what a tree holds. It must be called for every tree before any of them is served, while nothing else changes it.
func (q *Quota) Count(root *os.File) error {
	sum, err := measure(int(root.Fd()))
	if err != nil {
		return fmt.Errorf("find out what the box takes on disk: %w", err)
	}
	q.add(sum)
	return nil
}

// measure adds up what the objects below a directory are charged. However deep a guest has made its directories, few are open at a
// time.
func measure(root int) (int64, error) {
	var sum int64
	linked := map[inodeKey]bool{}
	// A directory's entries are looked at before those of its directories; these are then gone down to and left by their parent.
	type level struct{ dirs []string }
	var stack []level
	enter := func(fd int) error {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		attrs, err := chargeAttrs(procPath(fd))
		if err != nil {
			return err
		}
		sum += charge(&st) + attrs
		l := level{}
		var failed error
		err = listDir(fd, math.MaxInt, func(e dirent) {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, e.name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				failed = err
				return
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				l.dirs = append(l.dirs, e.name)
				return
			}
			if st.Nlink > 1 {
				key := inodeKey{dev: uint64(st.Dev), ino: st.Ino}
				if linked[key] {
					return
				}
				linked[key] = true
			}
			sum += charge(&st)
			if st.Mode&unix.S_IFMT == unix.S_IFREG { // a link is none of ours, and leads elsewhere
				attrs, err := chargeAttrs(procPath(fd) + "/" + e.name)
				if err != nil {
					failed = err
				}
				sum += attrs
			}
		})
		stack = append(stack, l)
		return errors.Join(err, failed)
	}
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	cur, err := unix.Openat(root, ".", flags, 0)
	if err != nil {
		return 0, err
	}
	defer func() { unix.Close(cur) }()
	move := func(name string) error {
		next, err := unix.Openat(cur, name, flags, 0)
		if err == nil {
			unix.Close(cur)
			cur = next
		}
		return err
	}
	if err := enter(cur); err != nil {
		return 0, err
	}
	for {
		top := &stack[len(stack)-1]
		if n := len(top.dirs); n > 0 {
			name := top.dirs[n-1]
			top.dirs = top.dirs[:n-1]
			if err := move(name); err != nil {
				return 0, err
			}
			if err := enter(cur); err != nil {
				return 0, err
			}
			continue
		}
		if stack = stack[:len(stack)-1]; len(stack) == 0 {
			return sum, nil
		}
		if err := move(".."); err != nil {
			return 0, err
		}
	}
}
