package coffer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/coffer-box/coffer/internal/assets"
	"github.com/coffer-box/coffer/internal/courier"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/wire"
)

// Image describes an image of the home's store.
type Image = image.Image

// Images lists the images.
func (r *Runtime) Images(ctx context.Context) ([]Image, error) { return r.images.List(ctx) }

// LoadImage loads images from an OCI layout, or an archive of one or of `docker save`. An empty path means r.
func (r *Runtime) LoadImage(ctx context.Context, path string, in io.Reader) ([]Image, error) {
	return r.images.Load(ctx, image.Source{Path: path, Reader: in}, image.Options{})
}

// ImportImage makes an image of one layer from a root file system: an archive or a directory. Changes are lines of a Dockerfile
// that set its configuration ("CMD sh", "ENV A=b").
func (r *Runtime) ImportImage(ctx context.Context, path string, in io.Reader, ref string, changes []string) (Image, error) {
	conf, err := image.NewConfig(changes)
	if err != nil {
		return Image{}, invalid("%w", err)
	}
	return r.images.Import(ctx, image.Source{Path: path, Reader: in}, ref, image.Options{Config: conf})
}

// RemovedImages is what a removal of images did.
type RemovedImages = image.Removed

// RemoveImage removes a name of an image, and with the last one the image. Images that boxes were made from are kept.
func (r *Runtime) RemoveImage(ctx context.Context, ref string) (RemovedImages, error) {
	return r.images.Remove(ctx, ref, r.imageNeeds)
}

// PruneImages removes images that no box was made from, as [Runtime.Prune] does, and nothing else.
func (r *Runtime) PruneImages(ctx context.Context, o PruneOptions) (RemovedImages, error) {
	return r.images.Prune(ctx, o.AllImages, o.Only, r.imageNeeds)
}

// imageNeeds tells the image store what the boxes need of it.
func (r *Runtime) imageNeeds(ctx context.Context) (image.Needs, error) {
	boxes, err := r.db.List(ctx)
	if err != nil {
		return image.Needs{}, err
	}
	needs := image.Needs{Images: map[string][]string{}}
	for _, b := range boxes {
		if b.Spec.RootfsID == "" {
			needs.Unknown = true // its record is damaged
			continue
		}
		needs.Images[b.Spec.ImageID] = append(needs.Images[b.Spec.ImageID], b.Name)
		needs.Rootfs = append(needs.Rootfs, b.Spec.RootfsID)
	}
	return needs, nil
}

// BaseImage is the name of the image that is part of the coffer program.
const BaseImage = image.BaseName

// When a box is created, its image may have to come from a registry first.
const (
	PullMissing = "missing" // unless it is there
	PullAlways  = "always"  // unless it is there and what the registry has
	PullNever   = "never"
)

// resolveImage finds the image of a box to be, or has it pulled.
func (r *Runtime) resolveImage(ctx context.Context, s Spec) (Image, error) {
	if s.Image == "" {
		return Image{}, invalid("no image given")
	}
	platform, err := platform(s.Platform)
	if err != nil {
		return Image{}, err
	}
	if !image.Host().Fits(platform) {
		return Image{}, invalid("platform %s: boxes run what this host runs, %s", platform, image.Host())
	}
	switch s.Pull {
	case "", PullMissing, PullAlways, PullNever:
	default:
		return Image{}, invalid("pull policy %q: use missing, always or never", s.Pull)
	}
	if s.Image == BaseImage || s.Image == BaseImage+":latest" {
		if err := r.ensureBase(ctx); err != nil {
			return Image{}, err
		}
		return r.images.Resolve(ctx, s.Image)
	}
	if s.Pull != PullAlways {
		img, err := r.images.Resolve(ctx, s.Image)
		if err == nil {
			if err = platform.Check(&img.Config); err == nil {
				return img, nil
			}
			err = invalid("image %s cannot run here: %w: pull it for %s", s.Image, err, platform)
		} else if !errors.Is(err, ErrImageNotFound) {
			return img, err
		} else {
			err = fmt.Errorf("%w: pull it with `coffer pull`, load it with `coffer load` or `coffer import`, or use the image %q that is always there", err, BaseImage)
		}
		if s.Pull == PullNever {
			return img, err
		}
	}
	img, _, err := r.Pull(ctx, s.Image, PullOptions{Platform: s.Platform, Progress: s.PullProgress})
	if err != nil && s.Pull != PullAlways && ctx.Err() == nil {
		err = fmt.Errorf("there is no image %s here: %w", s.Image, err)
	}
	return img, err
}

