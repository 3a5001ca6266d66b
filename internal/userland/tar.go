package userland

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
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

func tarCmd(c *call) error {
	if len(c.args) > 0 && c.args[0] != "" && c.args[0][0] != '-' {
		c.args[0] = "-" + c.args[0]
	}
	o, err := c.parse("c|create x|extract t|list f|file: C|directory: z|gzip v|verbose p|same-permissions numeric-owner O|to-stdout k|keep-old-files same-owner no-same-owner " +
		"exclude: strip-components: m|touch a|auto-compress T|files-from:")
	if err != nil {
		return err
	}
	if n := len(o.vals["c"]) + len(o.vals["x"]) + len(o.vals["t"]); n != 1 {
		return errUsage("give one of -c, -x and -t")
	}
	for _, list := range o.vals["T"] {
		names, err := c.allLines([]string{list})
		if err != nil {
			return err
		}
		o.rest = append(o.rest, names...)
	}
	if o.has("c") {
		return tarCreate(c, o)
	}
	return tarRead(c, o)
}

func tarCreate(c *call, o options) (err error) {
	out := io.Writer(c.out)
	if name := o.val("f", "-"); name != "-" {
		f, cerr := os.Create(name)
		if cerr != nil {
			return cerr
		}
		bw := bufio.NewWriterSize(f, 64<<10)
		defer finish(&err, bw.Flush, f.Close)
		out = bw
	}
	if name := o.val("f", ""); o.has("z") || o.has("a") && (strings.HasSuffix(name, "gz")) {
		z := gzip.NewWriter(out)
		defer finish(&err, z.Close)
		out = z
	}
	if dir := o.val("C", ""); dir != "" {
		if err := os.Chdir(dir); err != nil {
			return err
		}
	}
	if err := o.need(1); err != nil {
		return err
	}
	w := tar.NewWriter(out)
	names := newIDs()
	links := map[[2]uint64]string{}
	failed := c.each(o.rest, func(root string) error {
		return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if excluded(o, p) {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			fi, err := os.Lstat(p)
			if err != nil || fi.Mode()&fs.ModeSocket != 0 {
				return err
			}
			target := ""
			if fi.Mode()&fs.ModeSymlink != 0 {
				if target, err = os.Readlink(p); err != nil {
					return err
				}
			}
			hdr, err := tar.FileInfoHeader(fi, target)
			if err != nil {
				return err
			}
			st := fi.Sys().(*syscall.Stat_t)
			hdr.Name, hdr.Uname, hdr.Gname, hdr.Format = strings.TrimLeft(p, "/"), "", "", tar.FormatPAX
			hdr.ModTime, hdr.AccessTime, hdr.ChangeTime = hdr.ModTime.Truncate(time.Second), time.Time{}, time.Time{}
			if !o.has("numeric-owner") {
				hdr.Uname, hdr.Gname = names.users[fmt.Sprint(st.Uid)], names.groups[fmt.Sprint(st.Gid)]
			}
			if hdr.Name == "" {
				hdr.Name = "."
			}
			key := [2]uint64{uint64(st.Dev), st.Ino}
			if first, ok := links[key]; ok && !fi.IsDir() {
				hdr.Typeflag, hdr.Linkname, hdr.Size = tar.TypeLink, first, 0
			} else if !fi.IsDir() && st.Nlink > 1 {
				links[key] = hdr.Name
			}
			if fi.IsDir() {
				hdr.Name += "/"
			}
			if o.has("v") {
				fmt.Fprintln(c.err, hdr.Name)
			}
			var f *os.File
			if hdr.Typeflag == tar.TypeReg {
				// Opened before anything is written: a file that cannot be read is left out, not half in.
				if f, err = os.Open(p); err != nil {
					return err
				}
				defer f.Close()
			}
			if err := w.WriteHeader(hdr); err != nil || f == nil {
				return err
			}
			_, err = io.CopyN(w, f, hdr.Size)
			return err
		})
	})
	return errors.Join(failed, w.Close())
}

