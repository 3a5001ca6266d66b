package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coffer-box/coffer/internal/disk"
)

const (
	// maxFruitless is how often in a row a download is gone on with that has brought nothing.
	maxFruitless = 5
	// stall is how long a download may bring nothing before it is cut off and gone on with.
	stall = time.Minute
	// retryWait is the pause before the first of those.
	retryWait = 500 * time.Millisecond
)

// fetcher is a container whose layers come from a registry, several at once, while the first are unpacked.
type fetcher struct {
	st     *stage
	remote Remote
	opts   PullOptions
	fresh  bool // what earlier pulls have left is not gone on with
	misled bool // what an earlier pull had left was wrong: distrust has seen it

	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex // for progress
	layers map[v1.Hash]*download
}

func newFetcher(st *stage, r Remote, opts PullOptions) *fetcher {
	return &fetcher{st: st, remote: r, opts: opts, cancel: func() {}, layers: map[v1.Hash]*download{}}
}

func (f *fetcher) tell(p Progress) {
	if f.opts.Progress == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opts.Progress(p)
}

// begin implements layerSource: it begins to fetch the layers, the lowest first, and returns at once.
func (f *fetcher) begin(ctx context.Context, d description) error {
	layers := d.manifest.Layers
	if err := f.check(layers); err != nil {
		return err
	}
	ctx, f.cancel = context.WithCancel(ctx)
	var all []*download
	for _, d := range layers {
		if f.layers[d.Digest] == nil {
			l := newDownload(d)
			f.layers[d.Digest] = l
			all = append(all, l)
			f.tell(Progress{Layer: d.Digest.String(), Status: StatusWaiting, Total: d.Size})
		}
	}
	slots := make(chan struct{}, f.opts.Parallel)
	f.wg.Go(func() {
		for _, l := range all {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				l.end(ctx.Err())
				continue
			}
			f.wg.Go(func() {
				defer func() { <-slots }()
				l.end(f.fetch(ctx, l))
			})
		}
	})
	return nil
}

// check refuses what would fill the disk before it is unpacked.
func (f *fetcher) check(layers []v1.Descriptor) error {
	if len(layers) > f.opts.Limits.Layers {
		return fmt.Errorf("more than %d layers: %w", f.opts.Limits.Layers, ErrTooLarge)
	}
	left := f.opts.Limits.Bytes
	for _, d := range layers {
		if d.Size < 0 {
			return fmt.Errorf("layer %s has a size of %d: %w", d.Digest, d.Size, ErrFormat)
		}
		if left -= d.Size; left < 0 {
			return fmt.Errorf("its layers have more than %d bytes: %w", f.opts.Limits.Bytes, ErrTooLarge)
		}
	}
	return nil
}

// stop ends what is still being fetched, and waits for it.
func (f *fetcher) stop() {
	f.cancel()
	f.wg.Wait()
}

// close lets go of the files. It comes after stop.
func (f *fetcher) close() {
	for _, l := range f.layers {
		if l.file != nil {
			l.file.Close()
		}
	}
}

// layer implements layerSource: what is read of it waits for what has not come yet.
func (f *fetcher) layer(ctx context.Context, d description, i int) (io.ReadCloser, func() error, error) {
	l := f.layers[d.manifest.Layers[i].Digest]
	return &downloadReader{ctx: ctx, f: f, l: l}, func() error { return l.wait(ctx) }, nil
}

// distrust removes the blobs from the store that this pull has found there and that are not what they should be. It tells whether another
// try may go better: if there were any, or if what an earlier pull had left was of no use. It is called when something is not right and
// nothing is being fetched any more.
func (f *fetcher) distrust() (again bool) {
	for digest, l := range f.layers {
		if l.resumed && errors.Is(l.err, ErrDigest) {
			// What is left of other layers may be no better, and was not looked at yet.
			again, f.misled = true, true
		}
		if !l.old {
			continue
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, io.NewSectionReader(l.file, 0, l.desc.Size)); err != nil || sumHash(sum) == digest {
			continue // one that cannot be read now is not known to be wrong
		}
		f.st.s.log.Warn("a damaged layer is fetched again", "layer", digest)
		again = os.Remove(f.st.s.path(blobPlace(digest.String()))) == nil || again
	}
	return again
}

