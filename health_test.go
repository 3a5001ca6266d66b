package coffer

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/spec"
)

// TestHealthOf: what is asked for goes over what the image wants, and that over the defaults.
func TestHealthOf(t *testing.T) {
	sec := time.Second
	img := func(test ...string) *image.Healthcheck {
		return &image.Healthcheck{HealthConfig: v1.HealthConfig{Test: test, Interval: 7 * sec, Timeout: 8 * sec, StartPeriod: 9 * sec, Retries: 2}, StartInterval: 4 * sec}
	}
	for name, tc := range map[string]struct {
		own   *HealthCheck
		img   *image.Healthcheck
		shell []string
		want  *spec.Health
		err   string
	}{
		"nothing":                           {},
		"image's":                           {img: img("CMD", "a", "b c"), want: &spec.Health{Args: []string{"a", "b c"}, Interval: 7 * sec, Timeout: 8 * sec, StartPeriod: 9 * sec, StartInterval: 4 * sec, Retries: 2}},
		"defaults":                          {img: &image.Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD-SHELL", "x y"}}}, want: &spec.Health{Args: []string{"/bin/sh", "-c", "x y"}, Interval: 30 * sec, Timeout: 30 * sec, StartInterval: 5 * sec, Retries: 3}},
		"image's shell":                     {own: &HealthCheck{Test: []string{"CMD-SHELL", "x"}}, shell: []string{"/bin/bash", "-ec"}, want: &spec.Health{Args: []string{"/bin/bash", "-ec", "x"}, Interval: 30 * sec, Timeout: 30 * sec, StartInterval: 5 * sec, Retries: 3}},
		"over image's":                      {own: &HealthCheck{Test: []string{"CMD", "mine"}, Interval: sec, Retries: 9}, img: img("CMD", "a"), want: &spec.Health{Args: []string{"mine"}, Interval: sec, Timeout: 8 * sec, StartPeriod: 9 * sec, StartInterval: 4 * sec, Retries: 9}},
		"times only":                        {own: &HealthCheck{Timeout: sec, StartPeriod: 2 * sec, StartInterval: 3 * sec}, img: img("CMD", "a"), want: &spec.Health{Args: []string{"a"}, Interval: 7 * sec, Timeout: sec, StartPeriod: 2 * sec, StartInterval: 3 * sec, Retries: 2}},
		"none":                              {own: &HealthCheck{Test: []string{"NONE"}}, img: img("CMD", "a")},
		"image has none":                    {img: img("NONE")},
		"what the image means is not known": {img: img("curl", "x")},
		"the image names no command":        {img: img("CMD")},
		"none to change":                    {own: &HealthCheck{Interval: sec}, err: "has no health check to be changed"},
		"image's none to change":            {own: &HealthCheck{Interval: sec}, img: img("NONE"), err: "has no health check to be changed"},
		"unknown":                           {own: &HealthCheck{Test: []string{"x"}}, err: "use NONE, CMD"},
		"no command":                        {own: &HealthCheck{Test: []string{"CMD-SHELL"}}, err: "use NONE, CMD"},
		"short interval":                    {own: &HealthCheck{Test: []string{"CMD", "x"}, Interval: time.Microsecond}, err: "interval 1µs is too short: at least 1ms"},
		"negative timeout":                  {own: &HealthCheck{Test: []string{"CMD", "x"}, Timeout: -sec}, err: "timeout -1s is too short"},
		"short start period":                {own: &HealthCheck{Test: []string{"CMD", "x"}, StartPeriod: 1}, err: "start period 1ns"},
		"short start interval":              {own: &HealthCheck{Test: []string{"CMD", "x"}, StartInterval: 1}, err: "start interval 1ns"},
		"retries":                           {own: &HealthCheck{Test: []string{"CMD", "x"}, Retries: -1}, err: "-1 retries"},
		"image's that cannot be": {img: &image.Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD", "x"}, Interval: -sec, Timeout: 30, Retries: -1}},
			want: &spec.Health{Args: []string{"x"}, Interval: 30 * sec, Timeout: 30 * sec, StartInterval: 5 * sec, Retries: 3}},
	} {
		r := &Runtime{log: slog.New(slog.DiscardHandler)}
		got, err := r.health(t.Context(), Spec{Image: "i", Health: tc.own}, image.Config{Config: v1.Config{Shell: tc.shell}, Healthcheck: tc.img})
		if (err != nil) != (tc.err != "") || err != nil && (!strings.Contains(err.Error(), tc.err) || !errors.Is(err, ErrInvalid)) {
			t.Errorf("%s: error %v, want %q", name, err, tc.err)
		}
		if d := cmp.Diff(tc.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}
