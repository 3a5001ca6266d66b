package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Tag gives an image another name, which is taken from the image that has it.
func (s *Store) Tag(ctx context.Context, ref, name string) error {
	full, err := fullNames([]string{name})
	if err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	idx, err := s.readIndex()
	if err != nil {
		return err
	}
	e, err := idx.find(ref)
	if err != nil {
		return err
	}
	named := *e
	named.Names, named.Digests = full, nil
	idx.put(named)
	return s.writeIndex(idx)
}

// Held is an image whose files stay while it is held, even if it is removed meanwhile. It is a [v1.Image].
type Held struct {
	v1.Image
	st    *stage
	entry entry
	man   *v1.Manifest
}

// Close lets go of the files.
func (h *Held) Close() { h.st.close() }

// Hold finds an image and holds it.
func (s *Store) Hold(ctx context.Context, ref string) (*Held, error) {
	idx, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	e, err := idx.find(ref)
	if err != nil {
		return nil, err
	}
	st, err := s.newStage(ctx)
	if err != nil {
		return nil, err
	}
	h := &Held{st: st}
	var ok bool
	if h.entry, ok = s.haveAll(st, e.ID); !ok {
		st.close()
		return nil, fmt.Errorf("image %s is damaged, or was removed just now: pull or load it again", ref)
	}
	if h.man, err = s.manifest(&h.entry); err == nil {
		h.Image, err = partial.CompressedToImage(heldCore{h})
	}
	if err != nil {
		st.close()
		return nil, err
	}
	return h, nil
}

// blob opens one of the image's blobs.
func (h *Held) blob(digest string) (*os.File, error) { return os.Open(h.st.made[blobPlace(digest)]) }

func (h *Held) small(digest string) ([]byte, error) {
	f, err := h.blob(digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAllBounded(f, maxManifest)
}

// heldCore is what go-containerregistry makes an image of.
type heldCore struct{ *Held }

func (h heldCore) RawConfigFile() ([]byte, error) { return h.small(h.entry.ID) }
func (h heldCore) RawManifest() ([]byte, error)   { return h.small(h.entry.Manifest) }

func (h heldCore) MediaType() (types.MediaType, error) {
	if h.man.MediaType == "" {
		return types.OCIManifestSchema1, nil
	}
	return h.man.MediaType, nil
}

func (h heldCore) LayerByDigest(digest v1.Hash) (partial.CompressedLayer, error) {
	for _, d := range append(slices.Clone(h.man.Layers), h.man.Config) {
		if d.Digest == digest {
			return heldLayer{h.Held, d}, nil
		}
	}
	return nil, fmt.Errorf("layer %s is none of this image", digest)
}

type heldLayer struct {
	held *Held
	desc v1.Descriptor
}

func (l heldLayer) Digest() (v1.Hash, error)            { return l.desc.Digest, nil }
func (l heldLayer) Size() (int64, error)                { return l.desc.Size, nil }
func (l heldLayer) MediaType() (types.MediaType, error) { return l.desc.MediaType, nil }
func (l heldLayer) Compressed() (io.ReadCloser, error)  { return l.held.blob(l.desc.Digest.String()) }
func (l heldLayer) Descriptor() (*v1.Descriptor, error) { return &l.desc, nil }

// Save writes images as a tar archive that is an OCI layout and, by its second description, what `docker load` takes. An image that is
// given by a name has that name in it, else all of its names.
func (s *Store) Save(ctx context.Context, w io.Writer, refs ...string) error {
	a := archiver{ctx: ctx, w: tar.NewWriter(w), have: map[string]bool{}, list: map[string]int{}}
	for _, ref := range refs {
		if err := a.image(s, ref); err != nil {
			return fmt.Errorf("save %s: %w", ref, err)
		}
	}
	if err := a.finish(); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// archiver writes an archive of images.
type archiver struct {
	ctx    context.Context
	w      *tar.Writer
	have   map[string]bool // blobs that it holds
	index  v1.IndexManifest
	docker []dockerManifest
	list   map[string]int // places in docker, by the image's id
}

func (a *archiver) image(s *Store, ref string) error {
	h, err := s.Hold(a.ctx, ref)
	if err != nil {
		return err
	}
	defer h.Close()
	names := h.entry.Names
	if n, err := ParseName(ref); err == nil && slices.Contains(names, n.String()) {
		names = []string{n.String()}
	}
	var layers []string
	man := v1.Descriptor{Digest: v1.Hash{Algorithm: "sha256", Hex: strings.TrimPrefix(h.entry.Manifest, "sha256:")}}
	for _, d := range append(slices.Clone(h.man.Layers), h.man.Config, man) {
		if err := a.blob(h, d.Digest.String()); err != nil {
			return err
		}
	}
	for _, d := range h.man.Layers {
		layers = append(layers, blobName(d.Digest))
	}
	raw, err := h.small(h.entry.Manifest)
	if err != nil {
		return err
	}
	man.Size = int64(len(raw))
	if man.MediaType, err = (heldCore{h}).MediaType(); err != nil {
		return err
	}
	i, known := a.list[h.entry.ID]
	if !known {
		i = len(a.docker)
		a.list[h.entry.ID] = i
		a.docker = append(a.docker, dockerManifest{Config: blobName(h.man.Config.Digest), RepoTags: []string{}, Layers: layers})
	}
	for _, name := range names {
		a.docker[i].RepoTags = union(a.docker[i].RepoTags, shortNames([]string{name}))
		d := man
		n, err := ParseName(name)
		if err != nil {
			return err
		}
		d.Annotations = map[string]string{annotationName: name, annotationRef: n.Tag}
		a.index.Manifests = append(a.index.Manifests, d)
	}
	if len(names) == 0 && !known {
		a.index.Manifests = append(a.index.Manifests, man)
	}
	return nil
}

// blob copies a blob into the archive, if it is not in it.
func (a *archiver) blob(h *Held, digest string) error {
	place := blobPlace(digest)
	if a.have[place] {
		return nil
	}
	a.have[place] = true
	f, err := h.blob(digest)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if err := a.w.WriteHeader(&tar.Header{Name: place, Mode: 0o444, Size: fi.Size(), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	_, err = io.Copy(a.w, ctxReader{a.ctx, f})
	return err
}

func (a *archiver) finish() error {
	a.index.SchemaVersion, a.index.MediaType = 2, types.OCIImageIndex
	for _, m := range []struct {
		name string
		data any
	}{
		{"oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"}}, {fileIndex, a.index}, {fileManifest, a.docker},
	} {
		b, err := json.Marshal(m.data)
		if err != nil {
			return err
		}
		err = a.w.WriteHeader(&tar.Header{Name: m.name, Mode: 0o444, Size: int64(len(b)), Typeflag: tar.TypeReg})
		if err == nil {
			_, err = a.w.Write(b)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(a.ctx.Err(), a.w.Close())
}
