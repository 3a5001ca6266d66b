//go:build !linux

package image

import (
	"archive/tar"
	"io/fs"
	"os"
)

// fileXattrs leaves them out: no box runs from a directory of this system.
func fileXattrs(*os.File, *tar.Header) error { return nil }

// diskSize is the room that a file takes, or near it.
func diskSize(fi fs.FileInfo) int64 { return fi.Size() }

// links is how many names a file has, as far as that is known.
func links(fs.FileInfo) int { return 1 }
