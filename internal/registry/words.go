package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	images "github.com/coffer-box/coffer/internal/image"
)

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNABORTED)
}

// explain says what an error of an endpoint means and what to do.
func (r *Repository) explain(e *endpoint, what string, err error) error {
	if err == nil {
		return nil
	}
	var te *transport.Error
	if errors.As(err, &te) {
		image := r.registry + "/" + r.path
		switch te.StatusCode {
		case http.StatusUnauthorized:
			return fmt.Errorf("%s: %w: %s wants credentials, or others: coffer login %s", image, images.ErrDenied, r.registry, r.registry)
		case http.StatusForbidden:
			return fmt.Errorf("%s: %w by %s: %s", image, images.ErrDenied, r.registry, words(te))
		case http.StatusNotFound:
			return fmt.Errorf("%s, %s: %w: check the name and the tag; a private image may need coffer login %s", image, what, images.ErrNotOffered, r.registry)
		case http.StatusTooManyRequests:
			return fmt.Errorf("%s: %s is asked too often: try later, or log in: coffer login %s (%w)", image, r.registry, r.registry, err)
		}
		return fmt.Errorf("%s: %s answers: %w", image, r.registry, err)
	}
	return r.client.explain(e.repo.RegistryStr(), err)
}

// explain says what a failure to reach a host means and what to do.
func (c *Client) explain(host string, err error) error {
	var unknown x509.UnknownAuthorityError
	var wrongHost x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	var verify *tls.CertificateVerificationError
	var dns *net.DNSError
	var certs *certError
	switch {
	case errors.As(err, &certs):
		return certs.error
	// What is tried after it says less.
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return fmt.Errorf("cannot reach %s: %w: check the network, and HTTPS_PROXY if there is a proxy", host, err)
	case errors.As(err, &unknown):
		return fmt.Errorf("the certificate of %s is signed by nobody who is trusted here: if it is yours, copy its authority's certificate to %s/%s/ca.crt (%w)",
			host, c.hosts.dirs[0], host, err)
	case errors.As(err, &wrongHost), errors.As(err, &invalid), errors.As(err, &verify):
		return fmt.Errorf("the certificate of %s is not good: %w", host, err)
	case errors.As(err, &record), errors.Is(err, errPlain), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return &wordedError{fmt.Sprintf(`%s has no TLS, so anybody on the way can read and change what is sent: if that is well, use --plain-http, or {"registries": {%q: {"plain_http": true}}} in %s/registries.json`,
			host, host, c.cfg.Dir), err}
	case errors.As(err, &dns):
		return fmt.Errorf("cannot find %s: %w: check the name and the network", host, err)
	}
	return err
}

// wordedError says in better words what another error means.
type wordedError struct {
	text string
	err  error
}

func (e *wordedError) Error() string { return e.text }
func (e *wordedError) Unwrap() error { return e.err }

// words are what a registry says of an error.
func words(te *transport.Error) string {
	var all []string
	for _, d := range te.Errors {
		all = append(all, d.String())
	}
	if len(all) == 0 {
		return http.StatusText(te.StatusCode)
	}
	return strings.Join(all, "; ")
}
