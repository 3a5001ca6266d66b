package image

import (
	"context"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// CommitOptions are the choices of a commit. The zero value is useful.
type CommitOptions struct {
	Name    string   // of the new image; may be empty
	Changes []string // of its configuration, as for [NewConfig]
	Author  string
	Message string
}

// Commit makes an image of another one, of the store, and a layer on top of it: a plain tar stream, which is read to its end.
func (s *Store) Commit(ctx context.Context, base string, layer io.Reader, o CommitOptions) (Image, error) {
	var names []string
	if o.Name != "" {
		var err error
		if names, err = fullNames([]string{o.Name}); err != nil {
			return Image{}, err
		}
	}
	h, err := s.Hold(ctx, base)
	if err != nil {
		return Image{}, err
	}
	defer h.Close()
	raw, err := h.small(h.entry.ID)
	if err != nil {
		return Image{}, err
	}
	conf, err := parseConfig(raw)
	if err != nil {
		return Image{}, err
	}
	for _, line := range o.Changes {
		if err := applyChange(&conf.Config, line); err != nil {
			return Image{}, fmt.Errorf("change %q: %w", line, err)
		}
	}
	if len(conf.RootFS.DiffIDs) != len(h.man.Layers) {
		return Image{}, fmt.Errorf("image %s has %d layers, its configuration names %d: %w", ShortID(h.entry.ID), len(h.man.Layers), len(conf.RootFS.DiffIDs), ErrFormat)
	}
	b := newBuilder(h.st, Options{}, conf.RootFS.DiffIDs, false)
	defer b.close()
	for i, d := range h.man.Layers {
		if err := b.addHeld(ctx, h, layerSpec{desc: d, diff: conf.RootFS.DiffIDs[i]}); err != nil {
			return Image{}, err
		}
	}
	if err := b.add(ctx, layer, layerSpec{plain: true}); err != nil {
		return Image{}, err
	}
	now := time.Now().UTC()
	conf.Author = o.Author
	conf.History = append(conf.History, v1.History{Created: v1.Time{Time: now}, CreatedBy: "coffer commit", Author: o.Author, Comment: o.Message})
	return h.st.commitBuilt(ctx, b, entry{Names: names, Created: now}, *conf)
}

// addHeld takes the next layer from an image that is held, in whose stage it is already.
func (b *builder) addHeld(ctx context.Context, h *Held, want layerSpec) error {
	f, err := h.blob(want.desc.Digest.String())
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() == want.desc.Size && b.skip(want) {
		return nil
	}
	want.staged = func() error { return nil }
	return b.add(ctx, f, want)
}
