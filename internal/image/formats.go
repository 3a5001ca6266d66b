package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
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
	manifests := manifestsBeside(c)
	imgs := make([]found, 0, len(list))
	for _, m := range list {
		imgs = append(imgs, found{names: m.RepoTags, read: func() (description, error) {
			d, err := readDocker(c, m)
			if err != nil {
				return d, err
			}
			// With it the image keeps the digest that registries know it by.
			if read := manifests[hashBytes(d.rawConf)]; read != nil {
				if whole, err := read(); err == nil && len(whole.layers) == len(d.layers) {
					return whole, nil
				}
			}
			return d, nil
		}})
	}
	return imgs, nil
}

// manifestsBeside finds the manifests that an archive of recent `docker save` holds in its second description, by the digests of their
// configurations. What is wrong with them is none of the first description's business.
func manifestsBeside(c container) map[v1.Hash]func() (description, error) {
	out := map[v1.Hash]func() (description, error){}
	b, err := readFile(c, fileIndex, maxManifest)
	if err != nil {
		return out
	}
	l := newLayoutReader(blobsOf(c), Host())
	if l.walk(b, nil, 0) != nil {
		return out
	}
	for _, cand := range l.all {
		if raw, err := l.blob(cand.digest, maxManifest); err == nil {
			if m, err := parseManifest(raw); err == nil {
				out[m.Config.Digest] = func() (description, error) { return l.image(cand.digest) }
			}
		}
	}
	return out
}

// readDocker reads what describes one image of `docker save`.
func readDocker(c container, m dockerManifest) (description, error) {
	raw, err := readFile(c, m.Config, maxConfig)
	if err != nil {
		return description{}, err
	}
	// The configuration's file is called by its digest, with or without an ending.
	base := strings.TrimSuffix(m.Config[strings.LastIndexByte(m.Config, '/')+1:], ".json")
	if got := hashBytes(raw).Hex; idPattern().MatchString(base) && base != got {
		return description{}, fmt.Errorf("configuration %s: %w: it is sha256:%s", quoteName(m.Config), ErrDigest, got)
	}
	conf, err := parseConfig(raw)
	if err != nil {
		return description{}, fmt.Errorf("%s: %w", quoteName(m.Config), err)
	}
	return description{config: conf, rawConf: raw, layers: m.Layers}, nil
}

// configFile is a configuration in which a command may be a plain string, as some builders write it.
type configFile struct {
	ConfigFile
	Config struct {
		Config
		Cmd, Entrypoint stringList
	} `json:"config"`
}

type stringList []string

// UnmarshalJSON takes a list of strings, or one string for a list of one.
func (l *stringList) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		*l = make(stringList, 1)
		return json.Unmarshal(b, &(*l)[0])
	}
	return json.Unmarshal(b, (*[]string)(l))
}

// decodeConfig reads an image's configuration.
func decodeConfig(b []byte) (ConfigFile, error) {
	var c configFile
	if err := json.Unmarshal(b, &c); err != nil {
		return ConfigFile{}, err
	}
	conf := c.ConfigFile
	conf.Config = c.Config.Config
	conf.Config.Cmd, conf.Config.Entrypoint = c.Config.Cmd, c.Config.Entrypoint
	return conf, nil
}

// parseConfig reads and checks an image's configuration.
func parseConfig(b []byte) (*ConfigFile, error) {
	conf, err := decodeConfig(b)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w: %w", ErrFormat, err)
	}
	for _, d := range conf.RootFS.DiffIDs {
		if !digPattern().MatchString(d.String()) {
			return nil, fmt.Errorf("configuration: %w: %s is no digest of a layer", ErrFormat, quoteName(d.String()))
		}
	}
	return &conf, nil
}

// candidate is a manifest that an index offers.
type candidate struct {
	digest   v1.Hash
	names    []string // of the index's entry that led to it
	platform string   // the other one that it is for; empty: this, or unknown
}

// layoutImages lists the images of an OCI layout. What an index offers for several platforms under one name is one image: that
// for this host.
func layoutImages(c container, b []byte) ([]found, error) {
	l := newLayoutReader(blobsOf(c), Host())
	return l.images(b)
}

// images lists the images of an index.
func (l *layoutReader) images(b []byte) ([]found, error) {
	if err := l.walk(b, nil, 0); err != nil {
		return nil, err
	}
	if len(l.all) == 0 {
		return nil, fmt.Errorf("%w: its index lists no image", ErrFormat)
	}
	var imgs []found
	var others []string
	var artifacts []error
	taken := map[v1.Hash]int{}
	for _, cand := range l.all {
		if cand.platform != "" {
			others = append(others, cand.platform)
			continue
		}
		// One manifest may stand under several names.
		if i, ok := taken[cand.digest]; ok {
			imgs[i].names = slices.Concat(imgs[i].names, cand.names)
			continue
		}
		d, err := l.image(cand.digest)
		if _, ok := errors.AsType[*artifactError](err); ok {
			artifacts = append(artifacts, err)
			continue
		}
		if err != nil {
			return nil, err
		}
		if !l.want.Fits(Platform{OS: d.config.OS, Arch: d.config.Architecture}) && len(l.all) > 1 {
			others = append(others, platformName(d.config.OS, d.config.Architecture))
			continue
		}
		taken[cand.digest] = len(imgs)
		imgs = append(imgs, found{names: cand.names, read: func() (description, error) { return l.image(cand.digest) }})
	}
	if len(imgs) == 0 && len(others) == 0 {
		return nil, artifacts[0]
	}
	if len(imgs) == 0 {
		slices.Sort(others)
		return nil, fmt.Errorf("it holds nothing for %s, only %s", l.want, strings.Join(slices.Compact(others), ", "))
	}
	return imgs, nil
}

