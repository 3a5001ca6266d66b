package image

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Import makes an image of one layer from a root file system: a directory, or a tar archive, which may be compressed. The name
// may be empty.
func (s *Store) Import(ctx context.Context, src Source, ref string, opts Options) (Image, error) {
	img, err := s.importRootfs(ctx, src, ref, opts, time.Now().UTC(), "")
	if err != nil {
		return Image{}, fmt.Errorf("import %s: %w", src, err)
	}
	return img, nil
}

func (s *Store) importRootfs(ctx context.Context, src Source, ref string, opts Options, created time.Time, source string) (Image, error) {
	var names []string
	if ref != "" {
		names = []string{ref}
	}
	names, err := fullNames(names)
	if err != nil {
		return Image{}, err
	}
	st, err := s.newStage(ctx)
	if err != nil {
		return Image{}, err
	}
	defer st.close()
	in, closeIn, err := openRootfs(ctx, src)
	if err != nil {
		return Image{}, err
	}
	defer closeIn()
	// What the layer's digest is shows only when it is read, so the id of the file system is not known before either.
	b := newBuilder(st, opts, nil, false)
	defer b.close()
	if err := b.add(ctx, in, layerSpec{}); err != nil {
		return Image{}, err
	}
	if len(b.t.root.Children) == 0 {
		return Image{}, fmt.Errorf("%w: it holds no files", ErrFormat)
	}
	for _, name := range []string{fileManifest, fileIndex} {
		if b.t.root.Children[name] != nil && (b.t.root.Children["blobs"] != nil || b.t.root.Children["repositories"] != nil) {
			return Image{}, fmt.Errorf("%w of a root file system: it is an archive of images, which load takes", ErrFormat)
		}
	}
	return st.commitBuilt(ctx, b, entry{Names: names, Created: created, Source: source}, ConfigFile{
		ConfigFile: v1.ConfigFile{
			Architecture: runtime.GOARCH,
			OS:           "linux",
			History:      []v1.History{{Created: v1.Time{Time: created}, CreatedBy: "coffer import", Comment: opts.Comment}},
		},
		Config: opts.Config,
	})
}

// openRootfs opens a root file system as a tar stream.
func openRootfs(ctx context.Context, src Source) (io.Reader, func(), error) {
	if src.Path != "" {
		fi, err := os.Stat(src.Path)
		if err != nil {
			return nil, nil, err
		}
		if fi.IsDir() {
			return tarDir(ctx, src.Path)
		}
		if !fi.Mode().IsRegular() && fi.Mode()&os.ModeNamedPipe == 0 {
			return nil, nil, fmt.Errorf("%w: it is neither a file nor a directory", ErrFormat)
		}
	}
	return openStream(ctx, src)
}

// BaseName is the name of the image that comes with the program.
const BaseName = "base"

// InstallBaseArg is the hidden command of the coffer program that puts it into a home.
const InstallBaseArg = "_base"

// EnsureBase sees to it that the image [BaseName] is the one made of the embedded archive with this digest. It costs a look at
// the index when it is; open is called only when it is not.
func (s *Store) EnsureBase(ctx context.Context, digest string, open func() (io.ReadCloser, error)) (Image, error) {
	name, err := ParseName(BaseName)
	if err != nil {
		return Image{}, err
	}
	idx, err := s.readIndex()
	if err != nil {
		return Image{}, err
	}
	if e, err := idx.find(name.String()); err == nil && e.Source == digest {
		if img, err := s.image(e); err == nil {
			return img, nil
		}
		// It is damaged, and made anew.
	}
	r, err := open()
	if err != nil {
		return Image{}, fmt.Errorf("open the embedded image: %w", err)
	}
	defer r.Close()
	img, err := s.importRootfs(ctx, Source{Reader: r}, BaseName, Options{
		Config: Config{Config: v1.Config{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"/bin/sh"},
		}},
		Comment: "the image that comes with Coffer",
	}, time.Unix(0, 0).UTC(), digest)
	if err != nil {
		return Image{}, fmt.Errorf("make the image %s: %w", BaseName, err)
	}
	return img, nil
}