func platform(s string) (image.Platform, error) {
	if s == "" {
		return image.Host(), nil
	}
	p, err := image.ParsePlatform(s)
	if err != nil {
		return p, invalid("%w", err)
	}
	return p, nil
}

// PullProgress is one step of a pull: what happens to one layer.
type PullProgress = image.Progress

// PullOptions are the choices of a pull. The zero value is right for most.
type PullOptions struct {
	Platform string // os/arch[/variant]; empty: this host's
	// PlainHTTP allows the image's registry to be reached without TLS, which anybody on the way can read and change.
	PlainHTTP bool
	// Progress is called for every step, by one goroutine at a time.
	Progress func(PullProgress)
}

// Pull takes an image from its registry, unless the store has what the registry has under this name now, and tells if anything changed.
// Nothing is used before its digest was checked. When a pull fails, is cut off or killed, the next one goes on with what has come.
// Errors of the registry are [ErrDenied] and [ErrNotOffered] where it refuses, or has no such image.
func (r *Runtime) Pull(ctx context.Context, ref string, o PullOptions) (img Image, changed bool, err error) {
	if _, err := image.ParseName(ref); err != nil {
		return Image{}, false, invalid("%w", err)
	}
	if _, err := platform(o.Platform); err != nil {
		return Image{}, false, err
	}
	res, err := r.errand(ctx, courier.Request{Op: courier.Pull, Ref: ref, Platform: o.Platform, PlainHTTP: o.PlainHTTP}, func(a courier.Answer) {
		if a.Step != nil && o.Progress != nil {
			o.Progress(*a.Step)
		}
	})
	if err == nil {
		img, err = r.images.Resolve(ctx, res.ImageID)
	}
	if err != nil {
		return Image{}, false, fmt.Errorf("pull %s: %w", ref, r.unwritable(err))
	}
	return img, res.Changed, nil
}

// Errors of a registry.
var (
	ErrDenied     = image.ErrDenied     // it wants other credentials
	ErrNotOffered = image.ErrNotOffered // it has no such image, or shows it to others only
)

// errand has the program that reaches registries do something.
func (r *Runtime) errand(ctx context.Context, req courier.Request, steps func(courier.Answer)) (courier.Result, error) {
	set, err := assets.Ensure(ctx, r.home.Root)
	if err != nil {
		return courier.Result{}, r.unwritable(err)
	}
	defer set.Close()
	req.Home, req.UserAgent = r.home.Root, "coffer/"+Version()
	return courier.Run(ctx, exec.Command(set.Registry), req, steps)
}

// PushOptions are the choices of a push. The zero value is right for most.
type PushOptions struct {
	PlainHTTP bool                    // as in PullOptions
	Progress  func(done, total int64) // bytes; called by one goroutine at a time
}

// Push writes an image of the store to the registry of its name, which must have a tag, and returns the digest of its manifest. What
// the registry has of it is not sent.
func (r *Runtime) Push(ctx context.Context, ref string, o PushOptions) (digest string, err error) {
	name, err := image.ParseName(ref)
	if err != nil {
		return "", invalid("%w", err)
	}
	if name.Digest != "" {
		return "", invalid("push %s: a digest is what an image has, not where it goes: give a tag", ref)
	}
	res, err := r.errand(ctx, courier.Request{Op: courier.Push, Ref: ref, PlainHTTP: o.PlainHTTP}, func(a courier.Answer) {
		if a.Pushed != nil && o.Progress != nil {
			o.Progress(a.Pushed.Done, a.Pushed.Total)
		}
	})
	if err != nil {
		return "", fmt.Errorf("push %s: %w", ref, err)
	}
	return res.Digest, nil
}