// platformName makes a source's words for a platform fit for a message.
func platformName(system, arch string) string {
	p := system + "/" + arch
	if platPattern().MatchString(p) {
		return p
	}
	return quoteName(p)
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
	read func(h v1.Hash, limit int64) ([]byte, error)
	want Platform
	// nameless ignores the names that an index gives.
	nameless bool
	path     map[v1.Hash]bool // indexes on the way to the present one, which may not hold them; two may hold a third, under two names
	seen     int              // manifests and indexes so far
	all      []candidate
}

func newLayoutReader(read func(v1.Hash, int64) ([]byte, error), want Platform) *layoutReader {
	return &layoutReader{read: read, want: want, path: map[v1.Hash]bool{}}
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

func (l *layoutReader) walk(b []byte, names []string, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("indexes nest more than %d deep: %w", maxIndexDepth, ErrTooLarge)
	}
	idx, err := parseIndex(b)
	if err != nil {
		return err
	}
	for _, d := range idx.Manifests {
		if d.Annotations[annotationProof] != "" || d.Platform != nil && d.Platform.OS == "unknown" {
			continue
		}
		if l.seen++; l.seen > maxImages {
			return fmt.Errorf("more than %d manifests: %w", maxImages, ErrTooLarge)
		}
		own := names
		if l.nameless {
			// What it calls them does not matter.
		} else if v := d.Annotations[annotationName]; v != "" {
			own, err = layoutNames(v)
		} else if v := d.Annotations[annotationRef]; v != "" && len(names) == 0 {
			own, err = layoutNames(v)
		}
		if err != nil {
			return err
		}
		switch {
		case d.MediaType.IsIndex():
			if l.path[d.Digest] {
				return fmt.Errorf("index %s holds itself: %w", d.Digest, ErrFormat)
			}
			l.path[d.Digest] = true
			sub, err := l.blob(d.Digest, maxManifest)
			if err != nil {
				return err
			}
			if err := l.walk(sub, own, depth+1); err != nil {
				return err
			}
			delete(l.path, d.Digest)
		case d.MediaType.IsImage() || d.MediaType == "":
			cand := candidate{digest: d.Digest, names: own}
			if p := d.Platform; p != nil && !l.want.Fits(Platform{p.OS, p.Architecture, p.Variant}) {
				cand.platform = platformName(p.OS, p.Architecture)
			}
			l.all = append(l.all, cand)
		}
	}
	return nil
}

// blobName is where a layout keeps a blob.
func blobName(h v1.Hash) string { return "blobs/sha256/" + h.Hex }

// blobsOf reads the blobs of a container that is a layout.
func blobsOf(c container) func(v1.Hash, int64) ([]byte, error) {
	return func(h v1.Hash, limit int64) ([]byte, error) { return readFile(c, blobName(h), limit) }
}

// blob reads a small blob and checks it.
func (l *layoutReader) blob(h v1.Hash, limit int64) ([]byte, error) {
	b, err := l.read(h, limit)
	if err != nil {
		return nil, err
	}
	if got := hashBytes(b); got != h {
		return nil, fmt.Errorf("blob %s: %w: it is %s", h, ErrDigest, got)
	}
	return b, nil
}

// image reads what describes the image of a manifest.
func (l *layoutReader) image(manifest v1.Hash) (description, error) {
	raw, err := l.blob(manifest, maxManifest)
	if err != nil {
		return description{}, err
	}
	m, err := parseManifest(raw)
	if err != nil {
		return description{}, fmt.Errorf("manifest %s: %w", manifest, err)
	}
	d := description{manifest: m, rawMan: raw}
	if d.rawConf, err = l.blob(m.Config.Digest, maxConfig); err != nil {
		return description{}, err
	}
	if d.config, err = parseConfig(d.rawConf); err != nil {
		return description{}, err
	}
	for _, layer := range m.Layers {
		d.layers = append(d.layers, blobName(layer.Digest))
	}
	return d, nil
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
	if kind := artifact(m); kind != "" {
		return nil, &artifactError{kind}
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if !digPattern().MatchString(d.Digest.String()) {
			return nil, errors.Join(ErrFormat, fmt.Errorf("%s is no digest", quoteName(d.Digest.String())))
		}
	}
	return m, nil
}

// artifactError says that a manifest describes something else than an image. Beside images, such as a signature or a list of
// parts does no harm.
type artifactError struct{ kind string }

func (e *artifactError) Error() string {
	return fmt.Sprintf("%v: it is an artifact of type %s", ErrFormat, quoteName(e.kind))
}
func (e *artifactError) Unwrap() error { return ErrFormat }

// artifact returns the type of what a manifest describes, if that is no image: by its own word, its configuration, or for want of
// any layer that could be unpacked.
func artifact(m *v1.Manifest) string {
	if m.ArtifactType != "" {
		return m.ArtifactType
	}
	if mt := m.Config.MediaType; mt != "" && !mt.IsConfig() {
		return string(mt)
	}
	for _, l := range m.Layers {
		if l.MediaType == "" || strings.Contains(string(l.MediaType), "tar") {
			return ""
		}
	}
	if len(m.Layers) == 0 {
		return ""
	}
	return string(m.Layers[0].MediaType)
}
