package userland

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func ls(c *call) error {
	o, err := c.parse("l a|all A|almost-all d|directory R|recursive h|human-readable i|inode n t r|reverse S F color? 1 g o L p")
	if err != nil {
		return err
	}
	if o.has("n") || o.has("g") || o.has("o") {
		o.vals["l"] = []string{""}
	}
	if len(o.rest) == 0 {
		o.rest = []string{"."}
	}
	var files []item
	var dirs []string
	err = c.each(o.rest, func(name string) error {
		fi, err := os.Lstat(name)
		if err != nil {
			return err
		}
		if fi.Mode()&fs.ModeSymlink != 0 && !o.has("l") && !o.has("d") || o.has("L") {
			if st, serr := os.Stat(name); serr == nil {
				fi = st
			}
		}
		if fi.IsDir() && !o.has("d") {
			dirs = append(dirs, name)
		} else {
			files = append(files, item{name, name, fi})
		}
		return nil
	})
	l := lister{c, o, err != nil}
	l.show(files)
	for i, d := range dirs {
		if len(o.rest) > 1 || o.has("R") {
			if i > 0 || len(files) > 0 {
				c.out.WriteByte('\n')
			}
			fmt.Fprintf(c.out, "%s:\n", d)
		}
		l.dir(d)
	}
	if l.failed {
		return errExit(1)
	}
	return nil
}

type item struct {
	path, name string
	fi         fs.FileInfo
}

type lister struct {
	c      *call
	o      options
	failed bool
}

func (l *lister) dir(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		l.c.warn(err)
		l.failed = true
	}
	var items []item
	if l.o.has("a") {
		for _, n := range []string{".", ".."} {
			if fi, err := os.Lstat(filepath.Join(dir, n)); err == nil {
				items = append(items, item{filepath.Join(dir, n), n, fi})
			}
		}
	}
	blocks := int64(0)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && !l.o.has("a") && !l.o.has("A") {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue // gone since
		}
		items = append(items, item{filepath.Join(dir, e.Name()), e.Name(), fi})
	}
	for _, it := range items {
		blocks += it.fi.Sys().(*syscall.Stat_t).Blocks
	}
	if l.o.has("l") {
		fmt.Fprintf(l.c.out, "total %d\n", blocks/2)
	}
	l.show(items)
	if !l.o.has("R") {
		return
	}
	for _, it := range items {
		if it.fi.IsDir() && it.name != "." && it.name != ".." {
			fmt.Fprintf(l.c.out, "\n%s:\n", it.path)
			l.dir(it.path)
		}
	}
}

