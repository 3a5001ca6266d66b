package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

const (
	pullLayers    = 5
	pullLayerSize = 40 << 20 // of files, before they are packed
)

// measurePull pulls the same image from the same registry, into stores that have nothing of it, and once more when they have all.
func (s *session) measurePull(ctx context.Context) (err error) {
	host, stop, err := serveRegistry(filepath.Join(s.tmp, "registry"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	ref := host + "/bench/pull:1"
	packed, err := s.pushBig(ctx, ref)
	if err != nil {
		return fmt.Errorf("make the image to pull: %w", err)
	}
	s.rep.Versions["image to pull"] = fmt.Sprintf("%d layers with files of %d MiB from this machine's /usr, %d MiB packed (gzip)",
		pullLayers, pullLayers*pullLayerSize>>20, packed>>20)
	podman := func(args ...string) []string {
		return append(append([]string(nil), s.podman.ps[:len(s.podman.ps)-2]...), args...)
	}
	pull := map[*contender][]string{
		s.coffer: {s.o.bin, "pull", "-q", "--plain-http", ref},
		s.podman: podman("pull", "-q", "--tls-verify=false", ref),
	}
	forget := map[*contender][]string{s.coffer: {s.o.bin, "rmi", ref}, s.podman: podman("rmi", "-f", ref)}
	cs := []*contender{s.coffer, s.podman}
	if err := s.turns(ctx, "pull", "ms", s.o.n, cs, func(c *contender) (float64, []string, error) {
		// What podman leaves unwritten is not charged to the next one, nor is it to podman, who need not wait for it.
		d, err := timed(ctx, c, pull[c])
		if err == nil {
			_, err = c.do(ctx, forget[c])
		}
		return millis(d), pull[c], err
	}); err != nil {
		return err
	}
	for _, c := range cs {
		if _, err := c.do(ctx, pull[c]); err != nil {
			return err
		}
	}
	if err := s.turns(ctx, "pull again", "ms", s.o.n, cs, func(c *contender) (float64, []string, error) {
		d, err := timed(ctx, c, pull[c])
		return millis(d), pull[c], err
	}); err != nil {
		return err
	}
	// The embedded image as another contender, so that both take turns.
	base := *s.coffer
	base.name = "coffer, image base"
	return s.turns(ctx, "run of a pulled image", "ms", s.o.n, []*contender{s.coffer, &base}, func(c *contender) (float64, []string, error) {
		argv := []string{s.o.bin, "run", "--rm", ref, "true"}
		if c == &base {
			argv[3] = "base"
		}
		d, err := timed(ctx, c, argv)
		return millis(d), argv, err
	})
}

// serveRegistry starts a registry on loopback that keeps its blobs in dir.
func serveRegistry(dir string) (host string, stop func() error, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	srv := &http.Server{Handler: registry.New(registry.WithBlobHandler(registry.NewDiskBlobHandler(dir)), registry.Logger(log.New(io.Discard, "", 0)))}
	go func() { _ = srv.Serve(l) }() // its end is an error, too
	return l.Addr().String(), srv.Close, nil
}

// pushBig makes an image of files of this machine, and returns its size in the registry.
func (s *session) pushBig(ctx context.Context, ref string) (int64, error) {
	tag, err := name.NewTag(ref, name.Insecure)
	if err != nil {
		return 0, err
	}
	files := make(chan string)
	go func() {
		defer close(files)
		_ = filepath.WalkDir("/usr", func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				files <- path
			}
			return ctx.Err()
		})
	}()
	defer func() {
		for range files { // lets the walk end
		}
	}()
	var layers []v1.Layer
	for i := range pullLayers {
		path := filepath.Join(s.tmp, fmt.Sprintf("layer-%d.tar", i))
		if err := writeLayer(path, files, i == 0); err != nil {
			return 0, err
		}
		l, err := tarball.LayerFromFile(path)
		if err != nil {
			return 0, err
		}
		layers = append(layers, l)
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return 0, err
	}
	conf, err := img.ConfigFile()
	if err != nil {
		return 0, err
	}
	conf = conf.DeepCopy()
	conf.OS, conf.Architecture, conf.Config.Env = "linux", runtime.GOARCH, []string{"PATH=/bin"}
	if img, err = mutate.ConfigFile(img, conf); err != nil {
		return 0, err
	}
	var packed int64
	for _, l := range layers {
		n, err := l.Size()
		if err != nil {
			return 0, err
		}
		packed += n
	}
	return packed, remote.Write(tag, img, remote.WithContext(ctx))
}

// writeLayer fills one layer; the first has what runs.
func writeLayer(path string, files <-chan string, first bool) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	if first {
		b, err := os.ReadFile(busybox)
		if err != nil {
			return err
		}
		for _, h := range []*tar.Header{{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755, Size: int64(len(b))},
			{Typeflag: tar.TypeSymlink, Name: "bin/true", Linkname: "busybox"}} {
			if err := w.WriteHeader(h); err != nil {
				return err
			}
			if h.Size > 0 {
				if _, err := w.Write(b); err != nil {
					return err
				}
			}
		}
	}
	for size := int64(0); size < pullLayerSize; {
		from, ok := <-files
		if !ok {
			return errors.New("there are not enough files in /usr")
		}
		b, err := os.ReadFile(from)
		if err != nil || len(b) > pullLayerSize/4 {
			continue // one that is larger would be most of a layer
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(from, "/"), Mode: 0o644, Size: int64(len(b))}); err != nil {
			return err
		}
		if _, err := io.Copy(w, bytes.NewReader(b)); err != nil {
			return err
		}
		size += int64(len(b))
	}
	return w.Close()
}
