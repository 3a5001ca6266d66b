package image

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/coffer-box/coffer/internal/erofs"
)

// rootfsFormat is part of every root file system's id; raise it when the same layers begin to give another image file.
const rootfsFormat = "coffer rootfs 4"

// maxWindow bounds what a zstd stream may make the decoder allocate.
const maxWindow = 128 << 20

// rootfsID names the root file system that a list of layers makes, and so its topmost segment.
func rootfsID(diffIDs []v1.Hash) string {
	h := sha256.New()
	fmt.Fprintln(h, rootfsFormat)
	for _, d := range diffIDs {
		fmt.Fprintln(h, d)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// builder takes the layers of one image, lowest first, and makes blobs and a root file system of them.
type builder struct {
	st     *stage
	limits Limits
	raw    int64 // unpacked bytes so far

	// Of a root file system that is not there yet.
	t     *tree
	known int        // layers that are in its finished segments from the beginning; they are only verified and kept
	f     *os.File   // segment being written; nil between two
	below []*os.File // the finished ones, the lowest first
	head  rootfsHead // of the next segment, if it were empty

	layers []v1.Descriptor
	diffs  []v1.Hash
}

// newBuilder starts an image that begins with layers of these digests, as far as they are known, or with whole, has no others. Layers of
// which the store has a root file system are only verified and kept.
func newBuilder(st *stage, opts Options, diffs []v1.Hash, whole bool) *builder {
	b := &builder{st: st, limits: opts.Limits.withDefaults()}
	if whole && st.shareRootfs(rootfsID(diffs)) {
		return b
	}
	for n := len(diffs); n > 0; n-- {
		if b.resume(diffs[:n]) {
			return b
		}
	}
	b.t = newTree(b.limits)
	return b
}

// resume begins with a root file system of which others may be made, if the store has it.
func (b *builder) resume(diffs []v1.Hash) bool {
	id := rootfsID(diffs)
	head, err := b.st.readHead(id)
	if err != nil || !head.Closed || !b.st.shareRootfs(id) {
		return false
	}
	if err := b.load(id, head, len(diffs)); err != nil {
		b.st.s.log.Warn("what is there of a root file system is made anew", "id", id, "reason", err)
		b.close()
		b.below, b.head = nil, rootfsHead{}
		return false
	}
	b.known = len(diffs)
	return true
}

// load reads the tree of a root file system whose files are in the stage.
func (b *builder) load(id string, head rootfsHead, layers int) error {
	b.t = newTree(b.limits)
	for _, segment := range head.stack(id) {
		f, err := os.Open(b.st.place(rootfsPlace(segment)))
		if err != nil {
			return err
		}
		b.below = append(b.below, f)
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		root, err := erofs.Read(f, fi.Size())
		if err != nil {
			return fmt.Errorf("segment %.12s: %w", segment, err)
		}
		if err := b.t.resume(root, f, layers); err != nil {
			return fmt.Errorf("segment %.12s: %w", segment, err)
		}
	}
	b.head, b.t.bytes = rootfsHead{Below: head.stack(id), Size: head.Size}, head.Size
	var ferr error
	err := readExtras(b.st.place(extraPlace(id)), func(x Extra) bool {
		ferr = b.t.resumeExtra(x)
		return ferr == nil
	})
	return cmp.Or(ferr, err)
}

// close releases what an unfinished build holds; its files go with the stage.
func (b *builder) close() {
	if b.f != nil {
		b.f.Close()
		b.f = nil
	}
	for _, f := range b.below {
		f.Close()
	}
}

// layerSpec says what a layer must be. Zero hashes are not checked.
type layerSpec struct {
	desc v1.Descriptor // as its manifest says; without a digest the layer may be stored in another compression
	diff v1.Hash       // of the unpacked layer
	// staged is set for a layer whose blob somebody else stages and checks, and waits until that is done.
	staged func() error
	plain  bool // it is an archive as it is, whatever its first bytes look like
}

// add takes the next layer from src.
func (b *builder) add(ctx context.Context, src io.Reader, want layerSpec) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("layer %d: %w", len(b.diffs)+1, err)
		}
	}()
	if len(b.diffs) >= b.limits.Layers {
		return fmt.Errorf("more than %d layers: %w", b.limits.Layers, ErrTooLarge)
	}
	keep := &blobKeeper{want: want}
	if want.staged == nil {
		if keep.f, err = b.st.temp(); err != nil {
			return err
		}
		defer keep.f.Close()
		keep.w, keep.hash = bufio.NewWriterSize(keep.f, 256<<10), sha256.New()
	}
	diff := sha256.New()
	if err := b.unpack(ctx, src, keep, diff); err != nil {
		if want.staged != nil && !errors.Is(err, ErrTooLarge) {
			// What was damaged on its way unfolds to nonsense, but that is not what is wrong.
			err = cmp.Or(want.staged(), err)
		}
		return err
	}
	got := sumHash(diff)
	if (want.diff != v1.Hash{}) && want.diff != got {
		return fmt.Errorf("%w: unpacked it is %s, the configuration says %s", ErrDigest, got, want.diff)
	}
	desc, err := keep.done(b.st)
	if err != nil {
		return err
	}
	b.layers = append(b.layers, desc)
	b.diffs = append(b.diffs, got)
	if b.f != nil && b.t.w.Used() >= b.st.s.segment && len(b.below) < maxSegments-1 {
		return b.endSegment(ctx, true)
	}
	return nil
}

