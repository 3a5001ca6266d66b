// Package image keeps images: it reads them from archives, layouts, root file systems and directories, and turns each into what a
// box starts from, read-only EROFS files and a configuration.
//
// Nothing of an image is ever unpacked on the host. Layers are merged in memory by name while their contents stream into
// those files, so a hostile path, link or device has nothing to act on. The package reaches registries only through what it is given
// ([Remote]), starts no box and knows no engine.
//
// # On disk
//
// A store is a directory:
//
//	index.json            what images there are and what they are called; replaced whole, never changed in place
//	index.spare           room for the next index, for when the disk is full
//	lock                  flock(2)ed by whoever changes the index or sweeps
//	blobs/sha256/<hex>    manifests, configurations and compressed layers, by their own digest
//	rootfs/<id>.erofs     segments of root file systems; the id is made of all layers up to there, so images that begin with the
//	                      same layers share them
//	rootfs/<id>.extra     JSON lines: over which segments that one lies, and attributes and devices of the root that they make
//	                      together; gVisor reads none of those from EROFS
//	tmp/<random>/         one load at work; its lock file is held by the one who writes there
//	pull/<hex>.part       a blob on its way from a registry, flock(2)ed by the one who fetches it; a next pull goes on with it
//	pull/<hex>.lock       flock(2)ed by the pull of what has this digest, so that others need not do the same
//
// A load writes and syncs everything in its own directory under tmp, then takes the lock, renames the files to their places and
// replaces the index. Whoever dies before leaves a directory with a free lock, which the next change of the store sweeps away.
// What a load wants to share with images that are there it hard-links into its directory first, so that a removal at the same
// time cannot pull it away.
package image

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

var (
	// ErrNotFound says that the store has no such image.
	ErrNotFound = errors.New("no such image")
	// ErrAmbiguous says that an id prefix fits more than one image.
	ErrAmbiguous = errors.New("ambiguous image id")
	// ErrTooLarge says that an image exceeds a limit.
	ErrTooLarge = errors.New("too large")
	// ErrFormat says that a source is nothing that can be loaded.
	ErrFormat = errors.New("not an image")
	// ErrDigest says that content does not have the digest that it should have.
	ErrDigest = errors.New("content does not match its digest")
)

// InUseError refuses to remove an image that boxes were made from.
type InUseError struct {
	Image string
	Boxes []string
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("image %s is in use by %s; remove them first", e.Image, strings.Join(e.Boxes, ", "))
}

// Image is one image of the store.
type Image struct {
	ID       string     `json:"id"`                // digest of the configuration, "sha256:…"
	Names    []string   `json:"names"`             // in the short form, with tags, sorted; empty for an image that lost its name
	Digests  []string   `json:"digests,omitempty"` // in the short form: what registries gave it as, "debian@sha256:…"
	Created  time.Time  `json:"created"`
	Size     int64      `json:"size"` // bytes of the root file system
	Config   ConfigFile `json:"config"`
	Manifest string     `json:"manifest"` // digest of the manifest
	RootfsID string     `json:"rootfs_id"`
	Layers   int        `json:"layers"`
	// Damaged says what is missing of an image that no box can be made from. It can be loaded again, and removed.
	Damaged string `json:"damaged,omitempty"`
}

// ConfigFile is an image's configuration.
type ConfigFile struct {
	v1.ConfigFile
	Config Config `json:"config"`
}

// Config is what an image says about the boxes that are made from it.
type Config struct {
	v1.Config
	Healthcheck *Healthcheck `json:"Healthcheck,omitempty"`
}

// Healthcheck is how an image wants to be checked, with what v1 does not know of it.
type Healthcheck struct {
	v1.HealthConfig
	StartInterval time.Duration `json:",omitempty"`
}

// ShortID returns the first 12 digits of an id, as shown to people.
func ShortID(id string) string {
	_, hex, ok := strings.Cut(id, ":")
	if !ok {
		hex = id
	}
	return hex[:min(12, len(hex))]
}

