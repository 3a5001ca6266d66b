package erofs

import (
	"os"

	"golang.org/x/sys/unix"
)

// punchHole gives a range's blocks back to the file system; it reads as zeros afterwards.
func punchHole(f *os.File, off, size int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
}
