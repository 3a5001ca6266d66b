package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Repository is one repository of a registry. What is read comes from the first of its mirrors that gives it, else from the registry
// itself; what is written goes to the registry. It is safe for concurrent use.
type Repository struct {
	client   *Client
	registry string
	path     string
	mirrors  []string
	origin   *endpoint

	mu   sync.Mutex
	good *endpoint // that answered last
}

// manifestTypes are what a pull understands.
const manifestTypes = string(types.OCIImageIndex) + ", " + string(types.OCIManifestSchema1) + ", " +
	string(types.DockerManifestList) + ", " + string(types.DockerManifestSchema2)

// Digest tells what a tag stands for.
func (r *Repository) Digest(ctx context.Context, tag string) (v1.Hash, error) {
	var h v1.Hash
	err := r.try(ctx, tag, func(e *endpoint) error {
		resp, err := e.do(ctx, http.MethodHead, "manifests/"+tag, http.Header{"Accept": {manifestTypes}}, http.StatusOK)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if h, err = v1.NewHash(resp.Header.Get("Docker-Content-Digest")); err == nil && h.Algorithm == "sha256" {
			return nil
		}
		// A registry need not say; what it sends tells.
		b, err := e.manifest(ctx, tag, maxTagged)
		if err != nil {
			return err
		}
		h, _, err = v1.SHA256(strings.NewReader(string(b)))
		return err
	})
	return h, err
}

// maxTagged bounds the manifest of a tag whose digest the registry does not tell.
const maxTagged = 8 << 20

// Manifest returns the manifest or index with a digest, of at most limit bytes. They are not checked.
func (r *Repository) Manifest(ctx context.Context, digest v1.Hash, limit int64) ([]byte, error) {
	var b []byte
	err := r.try(ctx, digest.String(), func(e *endpoint) (err error) {
		b, err = e.manifest(ctx, digest.String(), limit)
		return err
	})
	return b, err
}

// Blob returns what a blob holds from an offset on, or from its beginning where the registry can only begin there. The bytes are not
// checked.
func (r *Repository) Blob(ctx context.Context, digest v1.Hash, offset int64) (body io.ReadCloser, start int64, err error) {
	err = r.try(ctx, digest.String(), func(e *endpoint) error {
		head := http.Header{}
		if offset > 0 {
			head.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
		}
		resp, err := e.do(ctx, http.MethodGet, "blobs/"+digest.String(), head, http.StatusOK, http.StatusPartialContent)
		var te *transport.Error
		if errors.As(err, &te) && te.StatusCode == http.StatusRequestedRangeNotSatisfiable && offset > 0 {
			// Some know only whole blobs, or ranges with an end.
			resp, err = e.do(ctx, http.MethodGet, "blobs/"+digest.String(), nil, http.StatusOK)
		}
		if err != nil {
			return err
		}
		start = 0
		if resp.StatusCode == http.StatusPartialContent {
			if start, err = rangeStart(resp.Header.Get("Content-Range")); err != nil {
				resp.Body.Close()
				return err
			}
		}
		body = resp.Body
		return nil
	})
	return body, start, err
}

