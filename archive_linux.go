package coffer

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/coffer-box/coffer/internal/boxfs"
	"github.com/coffer-box/coffer/internal/state"
)

// archive writes the box's layer as one of an image.
func (b *Box) archive(ctx context.Context, w io.Writer) error {
	if err := b.archiveUpper(ctx, w); err != nil {
		return err
	}
	// Of one that is removed meanwhile some files are gone, or all.
	rec, err := b.rt.db.Get(ctx, b.id)
	if err == nil && rec.Phase == state.Removing {
		err = ErrNotFound
	}
	return err
}

func (b *Box) archiveUpper(ctx context.Context, w io.Writer) error {
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
