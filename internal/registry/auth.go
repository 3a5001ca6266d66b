package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	images "github.com/coffer-box/coffer/internal/image"
)

// Login tries credentials on a registry, by its [Canonical] name, and keeps those that are taken: in Docker's configuration, or its credential helper, where
// there is one, else in auth.json. It returns the file.
func (c *Client) Login(ctx context.Context, registry, user, password string) (string, error) {
	e, err := c.endpoint(apiHost(registry), "x")
	if err != nil {
		return "", err
	}
	auth := authn.FromConfig(authn.AuthConfig{Username: user, Password: password})
	if err := c.check(ctx, e.repo.Registry, auth); err != nil {
		return "", err
	}
	cf, err := c.credentials()
	if err != nil {
		return "", err
	}
	key := authKey(registry)
	have := types.AuthConfig{ServerAddress: key, Username: user, Password: password}
	if cf.Filename == c.authFile() {
		cf.AuthConfigs[key] = have
		err = cf.Save()
	} else {
		err = cf.GetCredentialsStore(key).Store(have)
	}
	if err != nil {
		return "", fmt.Errorf("keep the credentials for %s: %w", registry, err)
	}
	if own, err := readAuth(c.authFile()); cf.Filename != c.authFile() && err == nil {
		// Those of a time without Docker would be found first.
		if _, old := own.AuthConfigs[key]; old {
			delete(own.AuthConfigs, key)
			if err := own.Save(); err != nil {
				return "", fmt.Errorf("forget the older credentials for %s: %w", registry, err)
			}
		}
	}
	return cf.Filename, nil
}

// check asks a registry if it takes credentials.
func (c *Client) check(ctx context.Context, reg name.Registry, auth authn.Authenticator) error {
	denied := func() error { return fmt.Errorf("%w: %s does not take this name and password", images.ErrDenied, reg) }
	t, err := transport.NewWithContext(ctx, reg, auth, c.base, nil)
	var te *transport.Error
	if errors.As(err, &te) && (te.StatusCode == http.StatusUnauthorized || te.StatusCode == http.StatusForbidden) {
		return denied()
	}
	if err != nil {
		return c.explain(reg.RegistryStr(), err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, reg.Scheme()+"://"+reg.RegistryStr()+"/v2/", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return c.explain(reg.RegistryStr(), err)
	}
	resp.Body.Close()
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		return denied()
	}
	return nil
}

// Logout forgets the credentials for a registry, by its [Canonical] name, and tells if there were any.
func (c *Client) Logout(registry string) (bool, error) {
	key, found := authKey(registry), false
	cf, err := c.credentials()
	if err != nil {
		return false, err
	}
	files := []*configfile.ConfigFile{cf}
	if own := c.authFile(); cf.Filename != own {
		if cf, err := readAuth(own); err == nil {
			files = append(files, cf)
		}
	}
	for _, cf := range files {
		store := cf.GetCredentialsStore(key)
		have, err := store.Get(key)
		if err != nil {
			return found, fmt.Errorf("look for the credentials for %s: %w", registry, err)
		}
		if have.Username == "" && have.IdentityToken == "" && have.RegistryToken == "" {
			continue
		}
		if err := store.Erase(key); err != nil {
			return found, fmt.Errorf("forget the credentials for %s: %w", registry, err)
		}
		found = true
	}
	return found, nil
}

// Canonical is the name of a registry as people may give it: as a URL, and Docker Hub by any of its names.
func Canonical(registry string) string {
	registry = strings.TrimSuffix(strings.TrimPrefix(registry, "https://"), "/")
	registry = strings.TrimSuffix(strings.TrimSuffix(registry, "/v1"), "/v2")
	switch registry {
	case "", "index.docker.io", "registry-1.docker.io", "hub.docker.com":
		return DockerHub
	}
	return registry
}

// authKey is what Docker calls a registry in its configuration.
func authKey(registry string) string {
	if registry == DockerHub {
		return authn.DefaultAuthKey
	}
	return registry
}

func (c *Client) authFile() string { return filepath.Join(c.cfg.Dir, "auth.json") }

// credentials opens Docker's configuration, or for want of one our own.
func (c *Client) credentials() (*configfile.ConfigFile, error) {
	if dir := dockerDir(); dir != "" {
		cf, err := config.Load(dir)
		if err != nil {
			return nil, fmt.Errorf("configuration of Docker: %w", err)
		}
		return cf, nil
	}
	return readAuth(c.authFile())
}

// dockerDir is where Docker's configuration is; empty: there is none.
func dockerDir() string {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".docker")
	}
	if _, err := os.Stat(filepath.Join(dir, config.ConfigFileName)); err != nil {
		return ""
	}
	return dir
}

func readAuth(path string) (*configfile.ConfigFile, error) {
	cf := configfile.New(path)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return cf, nil
	}
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	defer f.Close()
	if err := cf.LoadFromReader(f); err != nil {
		return nil, fmt.Errorf("credentials in %s: %w", path, err)
	}
	return cf, nil
}

// fileKeychain looks into a file in Docker's format.
type fileKeychain struct{ path string }

// Resolve implements [authn.Keychain].
func (k fileKeychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	cf, err := readAuth(k.path)
	if err != nil {
		return nil, err
	}
	key := target.RegistryStr()
	if key == name.DefaultRegistry {
		key = authn.DefaultAuthKey
	}
	have, err := cf.GetAuthConfig(key)
	if err != nil {
		return nil, err
	}
	a := authn.AuthConfig{Username: have.Username, Password: have.Password, Auth: have.Auth, IdentityToken: have.IdentityToken, RegistryToken: have.RegistryToken}
	if a == (authn.AuthConfig{}) {
		return authn.Anonymous, nil
	}
	return authn.FromConfig(a), nil
}