// rangeStart reads the first number of "bytes 100-199/200".
func rangeStart(s string) (int64, error) {
	rest, ok := strings.CutPrefix(s, "bytes ")
	first, _, ok2 := strings.Cut(rest, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	if !ok || !ok2 || err != nil || n < 0 {
		return 0, fmt.Errorf("the registry sends a part of a blob, and not which: Content-Range %q", s)
	}
	return n, nil
}

// Push writes an image under a tag, and returns what it can be named by then. What the registry has already is not sent.
func (r *Repository) Push(ctx context.Context, img v1.Image, tag string, progress func(done, total int64)) (v1.Hash, error) {
	digest, err := img.Digest()
	if err != nil {
		return v1.Hash{}, err
	}
	rt, err := r.origin.transport(ctx, transport.PushScope)
	if err != nil {
		return v1.Hash{}, r.explain(r.origin, tag, err)
	}
	opts := []remote.Option{remote.WithContext(ctx), remote.WithTransport(rt), remote.WithJobs(4)}
	if progress != nil {
		updates := make(chan v1.Update, 16)
		opts = append(opts, remote.WithProgress(updates))
		var done sync.WaitGroup
		done.Go(func() {
			for u := range updates {
				if u.Error == nil {
					progress(u.Complete, u.Total)
				}
			}
		})
		defer done.Wait() // remote.Write closes the channel
	}
	if err := remote.Write(r.origin.repo.Tag(tag), img, opts...); err != nil {
		return v1.Hash{}, r.explain(r.origin, tag, err)
	}
	return digest, nil
}

// try runs fn on the endpoint that answered last, or on one after the other until one does.
func (r *Repository) try(ctx context.Context, what string, fn func(*endpoint) error) error {
	r.mu.Lock()
	good := r.good
	r.mu.Unlock()
	if good != nil {
		err := fn(good)
		if err == nil || good == r.origin || ctx.Err() != nil {
			return r.explain(good, what, err)
		}
		// It may have some of the image only.
		return r.explain(r.origin, what, fn(r.origin))
	}
	for _, m := range r.mirrors {
		e, err := r.client.endpoint(m, r.path)
		if err == nil {
			err = fn(e)
		}
		if err == nil {
			r.remember(e)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	err := fn(r.origin)
	if err == nil {
		r.remember(r.origin)
	}
	return r.explain(r.origin, what, err)
}

func (r *Repository) remember(e *endpoint) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.good = e
}

// Close ends the connections that nobody uses.
func (r *Repository) Close() { r.client.hosts.close() }

// endpoint is a repository on one host.
type endpoint struct {
	client *Client
	repo   name.Repository

	mu   sync.Mutex
	auth map[string]http.RoundTripper // by scope
}

// transport returns a transport that has introduced itself to the registry.
func (e *endpoint) transport(ctx context.Context, scope string) (http.RoundTripper, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t := e.auth[scope]; t != nil {
		return t, nil
	}
	var t http.RoundTripper
	err := retry(ctx, func() error {
		auth, err := authn.Resolve(ctx, e.client.cfg.Keychain, e.repo)
		if err != nil {
			return fmt.Errorf("credentials for %s: %w", e.repo.RegistryStr(), err)
		}
		t, err = transport.NewWithContext(ctx, e.repo.Registry, auth, e.client.base, []string{e.repo.Scope(scope)})
		return err
	})
	if err != nil {
		return nil, err
	}
	if e.auth == nil {
		e.auth = map[string]http.RoundTripper{}
	}
	e.auth[scope] = t
	return t, nil
}

// manifestTime is how long a manifest may take, which is small.
const manifestTime = 3 * time.Minute

func (e *endpoint) manifest(ctx context.Context, ref string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, manifestTime)
	defer cancel()
	var b []byte
	t, err := e.transport(ctx, transport.PullScope)
	if err != nil {
		return nil, err
	}
	err = retry(ctx, func() error {
		resp, err := e.once(ctx, t, http.MethodGet, "manifests/"+ref, http.Header{"Accept": {manifestTypes}}, http.StatusOK)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", ref, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("manifest %s has more than %d bytes", ref, limit)
	}
	return b, nil
}

// do makes a request of the repository, again where that may help.
func (e *endpoint) do(ctx context.Context, method, path string, head http.Header, want ...int) (*http.Response, error) {
	t, err := e.transport(ctx, transport.PullScope)
	if err != nil {
		return nil, err
	}
	var resp *http.Response
	err = retry(ctx, func() (err error) {
		resp, err = e.once(ctx, t, method, path, head, want...)
		return err
	})
	return resp, err
}

// once makes a request of the repository.
func (e *endpoint) once(ctx context.Context, t http.RoundTripper, method, path string, head http.Header, want ...int) (*http.Response, error) {
	// The scheme is set by the transport.
	url := fmt.Sprintf("%s://%s/v2/%s/%s", e.repo.Scheme(), e.repo.RegistryStr(), e.repo.RepositoryStr(), path)
	req, err := http.NewRequestWithContext(context.WithValue(ctx, wanted{}, want), method, url, nil)
	if err != nil {
		return nil, err
	}
	if head != nil {
		req.Header = head.Clone()
	}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return nil, err
	}
	if err := transport.CheckError(resp, want...); err != nil {
		resp.Body.Close()
		return nil, &waitError{err, resp.Header.Get("Retry-After")}
	}
	return resp, nil
}

// waitError is a refusal that may say how long to wait.
type waitError struct {
	error
	after string
}

func (e *waitError) Unwrap() error { return e.error }

const (
	retries   = 5
	firstWait = 300 * time.Millisecond
	maxWait   = 30 * time.Second
)

// retry runs fn until it succeeds, fails for good, or has failed often enough.
func retry(ctx context.Context, fn func() error) error {
	wait := firstWait
	for i := 1; ; i++ {
		err := fn()
		if err == nil || i == retries || ctx.Err() != nil || !temporary(err) {
			if err != nil && i == retries {
				err = fmt.Errorf("%w; tried %d times", err, i)
			}
			return err
		}
		pause := wait/2 + rand.N(wait)
		var w *waitError
		if errors.As(err, &w) {
			if secs, perr := strconv.Atoi(w.after); perr == nil && secs >= 0 {
				pause = time.Duration(secs) * time.Second
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(pause, maxWait)):
		}
		wait *= 2
	}
}

// temporary tells a failure that may be over the next time.
func temporary(err error) bool {
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
			http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
		return false
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout() || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || isReset(err)
}