// Extra is what gVisor does not read of one file of a root file system.
type Extra struct {
	Path   []byte  `json:"path"` // absolute, in the box; no string, since names need not be UTF-8
	Xattrs []Xattr `json:"xattrs,omitempty"`
	Device *Device `json:"device,omitempty"`
}

// Xattr is one extended attribute.
type Xattr struct {
	Name  string
	Value []byte
}

// Device describes a device file.
type Device struct {
	Mode  uint32 `json:"mode"` // type and permissions
	UID   uint32 `json:"uid,omitempty"`
	GID   uint32 `json:"gid,omitempty"`
	Sec   int64  `json:"sec,omitempty"` // when it was changed, since 1970
	Nsec  int64  `json:"nsec,omitempty"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// Store is a directory of images. It holds no state but the path: every call looks at the disk, and any number of processes may
// use one directory at once.
type Store struct {
	dir     string
	log     *slog.Logger
	segment int64 // bytes that end a segment
}

// Open returns the store in dir, which is made when it is missing.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: dir, log: log, segment: segmentSize}
	// The last that is made, and that stores of before do not have.
	if _, err := os.Stat(s.path("pull")); err == nil {
		return s, nil
	}
	for _, d := range []string{"blobs/sha256", "rootfs", "tmp", "pull"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *Store) blobPath(digest string) string {
	return s.path("blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (s *Store) rootfsPath(id string) string { return s.path("rootfs", id+".erofs") }
func (s *Store) extraPath(id string) string  { return s.path("rootfs", id+".extra") }

// rootfsHead is what the file beside a segment begins with.
type rootfsHead struct {
	Below  []string `json:"below,omitempty"`  // segments that it lies over, the lowest first
	Closed bool     `json:"closed,omitempty"` // further segments may lie over it
	Size   int64    `json:"size"`             // bytes of all of them together
}

// stack lists the segments of a root file system, the lowest first.
func (h rootfsHead) stack(id string) []string { return append(slices.Clone(h.Below), id) }

// places are the files that a root file system needs.
func (h rootfsHead) places(id string) []string {
	var places []string
	for _, segment := range h.stack(id) {
		places = append(places, rootfsPlace(segment), extraPlace(segment))
	}
	return places
}

// extrasEnd is the last line of the file beside a segment: one that was cut has none.
type extrasEnd struct {
	Extra
	End bool `json:"end"`
}

// RootfsPaths returns the image's root file system: EROFS files that gVisor and Linux can read, to be laid one over the other, the
// lowest first.
func (s *Store) RootfsPaths(img Image) ([]string, error) {
	head, err := s.readHead(img.RootfsID)
	if err != nil {
		return nil, fmt.Errorf("find root file system %.12s: %w; load its image again", img.RootfsID, err)
	}
	var paths []string
	for _, segment := range head.stack(img.RootfsID) {
		paths = append(paths, s.rootfsPath(segment))
	}
	return paths, nil
}

// Extras yields what gVisor does not read of the image's files, in the order of a walk. An error is the last.
func (s *Store) Extras(img Image) iter.Seq2[Extra, error] {
	return func(yield func(Extra, error) bool) {
		err := readExtras(s.extraPath(img.RootfsID), func(x Extra) bool { return yield(x, nil) })
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w; load its image again", err)
		}
		if err != nil {
			yield(Extra{}, fmt.Errorf("read the attributes of root file system %.12s: %w", img.RootfsID, err))
		}
	}
}

func (s *Store) readHead(rootfs string) (rootfsHead, error) { return readHead(s.extraPath(rootfs)) }

// readHead reads the beginning of the file beside a segment.
func readHead(path string) (rootfsHead, error) {
	f, err := openExtras(path)
	if err != nil {
		return rootfsHead{}, err
	}
	return f.head, f.Close()
}

// readExtras reads one line after the other, since an image may have more of them than memory should hold.
func readExtras(path string, yield func(Extra) bool) error {
	f, err := openExtras(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for !f.list || f.More() {
		var x extrasEnd
		if err := f.Decode(&x); err != nil {
			return fmt.Errorf("it is not whole: %w", err)
		}
		if x.End || !yield(x.Extra) {
			return nil
		}
	}
	_, err = f.Token() // a list that was cut has no end
	return err
}

// extrasFile is an open file beside a segment, from behind its head on.
type extrasFile struct {
	*os.File
	*json.Decoder
	head rootfsHead
	list bool // of before there were segments: a JSON list, without a head
}

func openExtras(path string) (_ *extrasFile, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
			err = fmt.Errorf("read %s: %w", path, err)
		}
	}()
	r := bufio.NewReader(file)
	f := &extrasFile{File: file, Decoder: json.NewDecoder(r)}
	first, err := r.Peek(1)
	if err != nil {
		return nil, err
	}
	if f.list = first[0] == '['; f.list {
		_, err = f.Token()
		return f, err
	}
	if err := f.Decode(&f.head); err != nil {
		return nil, err
	}
	for _, id := range f.head.Below {
		if raw, err := hex.DecodeString(id); err != nil || len(raw) != sha256.Size {
			return nil, fmt.Errorf("%q names no segment", id)
		}
	}
	return f, nil
}

// Resolve finds an image by name, by id, or by a prefix of its id.
func (s *Store) Resolve(ctx context.Context, ref string) (Image, error) {
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	for again := false; ; again = true {
		idx, err := s.readIndex()
		if err != nil {
			return Image{}, err
		}
		e, err := idx.find(ref)
		if err != nil {
			return Image{}, err
		}
		img, err := s.image(e)
		if err == nil {
			return img, nil
		}
		// It may have been removed between the two looks, and its name be another's by now.
		if again || !errors.Is(err, fs.ErrNotExist) {
			return Image{}, fmt.Errorf("image %s is damaged: %w; load it again, or remove it", ShortID(e.ID), err)
		}
	}
}

// List returns all images, the newest first.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	idx, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	var now *index // as it is when something turned out to be missing
	imgs := make([]Image, 0, len(idx.Images))
	for i := range idx.Images {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		img, err := s.image(&idx.Images[i])
		if errors.Is(err, fs.ErrNotExist) {
			if now == nil {
				var rerr error
				if now, rerr = s.readIndex(); rerr != nil {
					return nil, rerr
				}
			}
			if now.byID(img.ID) == nil {
				continue // removed meanwhile
			}
		}
		if err != nil {
			img.Damaged = err.Error()
		}
		imgs = append(imgs, img)
	}
	slices.SortStableFunc(imgs, func(a, b Image) int {
		return cmp.Or(b.Created.Compare(a.Created), strings.Compare(a.ID, b.ID))
	})
	return imgs, nil
}

// image completes an entry of the index with the configuration. What the index says comes with an error, too.
func (s *Store) image(e *entry) (Image, error) {
	img := Image{
		ID: e.ID, Names: shortNames(e.Names), Digests: shortNames(e.Digests), Created: e.Created, Size: e.Size, Manifest: e.Manifest, RootfsID: e.Rootfs, Layers: e.Layers,
	}
	slices.Sort(img.Names)
	b, err := readBounded(s.blobPath(e.ID), maxConfig)
	if err != nil {
		return img, fmt.Errorf("read its configuration: %w", err)
	}
	if img.Config, err = decodeConfig(b); err != nil {
		return img, fmt.Errorf("read its configuration: %w", err)
	}
	if err := s.checkRootfs(e.Rootfs); err != nil {
		return img, fmt.Errorf("find its root file system: %w", err)
	}
	return img, nil
}

// checkRootfs sees that no file of a root file system is missing.
func (s *Store) checkRootfs(id string) error {
	head, err := s.readHead(id)
	if err != nil {
		return err
	}
	for _, place := range head.places(id) {
		if _, err := os.Lstat(s.path(place)); err != nil {
			return err
		}
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
