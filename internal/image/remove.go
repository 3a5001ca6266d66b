package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

// Removed tells what a removal did.
type Removed struct {
	Untagged []string // names that are gone, in the short form
	Deleted  []string // ids of images that are gone
	Freed    int64    // bytes given back on disk
}

// Needs is what boxes need of a store.
type Needs struct {
	Images map[string][]string // by an image's id the boxes that were made from it
	Rootfs []string            // ids of the boxes' root file systems, which they need when their images are lost, too
	// Unknown says that a box does not tell what it needs. No root file system is deleted then.
	Unknown bool
}

// NeedsFunc finds out what boxes need; nil: there are none. It is called with the store locked, so that it sees every box for which
// [Store.Confirm] has found the image.
type NeedsFunc func(context.Context) (Needs, error)

func (f NeedsFunc) ask(ctx context.Context) (Needs, error) {
	if f == nil {
		return Needs{}, nil
	}
	return f(ctx)
}

// Remove takes a name from an image, and the image away with its last name, as which one with a digest does not count. By id, all
// names go. An image that boxes were made from stays whole and the error is an [*InUseError].
func (s *Store) Remove(ctx context.Context, ref string, boxes NeedsFunc) (Removed, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return Removed{}, err
	}
	defer unlock()
	idx, err := s.readIndex()
	if err != nil {
		return Removed{}, err
	}
	e, err := idx.find(ref)
	if err != nil {
		return Removed{}, err
	}
	needs, err := boxes.ask(ctx)
	if err != nil {
		return Removed{}, err
	}
	var res Removed
	_ = s.giveBack(idx, needs, &res) // it is for room; who gets none is told so below
	if name, left := e.without(ref); left {
		if err := s.writeIndex(idx); err != nil {
			return res, err
		}
		res.Untagged = []string{name}
		return res, nil
	}
	if used := needs.Images[e.ID]; len(used) > 0 {
		return res, &InUseError{Image: ref, Boxes: used}
	}
	names, id := shortNames(e.Names), e.ID
	idx.Images = slices.DeleteFunc(idx.Images, func(e entry) bool { return e.ID == id })
	if err := s.writeIndex(idx); err != nil {
		return res, err
	}
	// From here on the image is gone; what cannot be deleted now goes at the next prune.
	res.Untagged, res.Deleted = names, []string{id}
	return res, s.giveBack(idx, needs, &res)
}

// without takes a name from an image that keeps another. It tells which in the short form, and if that is so.
func (e *entry) without(ref string) (short string, left bool) {
	n, err := ParseName(ref)
	if err != nil {
		return "", false
	}
	list, name, others := &e.Names, n.String(), 1
	if n.Digest != "" {
		list, name, others = &e.Digests, n.canonical(n.Digest), 0
	}
	if len(e.Names) <= others || !slices.Contains(*list, name) {
		return "", false
	}
	*list = slices.DeleteFunc(*list, func(have string) bool { return have == name })
	return shortNames([]string{name})[0], true
}

// Prune removes images without a name, or with all every image, that no box was made from, and everything in the store that
// belongs to no image. Where only is given, it chooses among the images.
func (s *Store) Prune(ctx context.Context, all bool, only func(labels map[string]string, created time.Time) bool, boxes NeedsFunc) (Removed, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return Removed{}, err
	}
	defer unlock()
	idx, err := s.readIndex()
	if err != nil {
		return Removed{}, err
	}
	needs, err := boxes.ask(ctx)
	if err != nil {
		return Removed{}, err
	}
	res := Removed{Freed: s.sweepPulls()}
	err = s.giveBack(idx, needs, &res)
	var names, ids []string
	idx.Images = slices.DeleteFunc(idx.Images, func(e entry) bool {
		if !all && len(e.Names) > 0 || len(needs.Images[e.ID]) > 0 {
			return false
		}
		if only != nil {
			// One whose labels cannot be read is not known to be meant.
			if img, err := s.image(&e); err != nil || !only(img.Config.Config.Labels, e.Created) {
				return false
			}
		}
		names, ids = append(names, shortNames(e.Names)...), append(ids, e.ID)
		return true
	})
	if len(ids) == 0 {
		return res, err
	}
	if err := s.writeIndex(idx); err != nil {
		return res, err
	}
	res.Untagged, res.Deleted = names, ids
	return res, s.giveBack(idx, needs, &res)
}

// giveBack deletes what belongs to nobody. It comes before the index is written, too, so that there is room for that.
func (s *Store) giveBack(idx *index, needs Needs, res *Removed) error {
	res.Freed += s.sweep()
	freed, err := s.collect(idx, needs)
	res.Freed += freed
	s.keepSpare(0) // the last may be in use as the index
	return err
}

// Confirm finds out whether an image is still there, with no removal under way. Whoever has recorded a box before it asks, where the
// removal's [NeedsFunc] looks, can rely on the answer: from then on the image stays. One that is gone is [ErrNotFound].
func (s *Store) Confirm(ctx context.Context, img Image) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	idx, err := s.readIndex()
	if err != nil {
		return err
	}
	if idx.byID(img.ID) == nil || s.checkRootfs(img.RootfsID) != nil {
		return fmt.Errorf("image %s was removed meanwhile: %w", ShortID(img.ID), ErrNotFound)
	}
	return nil
}

func shortNames(names []string) []string {
	var short []string
	for _, name := range names {
		if n, err := ParseName(name); err == nil {
			name = n.Short()
		}
		short = append(short, name)
	}
	return short
}

// places are the files that an image needs. They come with an error when what names them cannot be read.
func (s *Store) places(e *entry) ([]string, error) {
	places, err := s.rootfsPlaces(e.Rootfs)
	places = append(places, blobPlace(e.ID), blobPlace(e.Manifest))
	m, merr := s.manifest(e)
	if merr == nil {
		for _, l := range m.Layers {
			places = append(places, blobPlace(l.Digest.String()))
		}
	}
	return places, errors.Join(err, merr)
}

// rootfsPlaces are the files of a root file system. They come with an error when the list of them cannot be read.
func (s *Store) rootfsPlaces(id string) ([]string, error) {
	head, err := s.readHead(id)
	return head.places(id), err
}

// collect deletes the files that no image of the index refers to and no box needs. The caller holds the lock, so no load is
// committing; loads at work have links of their own to what they share.
func (s *Store) collect(idx *index, needs Needs) (freed int64, err error) {
	want := map[string]bool{}
	unknown := map[string]bool{"rootfs": needs.Unknown} // directories in which anything may be needed
	note := func(places []string, err error) {
		for _, place := range places {
			want[place] = true
		}
		if err != nil {
			s.log.Warn("what belongs to no image is kept, until this is loaded again or removed", "reason", err)
			unknown["blobs/sha256"], unknown["rootfs"] = true, true
		}
	}
	for _, id := range needs.Rootfs {
		note(s.rootfsPlaces(id))
	}
	for i := range idx.Images {
		note(s.places(&idx.Images[i]))
	}
	var errs []error
	for _, d := range []string{"blobs/sha256", "rootfs"} {
		if unknown[d] {
			continue
		}
		entries, err := os.ReadDir(s.path(d))
		if err != nil {
			return freed, err
		}
		for _, de := range entries {
			if want[d+"/"+de.Name()] {
				continue
			}
			size := int64(0)
			if fi, err := de.Info(); err == nil {
				size = diskSize(fi)
			}
			if err := os.Remove(s.path(d, de.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
				continue
			}
			freed += size
		}
	}
	return freed, errors.Join(errs...)
}
