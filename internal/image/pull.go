package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coffer-box/coffer/internal/disk"
)

// Errors of a [Remote].
var (
	// ErrNotOffered says that the registry has no such image, or shows it to others only.
	ErrNotOffered = errors.New("the registry has no such image")
	// ErrDenied says that the registry wants other credentials.
	ErrDenied = errors.New("access denied")
)

// Remote is one repository of a registry, as far as a pull needs it. It tries again by itself what may go better a second time. Its
// methods are called by several goroutines at once.
type Remote interface {
	// Digest tells what a tag stands for.
	Digest(ctx context.Context, tag string) (v1.Hash, error)
	// Manifest returns the manifest or index with a digest, of at most limit bytes. They are not checked.
	Manifest(ctx context.Context, digest v1.Hash, limit int64) ([]byte, error)
	// Blob returns what a blob holds from an offset on, or from an earlier one where the registry can only begin there.
	Blob(ctx context.Context, digest v1.Hash, offset int64) (body io.ReadCloser, start int64, err error)
}

// What a pull says of a layer.
const (
	StatusWaiting     = "waiting"
	StatusExists      = "exists" // the store has it
	StatusDownloading = "downloading"
	StatusRetrying    = "retrying"
	StatusUnpacking   = "unpacking"
	StatusDone        = "done"
	// The last step, without a layer, is StatusExists, StatusPulled or StatusFailed.
	StatusPulled = "pulled"
	StatusFailed = "failed"
)

// Progress is one step of a pull.
type Progress struct {
	Layer   string `json:"layer,omitempty"` // digest; empty: the image
	Status  string `json:"status"`
	Current int64  `json:"current,omitempty"` // bytes, of those that the registry has
	Total   int64  `json:"total,omitempty"`
	Error   string `json:"error,omitempty"` // why it is tried again
}

// PullOptions are the choices of a pull. The zero value is useful.
type PullOptions struct {
	Limits   Limits
	Platform Platform // zero: this host's
	Parallel int      // layers that are fetched at once; 0: 3, as with Docker
	// Progress is called for every step, by one goroutine at a time.
	Progress func(Progress)
}

const defaultParallel = 3

func (o PullOptions) withDefaults() PullOptions {
	o.Limits = o.Limits.withDefaults()
	if o.Platform == (Platform{}) {
		o.Platform = Host()
	}
	if o.Parallel <= 0 {
		o.Parallel = defaultParallel
	}
	return o
}

// Pull takes an image from a registry, if the store has not what the registry has under that name now. It tells whether anything
// changed. Nothing is used before its digest has been checked. What a pull that fails or is killed has fetched is kept for the next.
func (s *Store) Pull(ctx context.Context, name Name, r Remote, opts PullOptions) (img Image, changed bool, err error) {
	opts = opts.withDefaults()
	if opts.Progress != nil {
		defer func() {
			last := Progress{Status: StatusExists}
			if err != nil {
				last.Status = StatusFailed
			} else if changed {
				last.Status = StatusPulled
			}
			opts.Progress(last)
		}()
	}
	var digest v1.Hash
	if name.Digest != "" {
		digest, err = v1.NewHash(name.Digest)
	} else {
		digest, err = r.Digest(ctx, name.Tag)
	}
	if err != nil {
		return Image{}, false, err
	}
	if img, ok := s.pulled(name, digest, opts.Platform); ok {
		return img, false, nil
	}
	// Who comes second finds everything there.
	unlock, err := s.lockPull(ctx, digest)
	if err != nil {
		return Image{}, false, err
	}
	defer unlock()
	if img, ok := s.pulled(name, digest, opts.Platform); ok {
		return img, false, nil
	}
	imgs, err := s.pull(ctx, name, digest, r, opts)
	if err != nil {
		return Image{}, false, err
	}
	return imgs[0], true, nil
}

// pulled returns the image that a registry has given by this name and digest, if the store has it still, by that name.
func (s *Store) pulled(name Name, digest v1.Hash, p Platform) (Image, bool) {
	idx, err := s.readIndex()
	if err != nil {
		return Image{}, false
	}
	for i := range idx.Images {
		e := &idx.Images[i]
		if !slices.Contains(e.Digests, name.canonical(digest.String())) || name.Digest == "" && !slices.Contains(e.Names, name.tagged()) {
			continue
		}
		if img, err := s.image(e); err == nil && p.Check(&img.Config) == nil {
			return img, true
		}
	}
	return Image{}, false
}