// download is one blob on its way.
type download struct {
	desc v1.Descriptor

	mu   sync.Mutex
	more chan struct{} // closed when there is more than there was
	file *os.File      // nil until there is anything
	n    int64         // bytes of it that can be read
	old  bool          // it was in the store
	// resumed says that an earlier pull has fetched the beginning.
	resumed bool
	done    bool
	err     error
}

func newDownload(d v1.Descriptor) *download { return &download{desc: d, more: make(chan struct{})} }

// set notes how far the download has come.
func (l *download) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.more)
	l.more = make(chan struct{})
}

func (l *download) end(err error) { l.set(func() { l.done, l.err = true, err }) }

func (l *download) look() (file *os.File, n int64, more <-chan struct{}, done bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.file, l.n, l.more, l.done, l.err
}

func (l *download) wait(ctx context.Context) error {
	for {
		_, _, more, done, err := l.look()
		if done {
			return err
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// downloadReader reads a download from its beginning, and waits for what has not come yet.
type downloadReader struct {
	ctx  context.Context
	f    *fetcher
	l    *download
	off  int64
	told int64
}

func (r *downloadReader) Read(p []byte) (int, error) {
	for {
		file, n, more, done, err := r.l.look()
		switch {
		case r.off < n:
			got, err := file.ReadAt(p[:min(int64(len(p)), n-r.off)], r.off)
			r.off += int64(got)
			if r.off-r.told >= progressStep {
				r.told = r.off
				r.f.tell(Progress{Layer: r.l.desc.Digest.String(), Status: StatusUnpacking, Current: r.off, Total: r.l.desc.Size})
			}
			return got, err
		case done && err != nil:
			return 0, err
		case done:
			return 0, io.EOF
		}
		select {
		case <-more:
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
}

func (r *downloadReader) Close() error {
	if r.off == r.l.desc.Size {
		r.f.tell(Progress{Layer: r.l.desc.Digest.String(), Status: StatusDone, Current: r.off, Total: r.off})
	}
	return nil
}

// progressStep is how many bytes are worth telling of.
const progressStep = 512 << 10

// fetch stages one blob: from the store, or from the registry, where it goes on with what an earlier pull has left.
func (f *fetcher) fetch(ctx context.Context, l *download) error {
	place := blobPlace(l.desc.Digest.String())
	for {
		if have, err := f.have(l, place); have || err != nil {
			return err
		}
		part, err := f.lockPart(ctx, l.desc.Digest)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.desc.Digest, err)
		}
		if part == nil {
			continue // somebody else has just fetched it
		}
		// With the file its lock is given back; who reads from it has it open once more.
		defer part.Close()
		err = f.fetchTo(ctx, l, part)
		if err == nil {
			err = f.publish(part, place)
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.desc.Digest, err)
		}
		return nil
	}
}

// have takes a blob that the store has.
func (f *fetcher) have(l *download, place string) (bool, error) {
	file, err := os.Open(f.st.s.path(place))
	if err != nil {
		return false, nil
	}
	fi, err := file.Stat()
	if err != nil || fi.Size() != l.desc.Size || !f.st.share(place) {
		// Damaged, and so fetched again; or removed at this moment.
		file.Close()
		return false, err
	}
	l.set(func() { l.file, l.n, l.old = file, fi.Size(), true })
	f.tell(Progress{Layer: l.desc.Digest.String(), Status: StatusExists, Total: l.desc.Size})
	return true, nil
}

// lockPart opens the file that a blob is fetched into, as the only one who does. It returns nil when another one has been at it and it
// is in its place by now, or given up.
func (f *fetcher) lockPart(ctx context.Context, digest v1.Hash) (*os.File, error) {
	path := f.st.s.path("pull", digest.Hex+".part")
	part, err := disk.OpenLocked(ctx, path)
	if err != nil {
		return nil, err
	}
	mine, err := part.Stat()
	if err == nil {
		var there os.FileInfo
		if there, err = os.Stat(path); err == nil && os.SameFile(mine, there) {
			return part, nil
		}
	}
	part.Close()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return nil, nil
}

// fetchTo fetches a blob into a file that may hold the beginning of it, and checks it.
func (f *fetcher) fetchTo(ctx context.Context, l *download, part *os.File) error {
	file, err := os.Open(part.Name())
	if err != nil {
		return err
	}
	l.set(func() { l.file = file })
	if f.fresh {
		if err := part.Truncate(0); err != nil {
			return err
		}
	}
	sum := sha256.New()
	n, err := io.Copy(sum, io.NewSectionReader(part, 0, l.desc.Size))
	if err != nil {
		return fmt.Errorf("read what came before: %w", err)
	}
	l.set(func() { l.n, l.resumed = n, n > 0 })
	for fruitless := 0; n < l.desc.Size; {
		got, err := f.fetchOnce(ctx, l, part, sum, n)
		n += got
		if n == l.desc.Size {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var cut *cutError
		if !errors.As(err, &cut) {
			return err
		}
		if fruitless++; got > 0 {
			fruitless = 0
		}
		if fruitless >= maxFruitless {
			return fmt.Errorf("%w; tried %d times", err, fruitless)
		}
		f.tell(Progress{Layer: l.desc.Digest.String(), Status: StatusRetrying, Current: n, Total: l.desc.Size, Error: err.Error()})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryWait << fruitless):
		}
	}
	if got := sumHash(sum); got != l.desc.Digest {
		// Gone on with, it would never be right.
		return errors.Join(fmt.Errorf("%w: what came is %s", ErrDigest, got), os.Remove(part.Name()))
	}
	// A manifest that lied about the size may have left more.
	return errors.Join(part.Truncate(l.desc.Size), part.Sync())
}

// cutError is the end of a download before its end.
type cutError struct{ error }

func (e *cutError) Unwrap() error { return e.error }

// watched opens what comes from a registry and cuts it off when nothing more does. The errors of the body say so.
func watched(ctx context.Context, r Remote, h v1.Hash, from int64) (body io.ReadCloser, start int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	body, start, err = r.Blob(ctx, h, from)
	if err != nil {
		cancel(nil)
		return nil, 0, err
	}
	w := &watchedBody{ReadCloser: body, ctx: ctx, cancel: cancel}
	w.watch = time.AfterFunc(stall, func() { cancel(errStalled); body.Close() })
	return w, start, nil
}

type watchedBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	watch  *time.Timer
}