// excluded tells whether a pattern of --exclude matches a path or its last part.
func excluded(o options, p string) bool {
	return slices.ContainsFunc(o.vals["exclude"], func(x string) bool {
		whole, _ := filepath.Match(x, p)
		base, _ := filepath.Match(x, filepath.Base(p))
		return whole || base || x == p
	})
}

func tarRead(c *call, o options) error {
	in := c.in
	if name := o.val("f", "-"); name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	br := bufio.NewReaderSize(in, 64<<10)
	in = br
	if head, err := br.Peek(2); err == nil && head[0] == 0x1f && head[1] == 0x8b {
		z, err := gzip.NewReader(br)
		if err != nil {
			return err
		}
		in = z
	}
	strip := 0
	if v := o.val("strip-components", ""); v != "" {
		if _, err := fmt.Sscan(v, &strip); err != nil {
			return errUsage("invalid number " + v)
		}
	}
	var root *os.Root
	if o.has("x") && !o.has("O") {
		var err error
		// Names and links of an archive never lead out of the directory that it is unpacked in.
		if root, err = os.OpenRoot(o.val("C", ".")); err != nil {
			return err
		}
		defer root.Close()
	}
	x := extractor{root: root, owner: os.Geteuid() == 0 && !o.has("no-same-owner"), keepOld: o.has("k"), noTimes: o.has("m")}
	var failed error
	var skip []string // what is below an excluded directory is excluded too
	r := tar.NewReader(in)
	for {
		hdr, err := r.Next()
		if errors.Is(err, io.EOF) {
			if err := x.finish(); err != nil {
				return err
			}
			return failed
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(filepath.Clean("/"+hdr.Name), "/")
		if name == "" {
			name = "."
		}
		if len(o.rest) > 0 {
			wanted := false
			for _, w := range o.rest {
				w = strings.Trim(filepath.Clean(w), "/")
				wanted = wanted || name == w || strings.HasPrefix(name, w+"/")
			}
			if !wanted {
				continue
			}
		}
		if excluded(o, name) || slices.ContainsFunc(skip, func(dir string) bool { return strings.HasPrefix(name, dir) }) {
			skip = append(skip, name+"/")
			continue
		}
		if strip > 0 {
			parts := strings.Split(name, "/")
			if len(parts) <= strip {
				continue
			}
			name = strings.Join(parts[strip:], "/")
		}
		switch {
		case o.has("t") && o.has("v"):
			fmt.Fprintf(c.out, "%s %d/%d %10d %s %s\n", modeString(uint32(hdr.FileInfo().Mode().Perm())|unixType(hdr)), hdr.Uid, hdr.Gid, hdr.Size, hdr.ModTime.Format("2006-01-02 15:04"), hdr.Name)
		case o.has("t") || o.has("v"):
			fmt.Fprintln(c.out, hdr.Name)
		}
		switch {
		case o.has("t"):
		case o.has("O"):
			if _, err := io.Copy(c.out, r); err != nil {
				return err
			}
		default:
			if err := x.extract(hdr, name, r); x.keepOld && errors.Is(err, fs.ErrExist) {
				c.warn(fmt.Errorf("%s: file exists", hdr.Name))
				failed = errExit(2)
			} else if err != nil {
				return fmt.Errorf("%s: %w", hdr.Name, err)
			}
		}
	}
}

func unixType(h *tar.Header) uint32 {
	if h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeLink {
		return unix.S_IFREG
	}
	return map[byte]uint32{tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
}

type extractor struct {
	root  *os.Root
	owner bool

	keepOld, noTimes bool

	dirs []*tar.Header // times are set when nothing more is written into them
}

func (x *extractor) extract(hdr *tar.Header, name string, r io.Reader) error {
	if dir := filepath.Dir(name); dir != "." {
		if err := x.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if fi, err := x.root.Lstat(name); err == nil && !(fi.IsDir() && hdr.Typeflag == tar.TypeDir) {
		if x.keepOld {
			return fs.ErrExist
		}
		if err := x.root.Remove(name); err != nil {
			return err
		}
	}
	perm := fs.FileMode(hdr.Mode & 0o777)
	switch hdr.Typeflag {
	case tar.TypeDir:
		if err := x.root.Mkdir(name, perm|0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		h := *hdr
		h.Name = name
		x.dirs = append(x.dirs, &h)
		return nil
	case tar.TypeReg, tar.TypeGNUSparse:
		f, err := x.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := x.root.Symlink(hdr.Linkname, name); err != nil {
			return err
		}
	case tar.TypeLink:
		return x.root.Link(strings.TrimPrefix(filepath.Clean("/"+hdr.Linkname), "/"), name)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		dir, err := x.root.Open(filepath.Dir(name))
		if err != nil {
			return err
		}
		defer dir.Close()
		if err := unix.Mknodat(int(dir.Fd()), filepath.Base(name), unixType(hdr)|uint32(perm), int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)))); err != nil {
			return err
		}
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return fmt.Errorf("unknown type %q", hdr.Typeflag)
	}
	return x.attrs(hdr, name)
}

func (x *extractor) attrs(hdr *tar.Header, name string) error {
	if x.owner {
		if err := x.root.Lchown(name, hdr.Uid, hdr.Gid); err != nil {
			return err
		}
	}
	if hdr.Typeflag == tar.TypeSymlink {
		return nil
	}
	err := x.root.Chmod(name, hdr.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky))
	if x.noTimes {
		return err
	}
	return errors.Join(err, x.root.Chtimes(name, time.Now(), hdr.ModTime))
}

