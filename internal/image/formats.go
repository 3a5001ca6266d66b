package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Names in a source.
const (
	fileManifest = "manifest.json" // of `docker save`
	fileIndex    = "index.json"    // of an OCI layout
)

// Bounds of what a source may describe.
const (
	maxImages     = 1000
	maxIndexDepth = 8
)

// The annotations by which an index names its images.
const (
	annotationName  = "io.containerd.image.name"
	annotationRef   = "org.opencontainers.image.ref.name"
	annotationProof = "vnd.docker.reference.type" // marks an attestation, which is no image
)

// findImages lists the images of a source. Recent `docker save` writes both descriptions; its own is the simpler one.
func findImages(c container) ([]found, error) {
	if c.has(fileManifest) {
		b, err := readFile(c, fileManifest, maxManifest)
		if err != nil {
			return nil, err
		}
		return dockerImages(c, b)
	}
	b, err := readFile(c, fileIndex, maxManifest)
	if err != nil {
		return nil, err
	}
	return layoutImages(c, b)
}

// dockerManifest is one image in the list of `docker save`.
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// parseDocker reads the list of images of `docker save`.
func parseDocker(b []byte) ([]dockerManifest, error) {
	var list []dockerManifest
	if err := json.Unmarshal(b, &list); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", fileManifest, ErrFormat, err)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s: %w: it lists no image", fileManifest, ErrFormat)
	}
	if len(list) > maxImages {
		return nil, fmt.Errorf("%s: more than %d images: %w", fileManifest, maxImages, ErrTooLarge)
	}
	for i, m := range list {
		if m.Config == "" {
			return nil, fmt.Errorf("%s: %w: image %d has no configuration", fileManifest, ErrFormat, i+1)
		}
		var err error
		if list[i].RepoTags, err = fullNames(m.RepoTags); err != nil {
			return nil, fmt.Errorf("%s: %w", fileManifest, err)
		}
	}
	return list, nil
}

func dockerImages(c container, b []byte) ([]found, error) {
	list, err := parseDocker(b)
	if err != nil {
		return nil, err
	}
	imgs := make([]found, 0, len(list))
	for _, m := range list {
		raw, err := readFile(c, m.Config, maxConfig)
		if err != nil {
			return nil, err
		}
		// The configuration's file is called by its digest, with or without an ending.
		base := strings.TrimSuffix(m.Config[strings.LastIndexByte(m.Config, '/')+1:], ".json")
		if got := hashBytes(raw).Hex; len(base) == 64 && hexPattern().MatchString(base) && base != got {
			return nil, fmt.Errorf("configuration %s: %w: it is sha256:%s", quoteName(m.Config), ErrDigest, got)
		}
		conf, err := parseConfig(raw)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", quoteName(m.Config), err)
		}
		imgs = append(imgs, found{names: m.RepoTags, config: conf, rawConf: raw, layers: m.Layers})
	}
	return imgs, nil
}

// parseConfig reads an image's configuration.
func parseConfig(b []byte) (*v1.ConfigFile, error) {
	conf := &v1.ConfigFile{}
	if err := json.Unmarshal(b, conf); err != nil {
		return nil, fmt.Errorf("configuration: %w: %w", ErrFormat, err)
	}
	for _, d := range conf.RootFS.DiffIDs {
		if !digPattern().MatchString(d.String()) {
			return nil, fmt.Errorf("configuration: %w: %s is no digest of a layer", ErrFormat, quoteName(d.String()))
		}
	}
	return conf, nil
}

// candidate is a manifest that an index offers.
type candidate struct {
	desc v1.Descriptor
	name string // the name of the index's entry that led to it
}

// layoutImages lists the images of an OCI layout. What an index offers for several platforms under one name is one image: that
// for this host.
func layoutImages(c container, b []byte) ([]found, error) {
	l := layoutReader{c: c, seen: map[v1.Hash]bool{}}
	if err := l.walk(b, "", 0); err != nil {
		return nil, err
	}
	if len(l.all) == 0 {
		return nil, fmt.Errorf("%w: the layout's index lists no image", ErrFormat)
	}
	var imgs []found
	var others []string
	taken := map[v1.Hash]int{}
	for _, cand := range l.all {
		if p := cand.desc.Platform; p != nil && !runsHere(p) {
			others = append(others, p.String())
			continue
		}
		names, err := layoutNames(cand.name)
		if err != nil {
			return nil, err
		}
		// One manifest may stand under several names.
		if i, ok := taken[cand.desc.Digest]; ok {
			imgs[i].names = append(imgs[i].names, names...)
			continue
		}
		im, err := l.image(cand.desc)
		if err != nil {
			return nil, err
		}
		if err := checkPlatform(im.config); err != nil && len(l.all) > 1 {
			others = append(others, im.config.OS+"/"+im.config.Architecture)
			continue
		}
		im.names = names
		taken[cand.desc.Digest] = len(imgs)
		imgs = append(imgs, im)
	}
	if len(imgs) == 0 {
		slices.Sort(others)
		return nil, fmt.Errorf("it holds nothing for linux/%s, only %s", runtime.GOARCH, strings.Join(slices.Compact(others), ", "))
	}
	return imgs, nil
}

