package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"testing"
)

// stalled is a stream that has sent something and then sends nothing more, until it is ended.
type stalled struct {
	io.Reader
	once       sync.Once
	waits, end chan struct{}
}

func (s *stalled) Read(p []byte) (int, error) {
	if n, err := s.Reader.Read(p); n > 0 || !errors.Is(err, io.EOF) {
		return n, err
	}
	s.once.Do(func() { close(s.waits) })
	<-s.end
	return 0, io.EOF
}

// A stream that stalls holds nobody whose context has ended.
func TestStalledStream(t *testing.T) {
	layer := layerTar(t, ent{name: "a", body: string(make([]byte, 1<<20))})
	archive := asTar(t, dockerFiles(t, map[string]testImage{"x:1": sampleImage(t, "x")}))
	for name, sent := range map[string][]byte{
		"nothing": nil, "a part": half(layer), "a compressed part": half(gz(layer)), "all but the end": layer, "a compressed whole": zst(layer),
		"an archive": archive, "a compressed archive": gz(archive),
	} {
		for what, read := range map[string]func(context.Context, *Store, Source) error{
			"load": func(ctx context.Context, s *Store, src Source) error {
				_, err := s.Load(ctx, src, Options{})
				return err
			},
			"import": func(ctx context.Context, s *Store, src Source) error {
				_, err := s.Import(ctx, src, "x", Options{})
				return err
			},
		} {
			t.Run(what+" "+name, func(t *testing.T) {
				s := newStore(t)
				ctx, cancel := context.WithCancel(t.Context())
				src := &stalled{Reader: bytes.NewReader(sent), waits: make(chan struct{}), end: make(chan struct{})}
				done := make(chan error, 1)
				go func() { done <- read(ctx, s, Source{Reader: src}) }()
				<-src.waits
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
				checkClean(t, s)
				close(src.end)
			})
		}
	}
}

// What comes through a named pipe is a stream, too.
func TestPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	layer := layerTar(t, ent{name: "a", body: "x"})
	go func() { w.Write(layer); w.Close() }()
	s := newStore(t)
	img, err := s.Import(t.Context(), Source{Path: "/proc/self/fd/" + strconv.FormatUint(uint64(r.Fd()), 10)}, "x", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if files := readGvisor(t, rootfsOf(t, s, img)); files["a"].Size != 1 {
		t.Errorf("%+v", files)
	}
}
