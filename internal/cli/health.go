package cli

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"github.com/coffer-box/coffer"
)

// healthFlags say how a box is checked.
type healthFlags struct {
	cmd                                           string
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int
	none                                          bool
}

func (o *healthFlags) add(f *pflag.FlagSet) {
	f.StringVar(&o.cmd, "health-cmd", "", "command, for the image's shell, that exits with 0 while the box is healthy")
	f.DurationVar(&o.interval, "health-interval", 0, "time between health checks (default: the image's, else 30s)")
	f.DurationVar(&o.timeout, "health-timeout", 0, "kill a health check after this time (default: the image's, else 30s)")
	f.DurationVar(&o.startPeriod, "health-start-period", 0, "do not count failures within this time, before a first success (default: the image's, else none)")
	f.DurationVar(&o.startInterval, "health-start-interval", 0, "time between health checks in the start period (default: the image's, else 5s)")
	f.IntVar(&o.retries, "health-retries", 0, "failures in a row that make a box unhealthy (default: the image's, else 3)")
	f.BoolVar(&o.none, "no-healthcheck", false, "do not run the image's health check")
}

// check is what the flags ask for; nil where they ask for nothing. As with Docker, 0 is the same as to leave a flag out.
func (o *healthFlags) check() (*coffer.HealthCheck, error) {
	for _, d := range []struct {
		flag string
		time.Duration
	}{{"interval", o.interval}, {"timeout", o.timeout}, {"start-period", o.startPeriod}, {"start-interval", o.startInterval}} {
		if d.Duration < 0 {
			return nil, fmt.Errorf("--health-%s cannot be negative", d.flag)
		}
	}
	if o.retries < 0 {
		return nil, errors.New("--health-retries cannot be negative")
	}
	given := o.cmd != "" || o.retries > 0 || max(o.interval, o.timeout, o.startPeriod, o.startInterval) > 0
	switch {
	case o.none && given:
		return nil, errors.New("--no-healthcheck conflicts with the --health-* flags: use one or the other")
	case o.none:
		return &coffer.HealthCheck{Test: []string{"NONE"}}, nil
	case !given:
		return nil, nil
	}
	h := &coffer.HealthCheck{Interval: o.interval, Timeout: o.timeout, StartPeriod: o.startPeriod, StartInterval: o.startInterval, Retries: o.retries}
	if o.cmd != "" {
		h.Test = []string{"CMD-SHELL", o.cmd}
	}
	return h, nil
}