func runsHere(p *v1.Platform) bool {
	return (p.OS == "" || p.OS == "linux") && (p.Architecture == "" || p.Architecture == runtime.GOARCH)
}

// layoutNames makes a name of an annotation. One without a repository, such as "latest", names no image.
func layoutNames(ref string) ([]string, error) {
	if !strings.ContainsAny(ref, ":/") {
		return nil, nil
	}
	return fullNames([]string{ref})
}

// layoutReader goes through the indexes of a layout.
type layoutReader struct {
	c    container
	seen map[v1.Hash]bool // indexes: one that holds itself is malformed, and one that is held twice adds nothing
	all  []candidate
}

// parseIndex reads one index.
func parseIndex(b []byte) (*v1.IndexManifest, error) {
	idx := &v1.IndexManifest{}
	if err := json.Unmarshal(b, idx); err != nil {
		return nil, fmt.Errorf("index: %w: %w", ErrFormat, err)
	}
	for _, d := range idx.Manifests {
		if !digPattern().MatchString(d.Digest.String()) {
			return nil, fmt.Errorf("index: %w: %s is no digest", ErrFormat, quoteName(d.Digest.String()))
		}
	}
	return idx, nil
}

func (l *layoutReader) walk(b []byte, name string, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("indexes nest more than %d deep: %w", maxIndexDepth, ErrTooLarge)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return err
	}
	for _, d := range idx.Manifests {
		if len(l.all)+len(l.seen) >= maxImages {
			return fmt.Errorf("more than %d manifests: %w", maxImages, ErrTooLarge)
		}
		if d.Annotations[annotationProof] != "" || d.Platform != nil && d.Platform.OS == "unknown" {
			continue
		}
		n := name
		if v := d.Annotations[annotationName]; v != "" {
			n = v
		} else if v := d.Annotations[annotationRef]; v != "" && n == "" {
			n = v
		}
		switch {
		case d.MediaType.IsIndex():
			if l.seen[d.Digest] {
				continue
			}
			l.seen[d.Digest] = true
			sub, err := l.blob(d, maxManifest)
			if err != nil {
				return err
			}
			if err := l.walk(sub, n, depth+1); err != nil {
				return err
			}
		case d.MediaType.IsImage() || d.MediaType == "":
			l.all = append(l.all, candidate{d, n})
		}
	}
	return nil
}

// blobName is where a layout keeps a blob.
func blobName(h v1.Hash) string { return "blobs/sha256/" + h.Hex }

// blob reads a small blob and checks it.
func (l *layoutReader) blob(d v1.Descriptor, limit int64) ([]byte, error) {
	b, err := readFile(l.c, blobName(d.Digest), limit)
	if err != nil {
		return nil, err
	}
	if got := hashBytes(b); got != d.Digest {
		return nil, fmt.Errorf("blob %s: %w: it is %s", d.Digest, ErrDigest, got)
	}
	return b, nil
}

func (l *layoutReader) image(d v1.Descriptor) (found, error) {
	raw, err := l.blob(d, maxManifest)
	if err != nil {
		return found{}, err
	}
	m, err := parseManifest(raw)
	if err != nil {
		return found{}, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	im := found{manifest: m, rawMan: raw}
	if im.rawConf, err = l.blob(m.Config, maxConfig); err != nil {
		return found{}, err
	}
	if im.config, err = parseConfig(im.rawConf); err != nil {
		return found{}, err
	}
	for _, layer := range m.Layers {
		im.layers = append(im.layers, blobName(layer.Digest))
	}
	return im, nil
}

// parseManifest reads the manifest of one image.
func parseManifest(b []byte) (*v1.Manifest, error) {
	m := &v1.Manifest{}
	if err := json.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if m.SchemaVersion != 2 {
		return nil, fmt.Errorf("%w: schema version %d is not supported", ErrFormat, m.SchemaVersion)
	}
	switch m.Config.MediaType {
	case types.OCIConfigJSON, types.DockerConfigJSON, "":
	default:
		return nil, fmt.Errorf("%w: it is an artifact of type %q", ErrFormat, m.Config.MediaType)
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if !digPattern().MatchString(d.Digest.String()) {
			return nil, errors.Join(ErrFormat, fmt.Errorf("%s is no digest", quoteName(d.Digest.String())))
		}
	}
	return m, nil
}