// skip takes the next layer without a look, if it is known: one whose blob is in the stage and was verified when it got into the store.
func (b *builder) skip(want layerSpec) bool {
	if len(b.diffs) >= b.known {
		return false
	}
	b.layers = append(b.layers, want.desc)
	b.diffs = append(b.diffs, want.diff)
	return true
}

// beginSegment makes the file of the next segment.
func (b *builder) beginSegment() (err error) {
	if b.f, err = b.st.temp(); err == nil {
		b.t.begin(erofs.NewWriter(b.f))
	}
	return err
}

// endSegment writes the segment that ends with the last layer. Others may be made over a closed one.
func (b *builder) endSegment(ctx context.Context, closed bool) error {
	id := rootfsID(b.diffs)
	root, err := b.t.end(ctx)
	if err != nil {
		return err
	}
	var uuid [16]byte
	if raw, err := hex.DecodeString(id); err == nil {
		copy(uuid[:], raw)
	}
	if err := b.t.w.Finish(ctx, root, uuid); err != nil {
		return fmt.Errorf("write root file system: %w", err)
	}
	b.head.Size += b.t.w.Used()
	b.head.Closed = closed
	if err := b.keepExtras(id); err != nil {
		return err
	}
	f := b.f
	b.f = nil
	if err := f.Chmod(0o400); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := b.st.keep(f, rootfsPlace(id)); err != nil {
		return err
	}
	done, err := os.Open(b.st.place(rootfsPlace(id)))
	if err != nil {
		return err
	}
	b.below = append(b.below, done)
	b.t.below = append(b.t.below, done)
	b.head.Below = append(b.head.Below, id)
	return nil
}

// unpack merges a layer into the tree, hashes what it unfolds to, and has it kept.
func (b *builder) unpack(ctx context.Context, src io.Reader, keep *blobKeeper, diff hash.Hash) error {
	in := bufio.NewReaderSize(src, 256<<10)
	var err error
	if !keep.want.plain {
		if keep.kind, err = compressionOf(in); err != nil {
			return err
		}
	}
	var packed io.Reader = in
	if keep.asIs() {
		packed = io.TeeReader(in, keep)
	}
	plain, closePlain, err := unpack(packed, keep.kind)
	if err != nil {
		return err
	}
	defer closePlain()
	var enc *zstd.Encoder
	if keep.recompress() {
		if enc, err = zstd.NewWriter(keep, zstd.WithEncoderLevel(zstd.SpeedFastest)); err != nil {
			return err
		}
		defer enc.Close()
		plain = io.TeeReader(plain, enc)
	}
	ahead := newReadAhead(ctx, plain)
	defer ahead.close()
	counted := &countingReader{r: io.TeeReader(ahead, diff), left: b.limits.Bytes - b.raw}
	layer := bufio.NewReaderSize(counted, 64<<10)
	if b.t != nil && len(b.diffs) >= b.known {
		if b.f == nil {
			if err := b.beginSegment(); err != nil {
				return err
			}
		}
		if err := b.t.apply(ctx, layer); err != nil {
			return err
		}
	}
	// What follows the end of the archive counts for the digests.
	if err := drain(ctx, layer); err != nil {
		return err
	}
	ahead.close()
	b.raw += counted.n
	if enc != nil {
		return enc.Close()
	}
	// A decompressor may stop at the end of its stream.
	return drain(ctx, packed)
}