func (l *lister) show(items []item) {
	slices.SortStableFunc(items, func(a, b item) int {
		d := strings.Compare(a.name, b.name)
		switch {
		case l.o.has("t"):
			if t := b.fi.ModTime().Compare(a.fi.ModTime()); t != 0 {
				d = t
			}
		case l.o.has("S"):
			if a.fi.Size() != b.fi.Size() {
				d = 1
				if a.fi.Size() > b.fi.Size() {
					d = -1
				}
			}
		}
		if l.o.has("r") {
			d = -d
		}
		return d
	})
	if !l.o.has("l") {
		for _, it := range items {
			if l.o.has("i") {
				fmt.Fprintf(l.c.out, "%d ", it.fi.Sys().(*syscall.Stat_t).Ino)
			}
			l.c.out.WriteString(it.name + l.mark(it.fi) + "\n")
		}
		return
	}
	ids := newIDs()
	var rows [][]string
	width := make([]int, 6)
	for _, it := range items {
		st := it.fi.Sys().(*syscall.Stat_t)
		size := strconv.FormatInt(it.fi.Size(), 10)
		switch {
		case it.fi.Mode()&fs.ModeDevice != 0:
			size = fmt.Sprintf("%d, %d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		case l.o.has("h"):
			size = human(it.fi.Size())
		}
		user, group := ids.user(st.Uid), ids.group(st.Gid)
		if l.o.has("n") {
			user, group = strconv.Itoa(int(st.Uid)), strconv.Itoa(int(st.Gid))
		}
		stamp := "Jan _2 15:04"
		if d := time.Since(it.fi.ModTime()); d > 183*24*time.Hour || d < -time.Hour {
			stamp = "Jan _2  2006"
		}
		row := []string{modeString(st.Mode), strconv.FormatUint(uint64(st.Nlink), 10), user, group, size, it.fi.ModTime().Format(stamp)}
		for i, f := range row {
			width[i] = max(width[i], len(f))
		}
		rows = append(rows, row)
	}
	for i, r := range rows {
		it := items[i]
		name := it.name + l.mark(it.fi)
		if it.fi.Mode()&fs.ModeSymlink != 0 {
			if target, err := os.Readlink(it.path); err == nil {
				name += " -> " + target
			}
		}
		if l.o.has("i") {
			fmt.Fprintf(l.c.out, "%d ", it.fi.Sys().(*syscall.Stat_t).Ino)
		}
		fmt.Fprintf(l.c.out, "%s %*s %-*s %-*s %*s %s %s\n", r[0], width[1], r[1], width[2], r[2], width[3], r[3], width[4], r[4], r[5], name)
	}
}

func (l *lister) mark(fi fs.FileInfo) string {
	switch {
	case fi.IsDir() && (l.o.has("F") || l.o.has("p")):
		return "/"
	case !l.o.has("F"):
		return ""
	case fi.Mode()&fs.ModeSymlink != 0:
		return "@"
	case fi.Mode()&fs.ModeNamedPipe != 0:
		return "|"
	case fi.Mode()&0o111 != 0:
		return "*"
	}
	return ""
}

// modeString shows type and permissions as ls does.
func modeString(m uint32) string {
	b := []byte("?rwxrwxrwx")
	b[0] = map[uint32]byte{unix.S_IFREG: '-', unix.S_IFDIR: 'd', unix.S_IFLNK: 'l', unix.S_IFCHR: 'c', unix.S_IFBLK: 'b', unix.S_IFIFO: 'p', unix.S_IFSOCK: 's'}[m&unix.S_IFMT]
	for i := range 9 {
		if m&(1<<(8-i)) == 0 {
			b[i+1] = '-'
		}
	}
	for _, s := range []struct {
		bit  uint32
		at   int
		with byte
	}{{0o4000, 3, 's'}, {0o2000, 6, 's'}, {0o1000, 9, 't'}} {
		if m&s.bit != 0 {
			if b[s.at] == '-' {
				b[s.at] = s.with - 'a' + 'A'
			} else {
				b[s.at] = s.with
			}
		}
	}
	return string(b)
}

// human shows a size in a unit that leaves few digits.
func human(n int64) string {
	if n < 1024 {
		return strconv.FormatInt(n, 10)
	}
	f, u := float64(n), -1
	for f >= 1024 && u < 5 {
		f /= 1024
		u++
	}
	if f < 10 {
		return fmt.Sprintf("%.1f%c", f, "KMGTPE"[u])
	}
	return fmt.Sprintf("%.0f%c", f, "KMGTPE"[u])
}

func stat(c *call) error {
	o, err := c.parse("c|format: L|dereference")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	ids := newIDs()
	return c.each(o.rest, func(name string) error {
		look := os.Lstat
		if o.has("L") {
			look = os.Stat
		}
		fi, err := look(name)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		kind := "regular file"
		switch {
		case fi.IsDir():
			kind = "directory"
		case fi.Mode()&fs.ModeSymlink != 0:
			kind = "symbolic link"
		case fi.Mode()&fs.ModeCharDevice != 0:
			kind = "character special file"
		case fi.Mode()&fs.ModeDevice != 0:
			kind = "block special file"
		case fi.Mode()&fs.ModeNamedPipe != 0:
			kind = "fifo"
		case fi.Mode()&fs.ModeSocket != 0:
			kind = "socket"
		case fi.Size() == 0:
			kind = "regular empty file"
		}
		when := func(t syscall.Timespec) string {
			return time.Unix(t.Unix()).Format("2006-01-02 15:04:05.000000000 -0700")
		}
		quoted := "'" + name + "'"
		if fi.Mode()&fs.ModeSymlink != 0 {
			if target, err := os.Readlink(name); err == nil {
				quoted += " -> '" + target + "'"
			}
		}
		fields := map[byte]string{
			'n': name, 'N': quoted, 's': strconv.FormatInt(fi.Size(), 10), 'a': strconv.FormatUint(uint64(st.Mode&0o7777), 8),
			'A': modeString(st.Mode), 'u': strconv.Itoa(int(st.Uid)), 'g': strconv.Itoa(int(st.Gid)), 'U': ids.user(st.Uid), 'G': ids.group(st.Gid),
			'F': kind, 'h': strconv.FormatUint(uint64(st.Nlink), 10), 'i': strconv.FormatUint(st.Ino, 10), 'b': strconv.FormatInt(st.Blocks, 10),
			'B': "512", 'o': strconv.FormatInt(int64(st.Blksize), 10), 'f': strconv.FormatUint(uint64(st.Mode), 16), 'd': strconv.FormatUint(uint64(st.Dev), 10),
			't': strconv.FormatUint(uint64(unix.Major(st.Rdev)), 16), 'T': strconv.FormatUint(uint64(unix.Minor(st.Rdev)), 16),
			'X': strconv.FormatInt(st.Atim.Sec, 10), 'Y': strconv.FormatInt(st.Mtim.Sec, 10), 'Z': strconv.FormatInt(st.Ctim.Sec, 10),
			'x': when(st.Atim), 'y': when(st.Mtim), 'z': when(st.Ctim), '%': "%",
		}
		format := o.val("c", "  File: %N\n  Size: %s\tBlocks: %b\tIO Block: %o\t%F\nDevice: %d\tInode: %i\tLinks: %h\n"+
			"Access: (0%a/%A)  Uid: (%u/%U)  Gid: (%g/%G)\nAccess: %x\nModify: %y\nChange: %z")
		for i := 0; i < len(format); i++ {
			if format[i] == '%' && i+1 < len(format) {
				i++
				v, ok := fields[format[i]]
				if !ok {
					return errUsage(fmt.Sprintf("unknown field %%%c", format[i]))
				}
				c.out.WriteString(v)
				continue
			}
			c.out.WriteByte(format[i])
		}
		c.out.WriteByte('\n')
		return nil
	})
}

func du(c *call) error {
	o, err := c.parse("s|summarize h|human-readable a|all k m b|bytes x c|total d|max-depth: apparent-size")
	if err != nil {
		return err
	}
	depth := -1
	if v := o.val("d", ""); v != "" {
		if depth, err = strconv.Atoi(v); err != nil {
			return errUsage("invalid depth " + v)
		}
	}
	if o.has("s") {
		depth = 0
	}
	if len(o.rest) == 0 {
		o.rest = []string{"."}
	}
	show := func(n int64, name string) {
		size := strconv.FormatInt((n+1023)/1024, 10)
		switch {
		case o.has("h"):
			size = human(n)
		case o.has("b"):
			size = strconv.FormatInt(n, 10)
		case o.has("m"):
			size = strconv.FormatInt((n+1<<20-1)>>20, 10)
		}
		fmt.Fprintf(c.out, "%s\t%s\n", size, name)
	}
	seen := map[[2]uint64]bool{}
	var dev uint64
	var walk func(name string, level int) int64
	walk = func(name string, level int) int64 {
		fi, err := os.Lstat(name)
		if err != nil {
			c.warn(err)
			return 0
		}
		st := fi.Sys().(*syscall.Stat_t)
		if level == 0 {
			dev = uint64(st.Dev)
		} else if o.has("x") && uint64(st.Dev) != dev {
			return 0
		}
		key := [2]uint64{uint64(st.Dev), st.Ino}
		if !fi.IsDir() && st.Nlink > 1 && seen[key] {
			return 0
		}
		seen[key] = true
		n := st.Blocks * 512
		if o.has("b") || o.has("apparent-size") {
			n = fi.Size()
		}
		if fi.IsDir() {
			entries, err := os.ReadDir(name)
			if err != nil {
				c.warn(err)
			}
			for _, e := range entries {
				n += walk(filepath.Join(name, e.Name()), level+1)
			}
		}
		if (fi.IsDir() || o.has("a") || level == 0) && (depth < 0 || level <= depth) {
			show(n, name)
		}
		return n
	}
	total := int64(0)
	for _, name := range o.rest {
		total += walk(name, 0)
	}
	if o.has("c") {
		show(total, "total")
	}
	return nil
}

// mounts reads the mount table: device, place, type, options.
func mounts() ([][]string, error) {
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all [][]string
	sc := bufio.NewScanner(f)
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 4 {
			continue
		}
		for i := range fields {
			fields[i] = unescape.Replace(fields[i])
		}
		all = append(all, fields)
	}
	return all, sc.Err()
}

