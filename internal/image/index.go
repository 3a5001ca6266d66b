package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coffer-box/coffer/internal/disk"
)

// indexVersion is raised when older programs would misread the index.
const indexVersion = 2

// entry is one image in the index.
type entry struct {
	ID    string   `json:"id"`
	Names []string `json:"names,omitempty"` // in full
	// Digests are the names with digests by which registries gave it, "docker.io/library/debian@sha256:…", in full. They are of what the
	// registry has under a tag, which may be an index of several platforms.
	Digests  []string  `json:"digests,omitempty"`
	Created  time.Time `json:"created,omitzero"`
	Size     int64     `json:"size"`
	Manifest string    `json:"manifest"`
	Rootfs   string    `json:"rootfs"`
	Layers   int       `json:"layers"`
	// Source tells which embedded archive the image was made from, for the one that comes with the program.
	Source string `json:"source,omitempty"`
}

type index struct {
	Version int     `json:"version"`
	Images  []entry `json:"images"`
}

// readIndex returns what is in the store. A reader needs no lock, since the index is only ever replaced.
func (s *Store) readIndex() (*index, error) {
	path := s.path("index.json")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &index{Version: indexVersion}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read image index: %w", err)
	}
	idx := &index{}
	if err := json.Unmarshal(b, idx); err != nil {
		return nil, fmt.Errorf("image index %s is damaged (%w); move it away and load the images again", path, err)
	}
	if idx.Version > indexVersion {
		return nil, fmt.Errorf("image index %s was written by a newer version (format %d, this program knows %d); use that version",
			path, idx.Version, indexVersion)
	}
	return idx, nil
}

// writeIndex replaces the index. The caller holds the lock.
func (s *Store) writeIndex(idx *index) error {
	idx.Version = indexVersion
	b, err := json.MarshalIndent(idx, "", " ")
	if err != nil {
		return fmt.Errorf("write image index: %w", err)
	}
	b = append(b, '\n')
	err = disk.Replace(s.path("index.json"), b)
	if disk.NoRoom(err) {
		// Removing images is how people make room, so that must not take any.
		if disk.ReplaceWith(s.path("index.spare"), s.path("index.json"), b) == nil {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("write image index: %w", err)
	}
	s.keepSpare(len(b))
	return nil
}

// minSpare is room for the index of some hundred images.
const minSpare = 64 << 10

// keepSpare makes room for the next index, if there is any.
func (s *Store) keepSpare(size int) {
	if err := disk.Spare(s.path("index.spare"), max(minSpare, 2*size)); err != nil {
		s.log.Debug("there is no room for a spare index", "error", err)
	}
}

// find resolves a reference within the index.
func (idx *index) find(ref string) (*entry, error) {
	hex := strings.TrimPrefix(ref, "sha256:")
	if idPattern().MatchString(hex) {
		// A whole id is never a name: whoever uses one means these contents and no others.
		if e := idx.byID("sha256:" + hex); e != nil {
			return e, nil
		}
		return nil, fmt.Errorf("%q: %w", ref, ErrNotFound)
	}
	name, nameErr := ParseName(ref)
	if nameErr == nil {
		full := name.String()
		for i := range idx.Images {
			if slices.Contains(idx.Images[i].Names, full) {
				return &idx.Images[i], nil
			}
			if name.Digest != "" && (idx.Images[i].Manifest == name.Digest || slices.Contains(idx.Images[i].Digests, name.canonical(name.Digest))) {
				return &idx.Images[i], nil
			}
		}
	}
	if hexPattern().MatchString(hex) {
		var found *entry
		for i := range idx.Images {
			if strings.HasPrefix(strings.TrimPrefix(idx.Images[i].ID, "sha256:"), hex) {
				if found != nil {
					return nil, fmt.Errorf("%q: %w; give more digits", ref, ErrAmbiguous)
				}
				found = &idx.Images[i]
			}
		}
		if found != nil {
			return found, nil
		}
		return nil, fmt.Errorf("%q: %w", ref, ErrNotFound)
	}
	if nameErr != nil {
		return nil, nameErr
	}
	return nil, fmt.Errorf("%q: %w", name.Short(), ErrNotFound)
}

// byID returns the entry of an image, or nil.
func (idx *index) byID(id string) *entry {
	for i := range idx.Images {
		if idx.Images[i].ID == id {
			return &idx.Images[i]
		}
	}
	return nil
}

// put adds an image or renews it, and takes its names from whoever had them.
func (idx *index) put(e entry) *entry {
	names, digests := slices.Clone(e.Names), slices.Clone(e.Digests) // put edits the lists in place
	old := idx.byID(e.ID)
	if old == nil {
		idx.Images = append(idx.Images, e)
		old = &idx.Images[len(idx.Images)-1]
	} else {
		e.Names, e.Digests = old.Names, old.Digests
		if e.Source == "" {
			e.Source = old.Source
		}
		*old = e
	}
	for i := range idx.Images {
		idx.Images[i].Names = slices.DeleteFunc(idx.Images[i].Names, func(n string) bool { return slices.Contains(names, n) })
	}
	old.Names, old.Digests = union(old.Names, names), union(old.Digests, digests)
	return old
}

// union is both lists in one, sorted, with everything once.
func union(a, b []string) []string {
	a = append(a, b...)
	slices.Sort(a)
	return slices.Compact(a)
}

// lock takes the lock of the store. It is the only one in this package that is waited for; the locks below tmp are only tried.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	unlock, err = disk.Lock(ctx, s.path("lock"))
	if err != nil {
		return nil, fmt.Errorf("lock image store: %w", err)
	}
	return unlock, nil
}

// readBounded reads a whole file that should be small.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAllBounded(f, limit)
}

func readAllBounded(r io.Reader, limit int64) ([]byte, error) {
	var b bytes.Buffer
	if n, err := b.ReadFrom(io.LimitReader(r, limit+1)); err != nil {
		return nil, err
	} else if n > limit {
		return nil, fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
	}
	return b.Bytes(), nil
}
