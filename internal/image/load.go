package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Bounds of what is read whole.
const (
	maxConfig   = 8 << 20
	maxManifest = 8 << 20
)

// Source is where an image comes from: a path, or a stream.
type Source struct {
	Path   string
	Reader io.Reader // used when Path is empty; read to its end, not closed. A Read may go on after the end of the context
}

func (src Source) String() string {
	if src.Path == "" {
		return "the input"
	}
	return src.Path
}

// Options are the choices of a load or import. The zero value is useful.
type Options struct {
	Limits Limits
	// Config is what an imported image runs by default. Not for Load.
	Config Config
	// Comment goes into the history of an imported image. Not for Load.
	Comment string
}

// found is an image in a source: its names, and the way to the rest. What describes it is read when its turn comes, since a source
// may name a thousand images, or one a thousand times.
type found struct {
	names []string
	read  func() (description, error)
}

// description is what a source says of an image.
type description struct {
	manifest *v1.Manifest // nil: to be made
	rawMan   []byte
	config   *ConfigFile
	rawConf  []byte
	layers   []string // names in the source
}

// container is a source of several named files.
type container interface {
	// open returns a regular file's contents.
	open(name string) (io.ReadCloser, error)
	has(name string) bool
	Close() error
}

// Load reads every image of an OCI layout, as a directory or in a tar archive, or of an archive of `docker save`. Archives may
// be compressed with gzip, zstd or bzip2.
func (s *Store) Load(ctx context.Context, src Source, opts Options) ([]Image, error) {
	imgs, err := s.load(ctx, src, opts)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", src, err)
	}
	return imgs, nil
}

func (s *Store) load(ctx context.Context, src Source, opts Options) ([]Image, error) {
	st, err := s.newStage(ctx)
	if err != nil {
		return nil, err
	}
	defer st.close()
	opts.Limits = opts.Limits.withDefaults()
	meta := &budget{opts.Limits.Metadata}
	c, err := openContainer(ctx, src, st, opts.Limits, meta)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	imgs, err := findImages(c)
	if err != nil {
		return nil, err
	}
	entries := make([]entry, 0, len(imgs))
	for _, im := range imgs {
		d, err := im.read()
		if err != nil {
			return nil, err
		}
		// Whoever loads gets all configurations in the end. What else one image takes is given back before the next.
		if err := meta.take(len(d.rawConf)); err != nil {
			return nil, err
		}
		opts.Limits.Metadata = max(1, meta.left)
		e, err := s.loadOne(ctx, st, containerLayers{c}, d, opts, Host())
		if err != nil {
			return nil, err
		}
		e.Names = im.names
		entries = append(entries, e)
	}
	return st.commit(ctx, entries)
}

// layerSource is where the layers of an image come from.
type layerSource interface {
	// begin is called when the layers will be asked for, in their order.
	begin(ctx context.Context, d description) error
	// layer opens one of them; staged is as in layerSpec.
	layer(ctx context.Context, d description, i int) (r io.ReadCloser, staged func() error, err error)
}

// containerLayers are the layers of a container.
type containerLayers struct{ c container }

func (containerLayers) begin(context.Context, description) error { return nil }

func (l containerLayers) layer(_ context.Context, d description, i int) (io.ReadCloser, func() error, error) {
	r, err := l.c.open(d.layers[i])
	return r, nil, err
}

// loadOne stages one image.
func (s *Store) loadOne(ctx context.Context, st *stage, src layerSource, im description, opts Options, p Platform) (entry, error) {
	id := hashBytes(im.rawConf)
	if old, ok := s.haveAll(st, id.String()); ok {
		// The id is the digest of the configuration, which names every layer: there is nothing that could differ.
		return old, nil
	}
	diffs := im.config.RootFS.DiffIDs
	if len(diffs) != len(im.layers) {
		return entry{}, fmt.Errorf("image %s has %d layers, its configuration names %d: %w", ShortID(id.String()), len(im.layers), len(diffs), ErrFormat)
	}
	if err := p.Check(im.config); err != nil {
		return entry{}, fmt.Errorf("image %s: %w; load one for this platform", ShortID(id.String()), err)
	}
	b := newBuilder(st, opts, diffs, true)
	defer b.close()
	if err := src.begin(ctx, im); err != nil {
		return entry{}, fmt.Errorf("image %s: %w", ShortID(id.String()), err)
	}
	for i := range im.layers {
		want := layerSpec{diff: diffs[i]}
		if im.manifest != nil {
			want.desc = im.manifest.Layers[i]
		}
		if err := addFrom(ctx, b, src, im, i, want); err != nil {
			return entry{}, fmt.Errorf("image %s: %w", ShortID(id.String()), err)
		}
	}
	size, err := b.finish(ctx)
	if err != nil {
		return entry{}, fmt.Errorf("image %s: %w", ShortID(id.String()), err)
	}
	rawMan := im.rawMan
	if rawMan == nil {
		if rawMan, err = makeManifest(id, im.rawConf, b.layers); err != nil {
			return entry{}, err
		}
	}
	return stageMeta(st, entry{Created: im.config.Created.UTC(), Size: size, Rootfs: rootfsID(diffs), Layers: len(diffs)}, im.rawConf, rawMan)
}

