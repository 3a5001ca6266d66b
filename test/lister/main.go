// Command lister tells all there is to tell of the files below a directory, in a line of JSON each, sorted by path: run in a box and on
// the host, it says the same of the same files. It is static and needs nothing from where it runs. It is for tests only.
//
//	lister <directory> [<path not to look at>…]
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// file is what is told of one.
type file struct {
	Path   string            `json:"path"` // quoted as in Go: names may hold any bytes
	Mode   string            `json:"mode"` // octal, with the type
	Owner  string            `json:"owner"`
	Mtime  string            `json:"mtime"`
	Size   int64             `json:"size,omitempty"` // of contents, or of a link's target
	Sum    string            `json:"sum,omitempty"`
	Target string            `json:"target,omitempty"` // quoted
	Device string            `json:"device,omitempty"`
	Xattrs map[string]string `json:"xattrs,omitempty"` // quoted
	Links  uint64            `json:"links,omitempty"`  // of what is no directory
	Same   string            `json:"same,omitempty"`   // the first of several names of it, quoted
}

func main() {
	out := bufio.NewWriter(os.Stdout)
	l := lister{out: json.NewEncoder(out), top: os.Args[1], skip: os.Args[2:], first: map[[2]uint64]string{}}
	if err := errors.Join(l.list("/"), out.Flush()); err != nil {
		fmt.Fprintln(os.Stderr, "lister:", err)
		os.Exit(1)
	}
}

type lister struct {
	out   *json.Encoder
	top   string
	skip  []string
	first map[[2]uint64]string // by device and inode
}

func (l *lister) list(path string) error {
	if slices.Contains(l.skip, path) {
		return nil
	}
	at := filepath.Join(l.top, path)
	var st unix.Stat_t
	if err := unix.Lstat(at, &st); err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	f := file{Path: strconv.Quote(path), Mode: fmt.Sprintf("%06o", st.Mode), Owner: fmt.Sprintf("%d:%d", st.Uid, st.Gid),
		Mtime: fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec)}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR {
		f.Links = uint64(st.Nlink)
		key := [2]uint64{st.Dev, st.Ino}
		if first, ok := l.first[key]; ok {
			f.Same = first
		} else {
			l.first[key] = f.Path
		}
	}
	var err error
	if f.Xattrs, err = xattrs(at); err != nil {
		return err
	}
	switch kind {
	case unix.S_IFREG:
		if f.Size, f.Sum, err = sum(at); err != nil {
			return err
		}
	case unix.S_IFLNK:
		target, err := os.Readlink(at)
		if err != nil {
			return err
		}
		f.Size, f.Target = st.Size, strconv.Quote(target)
	case unix.S_IFCHR, unix.S_IFBLK:
		f.Device = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if err := l.out.Encode(f); err != nil || kind != unix.S_IFDIR {
		return err
	}
	entries, err := os.ReadDir(at)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := l.list(strings.TrimSuffix(path, "/") + "/" + e.Name()); err != nil {
			return err
		}
	}
	return nil
}

func sum(path string) (int64, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return n, hex.EncodeToString(h.Sum(nil)), err
}

// xattrs reads the attributes of a file, or of a link itself.
func xattrs(path string) (map[string]string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("attributes of %s: %w", path, err)
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("attribute %s of %s: %w", name, path, err)
		}
		all[name] = strconv.Quote(string(value[:n]))
	}
	return all, nil
}