// Read implements [io.Reader].
func (w *watchedBody) Read(p []byte) (int, error) {
	n, err := w.ReadCloser.Read(p)
	w.watch.Reset(stall)
	if err != nil && !errors.Is(err, io.EOF) && errors.Is(context.Cause(w.ctx), errStalled) {
		err = errStalled
	}
	return n, err
}

// Close implements [io.Closer].
func (w *watchedBody) Close() error {
	w.watch.Stop()
	w.cancel(nil)
	return w.ReadCloser.Close()
}

// fetchOnce goes on with a download and returns the number of new bytes.
func (f *fetcher) fetchOnce(ctx context.Context, l *download, part *os.File, sum hash.Hash, from int64) (int64, error) {
	body, start, err := watched(ctx, f.remote, l.desc.Digest, from)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	cut := func(err error) error { return &cutError{fmt.Errorf("the download was cut off: %w", err)} }
	if start < 0 || start > from {
		return 0, fmt.Errorf("the registry sends it from byte %d on, byte %d was asked for", start, from)
	}
	if _, err := io.CopyN(io.Discard, body, from-start); err != nil {
		return 0, cut(err)
	}
	buf := make([]byte, 128<<10)
	told := from
	for at := from; ; {
		n, err := body.Read(buf)
		if at+int64(n) > l.desc.Size {
			return at - from, fmt.Errorf("it is larger than the %d bytes that its manifest says: %w", l.desc.Size, ErrDigest)
		}
		if n > 0 {
			if _, err := part.WriteAt(buf[:n], at); err != nil {
				return at - from, fmt.Errorf("store what came: %w", err)
			}
			sum.Write(buf[:n])
			at += int64(n)
			l.set(func() { l.n = at })
			if at-told >= progressStep || at == l.desc.Size {
				told = at
				f.tell(Progress{Layer: l.desc.Digest.String(), Status: StatusDownloading, Current: at, Total: l.desc.Size})
			}
		}
		switch {
		case errors.Is(err, io.EOF) && at < l.desc.Size:
			return at - from, cut(io.ErrUnexpectedEOF)
		case errors.Is(err, io.EOF):
			return at - from, nil
		case err != nil:
			return at - from, cut(err)
		}
	}
}

// publish gives a checked blob its place, where other pulls find it from now on, too. It is nobody's yet: if this pull comes to nothing,
// a removal or prune takes it away.
func (f *fetcher) publish(part *os.File, place string) error {
	if err := f.st.link(part.Name(), place); err != nil {
		return err
	}
	return os.Rename(part.Name(), f.st.s.path(place))
}