// commitBuilt stages what describes an image that was built here, and commits it. The entry lacks what follows from the rest.
func (st *stage) commitBuilt(ctx context.Context, b *builder, e entry, conf ConfigFile) (Image, error) {
	e.Rootfs, e.Layers = rootfsID(b.diffs), len(b.diffs)
	var err error
	if e.Size, err = b.finish(ctx); err != nil {
		return Image{}, err
	}
	conf.Created.Time, conf.RootFS = e.Created, v1.RootFS{Type: "layers", DiffIDs: b.diffs}
	rawConf, err := json.Marshal(conf)
	if err != nil {
		return Image{}, err
	}
	rawMan, err := makeManifest(hashBytes(rawConf), rawConf, b.layers)
	if err != nil {
		return Image{}, err
	}
	if e, err = stageMeta(st, e, rawConf, rawMan); err != nil {
		return Image{}, err
	}
	imgs, err := st.commit(ctx, []entry{e})
	if err != nil {
		return Image{}, err
	}
	return imgs[0], nil
}

// stageMeta stages configuration and manifest and completes the entry with their digests.
func stageMeta(st *stage, e entry, conf, man []byte) (entry, error) {
	e.ID, e.Manifest = hashBytes(conf).String(), hashBytes(man).String()
	return e, errors.Join(st.keepBytes(conf, blobPlace(e.ID)), st.keepBytes(man, blobPlace(e.Manifest)))
}

// haveAll looks for an image that is stored whole, and shares its files with the stage. What is small is read, so that a load mends
// it where it is damaged.
func (s *Store) haveAll(st *stage, id string) (entry, bool) {
	idx, err := s.readIndex()
	if err != nil {
		return entry{}, false
	}
	e := idx.byID(id)
	if e == nil || !st.share(blobPlace(e.ID)) || !st.share(blobPlace(e.Manifest)) || !st.shareRootfs(e.Rootfs) {
		return entry{}, false
	}
	raw, err := readBounded(s.blobPath(e.ID), maxConfig)
	if err != nil || hashBytes(raw).String() != e.ID {
		return entry{}, false
	}
	// Another version of this program may have made another root of the same layers.
	if conf, err := parseConfig(raw); err != nil || rootfsID(conf.RootFS.DiffIDs) != e.Rootfs {
		return entry{}, false
	}
	m, err := s.manifest(e)
	if err != nil {
		return entry{}, false
	}
	for _, l := range m.Layers {
		if !st.share(blobPlace(l.Digest.String())) {
			return entry{}, false
		}
	}
	return *e, true
}

func (s *Store) manifest(e *entry) (*v1.Manifest, error) {
	b, err := readBounded(s.blobPath(e.Manifest), maxManifest)
	if err != nil {
		return nil, fmt.Errorf("read manifest of image %s: %w", ShortID(e.ID), err)
	}
	m := &v1.Manifest{}
	if hashBytes(b).String() != e.Manifest {
		err = ErrDigest
	} else {
		err = json.Unmarshal(b, m)
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest of image %s: %w", ShortID(e.ID), err)
	}
	return m, nil
}

func addFrom(ctx context.Context, b *builder, src layerSource, im description, i int, want layerSpec) error {
	r, staged, err := src.layer(ctx, im, i)
	if err != nil {
		return fmt.Errorf("layer %d: %w", i+1, err)
	}
	defer r.Close()
	want.staged = staged
	return b.add(ctx, r, want)
}

// makeManifest describes an image that came without a manifest.
func makeManifest(id v1.Hash, conf []byte, layers []v1.Descriptor) ([]byte, error) {
	b, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: id, Size: int64(len(conf))},
		Layers:        layers,
	})
	if err != nil {
		return nil, fmt.Errorf("make manifest: %w", err)
	}
	return b, nil
}

func fullNames(names []string) ([]string, error) {
	full := make([]string, 0, len(names))
	for _, name := range names {
		n, err := ParseName(name)
		if err != nil {
			return nil, err
		}
		if n.Digest != "" {
			return nil, fmt.Errorf("%q: a name to give cannot have a digest", name)
		}
		full = append(full, n.String())
	}
	return full, nil
}