func (x *extractor) finish() error {
	for i := len(x.dirs) - 1; i >= 0; i-- {
		if err := x.attrs(x.dirs[i], x.dirs[i].Name); err != nil {
			return fmt.Errorf("%s: %w", x.dirs[i].Name, err)
		}
	}
	return nil
}

func gzipCmd(c *call) error {
	o, err := c.parse("d|decompress c|stdout k|keep f|force 1|fast 2 3 4 5 6 7 8 9|best t|test")
	if err != nil {
		return err
	}
	unpack := o.has("d") || o.has("t") || c.name != "gzip"
	level := gzip.DefaultCompression
	if n, err := strconv.Atoi(o.last("1", "2", "3", "4", "5", "6", "7", "8", "9")); err == nil {
		level = n
	}
	run := func(w io.Writer, r io.Reader) error {
		if unpack {
			z, err := gzip.NewReader(r)
			if err == nil {
				_, err = io.Copy(w, z)
			}
			return err
		}
		z, err := gzip.NewWriterLevel(w, level)
		if err != nil {
			return err
		}
		_, err = io.Copy(z, r)
		return errors.Join(err, z.Close())
	}
	if o.has("t") {
		return c.inputs(o.rest, func(_ string, r io.Reader) error { return run(io.Discard, r) })
	}
	if len(o.rest) == 0 || o.has("c") || c.name == "zcat" {
		return c.inputs(o.rest, func(_ string, r io.Reader) error { return run(c.out, r) })
	}
	return c.each(o.rest, func(name string) error {
		to := name + ".gz"
		if unpack {
			var ok bool
			if to, ok = strings.CutSuffix(name, ".gz"); !ok {
				return fmt.Errorf("%s: unknown suffix", name)
			}
		}
		in, err := os.Open(name)
		if err != nil {
			return err
		}
		defer in.Close()
		mode := os.O_EXCL
		if o.has("f") {
			mode = os.O_TRUNC
		}
		fi, err := in.Stat()
		if err != nil {
			return err
		}
		out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|mode, fi.Mode().Perm())
		if err != nil {
			return err
		}
		if err := errors.Join(run(out, in), out.Close()); err != nil {
			os.Remove(to)
			return fmt.Errorf("%s: %w", name, err)
		}
		if !o.has("k") {
			return os.Remove(name)
		}
		return nil
	})
}
