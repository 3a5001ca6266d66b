// Package registry talks to OCI registries: what a pull and a push of one repository need, and the credentials for it. Protocol and
// formats are go-containerregistry's; what is here decides which hosts are contacted, how far they are trusted, and what is tried again.
//
// It keeps no images; of the image store it knows the errors that a registry's answers are told by. No host is contacted but that of the repository, its configured mirrors, and those that these
// refer to themselves: for tokens and, by redirection, for blobs.
//
// # On disk
//
// A directory of settings, that of the home, may hold
//
//	registries.json   settings by registry, see [Settings]
//	auth.json         credentials, in Docker's format, mode 0600; only where Docker has no configuration of its own
//	certs.d/<host>/   *.crt: certificates to trust, and <name>.cert with <name>.key: to show, as Docker has them in /etc/docker/certs.d
package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// DockerHub is the registry that names without one mean.
const DockerHub = "docker.io"

// Settings are what registries.json holds.
type Settings struct {
	// Registries are settings by host[:port], as images are named; "docker.io" is Docker Hub.
	Registries map[string]Host `json:"registries"`
}

// Host are the settings of one registry.
type Host struct {
	// PlainHTTP allows a connection without TLS, which anybody on the way can read and change. TLS is still tried first.
	PlainHTTP bool `json:"plain_http,omitempty"`
	// Mirrors are asked first, in their order: https://host[:port], or http:// for one without TLS.
	Mirrors []string `json:"mirrors,omitempty"`
	// CAFile is a file of certificates to trust besides the system's.
	CAFile string `json:"ca_file,omitempty"`
}

// Config is where the settings are.
type Config struct {
	Dir       string // of settings
	UserAgent string
	// PlainHTTP is a registry for which [Host.PlainHTTP] holds, whatever the settings say.
	PlainHTTP string
	// CertDirs are looked into for <host>/*.crt besides certs.d in Dir. Nil: those of Docker and of podman.
	CertDirs []string
	// Keychain is asked for credentials. Nil: auth.json in Dir, then Docker's configuration and credential helpers, then podman's.
	Keychain authn.Keychain
}

// Client reaches registries. It is safe for concurrent use.
type Client struct {
	cfg      Config
	settings Settings
	hosts    *hosts
	base     http.RoundTripper // what all requests go through
}

// New reads the settings.
func New(cfg Config) (*Client, error) {
	c := &Client{cfg: cfg}
	if c.cfg.CertDirs == nil {
		c.cfg.CertDirs = []string{"/etc/docker/certs.d", "/etc/containers/certs.d"}
	}
	if c.cfg.Keychain == nil {
		c.cfg.Keychain = authn.NewMultiKeychain(fileKeychain{c.authFile()}, authn.DefaultKeychain)
	}
	path := filepath.Join(cfg.Dir, "registries.json")
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("settings of registries: %w", err)
	default:
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields()
		if err := d.Decode(&c.settings); err != nil {
			return nil, fmt.Errorf("settings of registries, %s: %w", path, err)
		}
	}
	plain := map[string]bool{apiHost(cfg.PlainHTTP): cfg.PlainHTTP != ""}
	cas := map[string]string{}
	for host, s := range c.settings.Registries {
		if _, err := name.NewRegistry(apiHost(host)); err != nil {
			return nil, fmt.Errorf("settings of registries, %s: %q is no host[:port]", path, host)
		}
		if s.PlainHTTP {
			plain[apiHost(host)] = true
		}
		if s.CAFile != "" {
			cas[apiHost(host)] = s.CAFile
		}
		for _, m := range s.Mirrors {
			u, err := mirror(m)
			if err != nil {
				return nil, fmt.Errorf("settings of registries, %s: mirror of %s: %w", path, host, err)
			}
			if u.Scheme == "http" {
				plain[u.Host] = true
			}
		}
	}
	c.hosts = &hosts{plain: plain, cas: cas, dirs: append([]string{filepath.Join(cfg.Dir, "certs.d")}, c.cfg.CertDirs...), agent: cfg.UserAgent}
	c.base = bounded{c.hosts}
	return c, nil
}

func mirror(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.Path != "" && u.Path != "/" || u.User != nil {
		return nil, fmt.Errorf("%q: use https://host[:port], or http:// for one without TLS", s)
	}
	return u, nil
}

// apiHost is the host that answers for a registry.
func apiHost(registry string) string {
	if registry == DockerHub {
		return name.DefaultRegistry
	}
	return registry
}

// Repository returns the repository of a registry, both as in the name of an image in full.
func (c *Client) Repository(registry, path string) (*Repository, error) {
	r := &Repository{client: c, registry: registry, path: path}
	for _, m := range c.settings.Registries[registry].Mirrors {
		u, err := mirror(m)
		if err != nil {
			return nil, err
		}
		r.mirrors = append(r.mirrors, u.Host)
	}
	var err error
	r.origin, err = c.endpoint(apiHost(registry), path)
	return r, err
}

func (c *Client) endpoint(host, path string) (*endpoint, error) {
	opts := []name.Option{name.StrictValidation}
	if c.hosts.plain[host] {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(host, opts...)
	if err != nil {
		return nil, err
	}
	return &endpoint{client: c, repo: reg.Repo(path)}, nil
}
