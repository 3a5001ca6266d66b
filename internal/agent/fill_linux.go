package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/coffer-box/coffer/internal/wire"
)

// fill gives new volumes what the image has in their places, as a database wants its directory: with its owner, its mode and its
// contents. A mark in the state directory says of a volume that it was done, and nothing of the box has run before there is one.
func (b *boxRoot) fill(s wire.Setup) error {
	for _, v := range s.Volumes {
		if !v.Fill {
			continue
		}
		mark := filepath.Join(stateDir(s.State), "filled-"+filepath.Base(v.Staging))
		if _, err := os.Lstat(mark); err == nil {
			continue
		}
		from, err := b.resolve(v.Target)
		if err == nil && isDir(from) {
			err = fillVolume(v.Staging, from)
		}
		if err == nil {
			err = os.WriteFile(mark, nil, 0o600)
		}
		if err != nil {
			return fmt.Errorf("fill the volume of %s: %w", v.Target, err)
		}
	}
	return nil
}

// fillVolume copies a directory into one that holds nothing but what is left of an attempt that was cut off.
func fillVolume(to, from string) error {
	left, err := os.ReadDir(to)
	if err != nil {
		return err
	}
	for _, e := range left {
		if err := os.RemoveAll(filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	r, w := io.Pipe()
	written := make(chan error, 1)
	go func() {
		err := writeTree(w, from, ".")
		w.CloseWithError(err)
		written <- err
	}()
	err = readTar(r, wire.TarInRequest{Path: to}, nil)
	r.CloseWithError(err)
	if werr := <-written; werr != nil && !errors.Is(werr, err) {
		return werr
	}
	return err
}