// TagImage gives an image another name, which is taken from the image that has it.
func (r *Runtime) TagImage(ctx context.Context, ref, name string) error {
	return r.images.Tag(ctx, ref, name)
}

// SaveImages writes images as a tar archive, which is an OCI layout and can be read by `docker load` too.
func (r *Runtime) SaveImages(ctx context.Context, w io.Writer, refs ...string) error {
	return r.images.Save(ctx, w, refs...)
}

// GetImage finds an image of the store by name, digest, id or a prefix of its id.
func (r *Runtime) GetImage(ctx context.Context, ref string) (Image, error) {
	return r.images.Resolve(ctx, ref)
}

// Login tries credentials on a registry and keeps them, and returns the file: Docker's configuration where there is one, else auth.json
// in the home, which is this user's alone. Credentials that are refused are [ErrDenied]. An empty registry is Docker Hub.
func (r *Runtime) Login(ctx context.Context, host, user, password string, plainHTTP bool) (string, error) {
	res, err := r.errand(ctx, courier.Request{Op: courier.Login, Registry: host, User: user, Password: password, PlainHTTP: plainHTTP}, nil)
	return res.File, err
}

// Logout forgets the credentials for a registry, and tells if there were any. An empty registry is Docker Hub.
func (r *Runtime) Logout(ctx context.Context, host string) (bool, error) {
	res, err := r.errand(ctx, courier.Request{Op: courier.Logout, Registry: host}, nil)
	return res.Found, err
}

// ensureBase has the helper install its image once per version of the helper, which is known by its file.
func (r *Runtime) ensureBase(ctx context.Context) error {
	helper, err := r.helperPath()
	if err != nil {
		return err
	}
	st, err := os.Stat(helper)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoHelper, err)
	}
	mark, _ := json.Marshal([]any{helper, st.Size(), st.ModTime().UnixNano()})
	path := filepath.Join(r.home.Images(), ".base-of")
	if have, err := os.ReadFile(path); err == nil && string(have) == string(mark) {
		if _, err := r.images.Resolve(ctx, BaseImage); err == nil {
			return nil
		}
	}
	cmd := exec.CommandContext(ctx, helper, image.InstallBaseArg, r.home.Root)
	var msg strings.Builder
	cmd.Stderr = &msg
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("install the image %s: %s: %w", BaseImage, strings.TrimSpace(msg.String()), err)
	}
	// A torn mark only costs another run.
	return os.WriteFile(path, mark, 0o600)
}

// CommitOptions are the choices of a commit. The zero value is useful.
type CommitOptions = image.CommitOptions

// Commit makes an image of the box: its image, and what the box has written on top of it, as one more layer. Volumes are no part of it,
// nor what Coffer itself writes into a box (/etc/hostname, hosts and resolv.conf). The configuration is that of the box's image, with
// the changes asked for. Of a box that runs each file is taken as it is when its turn comes; stop it for what belongs together.
func (b *Box) Commit(ctx context.Context, o CommitOptions) (Image, error) {
	rec, err := b.rt.db.Get(ctx, b.id)
	if err != nil {
		return Image{}, err
	}
	if rec.Phase == state.Running {
		// What the kernel of the box has not written out would be missing.
		if err := b.withAgent(ctx, func(c *wire.Client) error { return c.Sync(ctx) }); err != nil && !errors.Is(err, ErrNotRunning) {
			return Image{}, fmt.Errorf("commit box %s: %w", b.name, err)
		}
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(b.archive(ctx, w)) }()
	img, err := b.rt.images.Commit(ctx, rec.Spec.ImageID, r, o)
	r.CloseWithError(context.Canceled) // where it was not read to its end
	if err != nil {
		return Image{}, fmt.Errorf("commit box %s: %w", b.name, b.rt.unwritable(err))
	}
	return img, nil
}