func df(c *call) error {
	o, err := c.parse("h|human-readable k m T a P")
	if err != nil {
		return err
	}
	all, err := mounts()
	if err != nil {
		return err
	}
	size := func(n uint64) string {
		if o.has("h") {
			return human(int64(n))
		}
		if o.has("m") {
			return strconv.FormatUint(n>>20, 10)
		}
		return strconv.FormatUint(n/1024, 10)
	}
	title := "1K-blocks"
	switch {
	case o.has("h"):
		title = "Size"
	case o.has("m"):
		title = "1M-blocks"
	}
	show := func(device, kind string, f ...any) {
		if o.has("T") {
			device = fmt.Sprintf("%-20s %-9s", device, kind)
		}
		fmt.Fprintf(c.out, "%-20s %10s %10s %10s %4s %s\n", append([]any{device}, f...)...)
	}
	show("Filesystem", "Type", title, "Used", "Available", "Use%", "Mounted on")
	row := func(m []string) error {
		var st unix.Statfs_t
		if err := unix.Statfs(m[1], &st); err != nil {
			return &fs.PathError{Path: m[1], Err: err}
		}
		bs := uint64(st.Bsize)
		used := (st.Blocks - st.Bfree) * bs
		pct := "-"
		if total := used + st.Bavail*bs; total > 0 {
			pct = strconv.FormatUint((used*100+total-1)/total, 10) + "%"
		}
		if st.Blocks > 0 || o.has("a") || len(o.rest) > 0 {
			show(m[0], m[2], size(st.Blocks*bs), size(used), size(st.Bavail*bs), pct, m[1])
		}
		return nil
	}
	if len(o.rest) == 0 {
		for _, m := range all {
			if err := row(m); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
				c.warn(err)
			}
		}
		return nil
	}
	return c.each(o.rest, func(name string) error {
		p, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		if p, err = filepath.EvalSymlinks(p); err != nil {
			return err
		}
		best := []string{"-", p, "-"}
		for _, m := range all {
			if m[1] == "/" || p == m[1] || strings.HasPrefix(p, m[1]+"/") {
				if best[0] == "-" || len(m[1]) >= len(best[1]) {
					best = m
				}
			}
		}
		return row(best)
	})
}