// blobKeeper keeps the blob of a layer that is being unpacked.
type blobKeeper struct {
	want layerSpec
	kind string // of compression, as it comes
	// Of a blob that is not staged by somebody else.
	f    *os.File
	w    *bufio.Writer
	hash hash.Hash
	n    int64
}

func (k *blobKeeper) recompress() bool {
	// Without a digest to keep, the copy is made small, and into what a manifest has a name for.
	return k.f != nil && k.kind != "gzip" && k.kind != "zstd" && k.want.desc.Digest == v1.Hash{}
}

func (k *blobKeeper) asIs() bool { return k.f != nil && !k.recompress() }

func (k *blobKeeper) Write(p []byte) (int, error) {
	k.hash.Write(p)
	k.n += int64(len(p))
	return k.w.Write(p)
}

// done checks the blob's digest, gives it its place and describes it.
func (k *blobKeeper) done(st *stage) (v1.Descriptor, error) {
	desc := k.want.desc
	if k.f == nil {
		return desc, k.want.staged()
	}
	if err := k.w.Flush(); err != nil {
		return desc, err
	}
	got := sumHash(k.hash)
	if desc.Digest == (v1.Hash{}) {
		desc = v1.Descriptor{MediaType: types.OCILayerZStd, Digest: got, Size: k.n}
		if k.kind == "gzip" {
			desc.MediaType = types.OCILayer
		}
	} else if desc.Digest != got {
		return desc, fmt.Errorf("%w: it is %s, the manifest says %s", ErrDigest, got, desc.Digest)
	}
	return desc, st.keep(k.f, blobPlace(desc.Digest.String()))
}

// finish writes what is not written yet of the root file system. It returns its size.
func (b *builder) finish(ctx context.Context) (int64, error) {
	if b.f == nil && b.t != nil && len(b.below) == 0 {
		// No layer at all makes an empty root.
		if err := b.beginSegment(); err != nil {
			return 0, err
		}
	}
	if b.f != nil {
		if err := b.endSegment(ctx, false); err != nil {
			return 0, err
		}
	}
	head, err := b.st.readHead(rootfsID(b.diffs))
	return head.Size, err
}

// keepExtras writes down what a segment does not hold itself of the root file system that it completes.
func (b *builder) keepExtras(id string) error {
	f, err := b.st.temp()
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	counted := &countingWriter{w: w}
	enc := json.NewEncoder(counted)
	if err = enc.Encode(b.head); err == nil {
		// Every segment has those of all below, too.
		begun := counted.n
		err = b.t.eachExtra(func(x Extra) error {
			err := cmp.Or(enc.Encode(x), b.t.takeBytes(counted.n-begun))
			b.head.Size += counted.n - begun
			begun = counted.n
			return err
		})
	}
	if err == nil {
		err = enc.Encode(extrasEnd{End: true})
	}
	if err = errors.Join(err, w.Flush()); err != nil {
		f.Close()
		return err
	}
	return b.st.keep(f, extraPlace(id))
}

// countingWriter counts what passes.
type countingWriter struct {
	w io.Writer
	n int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.n += int64(n)
	return n, err
}

// compressionOf looks at the first bytes of a stream. Empty: none that is known.
func compressionOf(r *bufio.Reader) (string, error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return "gzip", nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd", nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return "bzip2", nil
	case bytes.HasPrefix(head, []byte("\xfd7zXZ\x00")):
		return "", fmt.Errorf("xz compression is not supported; unpack it first (xz -d): %w", ErrFormat)
	}
	return "", nil
}

// unpack returns the decompressed stream.
func unpack(r io.Reader, kind string) (io.Reader, func(), error) {
	switch kind {
	case "gzip":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, fmt.Errorf("gzip: %w", err)
		}
		return z, func() {}, nil
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, nil, fmt.Errorf("zstd: %w", err)
		}
		return z, z.Close, nil
	case "bzip2":
		return bzip2.NewReader(r), func() {}, nil
	}
	return r, func() {}, nil
}

func sumHash(h hash.Hash) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h.Sum(nil))}
}

func hashBytes(b []byte) v1.Hash {
	h := sha256.Sum256(b)
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(h[:])}
}
