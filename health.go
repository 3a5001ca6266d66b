package coffer

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/shim"
	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
)

// HealthCheck is a command that is run in the box, one time after the other, as the main process' user, in its environment and
// directory. While it exits with 0 the box is healthy. What is left empty or 0 comes from the image, else from Docker's defaults.
type HealthCheck struct {
	// Test is "CMD" and a command with its arguments, "CMD-SHELL" and a line for the image's shell, or "NONE" for no check at all.
	Test        []string
	Interval    time.Duration // from the end of one check to the next, and from the start to the first; default 30 s
	Timeout     time.Duration // of a check, which is killed then, with all of its session, and has failed; default 30 s
	StartPeriod time.Duration // failures before the first success do not count in this time; default none
	// StartInterval is the interval during the start period, until the first success; default 5 s.
	StartInterval time.Duration
	Retries       int // failures in a row that make the box unhealthy; default 3
}

// Health is what the checks of a running box have shown since its start. Nothing of it outlives that run.
type Health = shim.Health

// HealthResult is how one check ended.
type HealthResult = shim.HealthResult

// What a health check does where neither image nor user say so, as with Docker.
const (
	healthInterval      = 30 * time.Second
	healthTimeout       = 30 * time.Second
	healthStartInterval = 5 * time.Second
	healthRetries       = 3
)

// health works out how a box is to be checked; nil: not at all.
func (r *Runtime) health(ctx context.Context, s Spec, conf image.Config) (*spec.Health, error) {
	var own HealthCheck
	if s.Health != nil {
		own = *s.Health
	}
	var of image.Healthcheck
	if conf.Healthcheck != nil {
		of = *conf.Healthcheck
	}
	test := own.Test
	if len(test) == 0 {
		test = of.Test
	}
	if len(test) == 0 || test[0] == "NONE" {
		if len(own.Test) == 0 && s.Health != nil {
			return nil, invalid("image %s has no health check to be changed: give a command for one", s.Image)
		}
		return nil, nil
	}
	r.dropBad(ctx, s.Image, &of)
	h := &spec.Health{
		Args:     slices.Clone(test[1:]),
		Interval: cmp.Or(own.Interval, of.Interval, healthInterval), Timeout: cmp.Or(own.Timeout, of.Timeout, healthTimeout),
		StartPeriod: cmp.Or(own.StartPeriod, of.StartPeriod), StartInterval: cmp.Or(own.StartInterval, of.StartInterval, healthStartInterval),
		Retries: cmp.Or(own.Retries, of.Retries, healthRetries),
	}
	for _, d := range []struct {
		name string
		time.Duration
	}{{"interval", h.Interval}, {"timeout", h.Timeout}, {"start period", h.StartPeriod}, {"start interval", h.StartInterval}} {
		if d.Duration != 0 && d.Duration < image.MinHealthTime {
			return nil, invalid("health check: %s %v is too short: at least %v", d.name, d.Duration, image.MinHealthTime)
		}
	}
	if h.Retries < 0 {
		return nil, invalid("health check: %d retries are too few: at least 1", h.Retries)
	}
	switch known := test[0] == "CMD" || test[0] == "CMD-SHELL"; {
	case known && len(h.Args) > 0:
	case len(own.Test) > 0:
		return nil, invalid("health check %q: use NONE, CMD and a command, or CMD-SHELL and a line for a shell", test)
	default:
		// Such images run elsewhere, and are not checked there.
		r.log.WarnContext(ctx, "the image's health check is not understood", "image", s.Image, "test", test)
		return nil, nil
	}
	if test[0] == "CMD-SHELL" {
		shell := conf.Shell
		if len(shell) == 0 {
			shell = []string{"/bin/sh", "-c"}
		}
		h.Args = slices.Concat(shell, h.Args)
	}
	return h, nil
}

// dropBad lets an image's check go by the defaults where it says what cannot be. Such images run elsewhere.
func (r *Runtime) dropBad(ctx context.Context, name string, of *image.Healthcheck) {
	for _, d := range []*time.Duration{&of.Interval, &of.Timeout, &of.StartPeriod, &of.StartInterval} {
		if *d != 0 && *d < image.MinHealthTime {
			r.log.WarnContext(ctx, "a time of the image's health check is too short, and not kept to", "image", name, "time", *d)
			*d = 0
		}
	}
	if of.Retries < 0 {
		of.Retries = 0
	}
}

// healthOf asks the box's supervisor, which alone knows more than the status. If it does not answer, the status on record has to do.
func (b *Box) healthOf(ctx context.Context, rec *state.Box) *Health {
	out := recordedHealth(rec)
	if out == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	c, err := b.rt.dial(ctx, rec)
	if err == nil {
		defer c.Close()
		var now Health
		if err = c.Call(ctx, shim.OpHealth, nil, &now); err == nil {
			return &now
		}
	}
	b.rt.log.DebugContext(ctx, "no word of the box's health", "box", rec.Name, "error", err)
	return out
}

// recordedHealth is nil for a box that is not checked, or does not run.
func recordedHealth(rec *state.Box) *Health {
	if rec.Phase != state.Running || rec.Health == "" {
		return nil
	}
	return &Health{Status: rec.Health}
}
