// Package server does errands to registries: it brings the image store and the registries together, and is linked only into the program
// coffer-registry. It starts no box.
package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/coffer-box/coffer/internal/courier"
	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/registry"
)

// Serve does the one errand that it is asked for on in, and answers on out.
func Serve(in io.Reader, out io.Writer) error {
	d := json.NewDecoder(in)
	var req courier.Request
	if err := d.Decode(&req); err != nil {
		return fmt.Errorf("read the request: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, io.MultiReader(d.Buffered(), in))
		cancel() // nobody wants it done any more
	}()
	enc := json.NewEncoder(out)
	e := errand{req: req, step: func(a courier.Answer) { _ = enc.Encode(a) }} // who does not listen any more has called it off
	res, err := e.run(ctx)
	if err != nil {
		res.Fail(err)
	}
	return enc.Encode(courier.Answer{Result: &res})
}

type errand struct {
	req  courier.Request
	step func(courier.Answer)
}

func (e *errand) run(ctx context.Context) (res courier.Result, err error) {
	switch e.req.Op {
	case courier.Pull:
		return e.pull(ctx)
	case courier.Push:
		return e.push(ctx)
	}
	host := registry.Canonical(e.req.Registry)
	c, err := e.registries(host)
	if err != nil {
		return res, err
	}
	switch e.req.Op {
	case courier.Login:
		res.File, err = c.Login(ctx, host, e.req.User, e.req.Password)
	case courier.Logout:
		res.Found, err = c.Logout(host)
	default:
		err = fmt.Errorf("unknown errand %q", e.req.Op)
	}
	return res, err
}

func (e *errand) registries(host string) (*registry.Client, error) {
	c := registry.Config{Dir: e.req.Home, UserAgent: e.req.UserAgent}
	if e.req.PlainHTTP {
		c.PlainHTTP = host
	}
	return registry.New(c)
}

// open finds the store and the repository of the image's name.
func (e *errand) open() (*image.Store, image.Name, *registry.Repository, error) {
	name, err := image.ParseName(e.req.Ref)
	if err != nil {
		return nil, name, nil, err
	}
	s, err := image.Open(home.Layout{Root: e.req.Home}.Images(), nil)
	if err != nil {
		return nil, name, nil, err
	}
	c, err := e.registries(name.Registry)
	if err != nil {
		return nil, name, nil, err
	}
	r, err := c.Repository(name.Registry, name.Path)
	return s, name, r, err
}

func (e *errand) pull(ctx context.Context) (res courier.Result, err error) {
	s, name, repo, err := e.open()
	if err != nil {
		return res, err
	}
	defer repo.Close()
	o := image.PullOptions{Progress: func(p image.Progress) { e.step(courier.Answer{Step: &p}) }}
	if e.req.Platform != "" {
		if o.Platform, err = image.ParsePlatform(e.req.Platform); err != nil {
			return res, err
		}
	}
	img, changed, err := s.Pull(ctx, name, repo, o)
	return courier.Result{ImageID: img.ID, Changed: changed}, err
}

func (e *errand) push(ctx context.Context) (res courier.Result, err error) {
	s, name, repo, err := e.open()
	if err != nil {
		return res, err
	}
	defer repo.Close()
	held, err := s.Hold(ctx, name.String())
	if err != nil {
		return res, err
	}
	defer held.Close()
	h, err := repo.Push(ctx, held, name.Tag, func(done, total int64) { e.step(courier.Answer{Pushed: &courier.Pushed{Done: done, Total: total}}) })
	return courier.Result{Digest: h.String()}, err
}
