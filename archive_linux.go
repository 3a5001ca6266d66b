package coffer

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/coffer-box/coffer/internal/boxfs"
)

// archive writes the box's layer as one of an image.
func (b *Box) archive(ctx context.Context, w io.Writer) error {
	upper, err := os.Open(filepath.Join(b.rt.home.Box(b.id).State(), "upper"))
	if errors.Is(err, os.ErrNotExist) {
		return tar.NewWriter(w).Close() // it has never run
	}
	if err != nil {
		return err
	}
	defer upper.Close()
	return boxfs.Archive(ctx, upper, w, func(name string) bool {
		return name == "etc/hostname" || name == "etc/hosts" || name == "etc/resolv.conf"
	})
}
