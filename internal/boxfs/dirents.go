package boxfs

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// dirent is one directory entry.
type dirent struct {
	ino  uint64
	off  uint64
	typ  uint8
	name string
}

// listDir reads entries from the descriptor's position on, up to about limit bytes of them, without . and ..
func listDir(fd, limit int, emit func(dirent)) error {
	var buf [8192]byte
	for read := 0; read < limit; {
		end := min(len(buf), max(limit-read, 0))
		n, err := unix.Getdents(fd, buf[:end])
		if errors.Is(err, unix.EINVAL) {
			return nil // what is left of the limit is too small for the next entry
		}
		if err != nil {
			return err
		}
		if n <= 0 {
			return nil
		}
		read += n
		parseDirents(buf[:n], emit)
	}
	return nil
}

// parseDirents walks struct linux_dirent64 records.
func parseDirents(b []byte, emit func(dirent)) {
	for len(b) >= 19 {
		size := int(binary.NativeEndian.Uint16(b[16:]))
		if size < 19 || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[19:size], []byte{0})
		if s := string(name); s != "." && s != ".." {
			emit(dirent{ino: binary.NativeEndian.Uint64(b), off: binary.NativeEndian.Uint64(b[8:]), typ: b[18], name: s})
		}
		b = b[size:]
	}
}