// lockPull waits for a pull of the same thing.
func (s *Store) lockPull(ctx context.Context, digest v1.Hash) (done func(), err error) {
	path := s.path("pull", digest.Hex+".lock")
	unlock, err := disk.Lock(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("wait for another pull: %w", err)
	}
	return func() {
		// One who waits for it by now gets a lock that nobody else looks for. That costs a second look, no more.
		_ = os.Remove(path)
		unlock()
	}, nil
}

func (s *Store) pull(ctx context.Context, name Name, digest v1.Hash, r Remote, opts PullOptions) ([]Image, error) {
	raw, err := r.Manifest(ctx, digest, maxManifest)
	if err != nil {
		return nil, err
	}
	if got := hashBytes(raw); got != digest {
		return nil, fmt.Errorf("manifest %s: %w: it is %s", digest, ErrDigest, got)
	}
	d, err := choose(ctx, raw, digest, r, opts.Platform)
	if err != nil {
		return nil, err
	}
	st, err := s.newStage(ctx)
	if err != nil {
		return nil, err
	}
	defer st.close()
	var e entry
	fresh := false
	for round := range 2 {
		f := newFetcher(st, r, opts)
		f.fresh = fresh
		e, err = s.loadOne(ctx, st, f, d, Options{Limits: opts.Limits}, opts.Platform)
		f.stop()
		again := round == 0 && err != nil && ctx.Err() == nil && f.distrust()
		f.close()
		if !again {
			break
		}
		fresh = f.misled
		st.forget()
	}
	if disk.NoRoom(err) {
		err = fmt.Errorf("%w: make room (coffer prune) and pull again; what has come is kept", err)
	}
	if err != nil {
		return nil, err
	}
	e.Names = nil
	if name.Digest == "" { // beside a digest, a tag is only a word: the registry was not asked what it stands for
		e.Names = []string{name.tagged()}
	}
	e.Digests = []string{name.canonical(digest.String())}
	return st.commit(ctx, []entry{e})
}

// choose reads what describes the image of a manifest, or the one of an index that is for a platform.
func choose(ctx context.Context, raw []byte, digest v1.Hash, r Remote, p Platform) (description, error) {
	configs := map[v1.Hash]bool{}
	have, meta := map[v1.Hash][]byte{digest: raw}, &budget{defaultMetadata}
	note := func(b []byte) {
		// What a manifest calls its configuration is the one thing here that is no manifest.
		if m, err := parseManifest(b); err == nil {
			configs[m.Config.Digest] = true
		}
	}
	note(raw)
	l := newLayoutReader(func(h v1.Hash, limit int64) (b []byte, err error) {
		if b, ok := have[h]; ok {
			return b, nil
		}
		if configs[h] {
			b, err = readRemote(ctx, r, h, limit)
		} else if b, err = r.Manifest(ctx, h, limit); err == nil {
			note(b)
		}
		if err == nil {
			have[h], err = b, meta.take(len(b))
		}
		return b, err
	}, p)
	l.nameless = true
	if !isIndex(raw) {
		d, err := l.image(digest)
		if err != nil {
			return d, err
		}
		return d, p.Check(d.config)
	}
	imgs, err := l.images(raw)
	if err != nil {
		return description{}, err
	}
	return imgs[0].read()
}

// isIndex tells an index from a manifest by what it holds: what its sender calls it need not be true.
func isIndex(raw []byte) bool {
	idx, err := parseIndex(raw)
	return err == nil && (idx.MediaType.IsIndex() || idx.MediaType == "" && len(idx.Manifests) > 0)
}

// configTime is how long a configuration may take, which is small: one that came byte by byte would never stall.
const configTime = 3 * time.Minute

func readRemote(ctx context.Context, r Remote, h v1.Hash, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, configTime)
	defer cancel()
	body, start, err := watched(ctx, r, h, 0)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if start != 0 {
		return nil, fmt.Errorf("blob %s: the registry sends it from byte %d on", h, start)
	}
	b, err := readAllBounded(body, limit)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", h, err)
	}
	return b, nil
}

// sweepPulls removes what pulls that are not at work have left. The caller holds the store's lock.
func (s *Store) sweepPulls() (freed int64) {
	entries, err := os.ReadDir(s.path("pull"))
	if err != nil {
		return 0
	}
	for _, e := range entries {
		path := s.path("pull", e.Name())
		if !strings.HasSuffix(path, ".part") && !strings.HasSuffix(path, ".lock") {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if free, err := disk.TryLock(f); err == nil && free {
			freed += s.discard(path)
		}
		f.Close()
	}
	return freed
}

var errStalled = errors.New("nothing came for a minute")
