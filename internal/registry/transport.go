package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// hosts is a transport that knows whom to trust how far.
type hosts struct {
	plain map[string]bool   // hosts that may be reached without TLS
	cas   map[string]string // files of certificates, by host
	dirs  []string          // of directories by host
	agent string

	mu   sync.Mutex
	each map[string]*http.Transport
}

// wanted are, in a request's context, the status codes of answers that are bounded by who reads them.
type wanted struct{}

const (
	maxAnswer  = 1 << 20         // bytes of any other answer: tokens, refusals, and what is not even looked at
	answerTime = 3 * time.Minute // from its first byte to its end
)

var errSlow = fmt.Errorf("its answer had no end after %v", answerTime)

// bounded keeps a registry from holding up or filling whoever reads its answers.
type bounded struct{ next http.RoundTripper }

// RoundTrip implements [http.RoundTripper].
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := b.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	body := &boundedBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, left: math.MaxInt64}
	if want, _ := ctx.Value(wanted{}).([]int); !slices.Contains(want, resp.StatusCode) {
		body.left = maxAnswer
		body.timer = time.AfterFunc(answerTime, func() { cancel(errSlow) })
	}
	resp.Body = body
	return resp, nil
}

// boundedBody ends after so many bytes, or when its time is over.
type boundedBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer // nil: it has all the time that its reader gives it
	left   int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	if err != nil && errors.Is(context.Cause(b.ctx), errSlow) {
		err = errSlow
	}
	return n, err
}

func (b *boundedBody) Close() error {
	if b.timer != nil {
		b.timer.Stop()
	}
	b.cancel(nil)
	return b.ReadCloser.Close()
}

// certError says that the certificates for a host cannot be had.
type certError struct{ error }

func (e *certError) Unwrap() error { return e.error }

// errPlain says that a connection without TLS was not allowed.
var errPlain = errors.New("it has no TLS")

// RoundTrip implements [http.RoundTripper].
func (h *hosts) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !h.plain[req.URL.Host] {
		return nil, fmt.Errorf("%s: %w", req.URL.Host, errPlain)
	}
	t, err := h.transport(req.URL.Host)
	if err != nil {
		return nil, err
	}
	if h.agent != "" && req.Header.Get("User-Agent") != h.agent {
		req = req.Clone(req.Context())
		req.Header.Set("User-Agent", h.agent)
	}
	return t.RoundTrip(req)
}

func (h *hosts) transport(host string) (*http.Transport, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t := h.each[host]; t != nil {
		return t, nil
	}
	conf, err := h.tls(host)
	if err != nil {
		return nil, &certError{err}
	}
	t := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 20 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   20 * time.Second,
		ResponseHeaderTimeout: time.Minute,
		IdleConnTimeout:       30 * time.Second,
		MaxIdleConnsPerHost:   8,
		ForceAttemptHTTP2:     true,
		TLSClientConfig:       conf,
		// Layers are compressed already, and their digests are of what is sent.
		DisableCompression: true,
	}
	if h.each == nil {
		h.each = map[string]*http.Transport{}
	}
	h.each[host] = t
	return t, nil
}

// close ends the connections that nobody uses.
func (h *hosts) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.each {
		t.CloseIdleConnections()
	}
}

// tls reads the certificates for a host.
func (h *hosts) tls(host string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	var files []string
	if f := h.cas[host]; f != "" {
		files = append(files, f)
	}
	for _, top := range h.dirs {
		dir := filepath.Join(top, host)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificates of %s: %w", host, err)
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			switch filepath.Ext(path) {
			case ".crt":
				files = append(files, path)
			case ".cert":
				pair, err := tls.LoadX509KeyPair(path, strings.TrimSuffix(path, ".cert")+".key")
				if err != nil {
					return nil, fmt.Errorf("certificate to show to %s: %s: %w", host, path, err)
				}
				conf.Certificates = append(conf.Certificates, pair)
			}
		}
	}
	if len(files) == 0 {
		return conf, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("certificate of %s: %w", host, err)
		}
		if !pool.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("certificate of %s: %s holds none in PEM form", host, f)
		}
	}
	conf.RootCAs = pool
	return conf, nil
}
