package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/wire"
)

// health judges one generation by its checks, as Docker does.
//
// The agent runs them, but the shim keeps the time and the score: it is told first when the box is to stop, after which none is run; it
// is what writes records; and root in the box can stop the agent, which must not keep a box looking healthy.
type health struct {
	spec.Health
	run    func(context.Context) (wire.CheckReply, error)
	record func(context.Context, state.Health) error
	log    *slog.Logger

	changed chan struct{} // holds something when the status may not be on record
	started time.Time

	mu  sync.Mutex
	now Health
}

const (
	// maxResults is how many results are kept. They are in the shim's memory alone: not every check is worth a write.
	maxResults = 5
	// checkGrace is how long after its timeout the end of a check may take to arrive: the agent kills all that it has started.
	checkGrace = 15 * time.Second
	// recordPause is the least time between two records. A box whose checks flap as fast as they can must not fill the events, and
	// be in the way of others.
	recordPause = time.Second
)

func (s *shim) newHealth(agent *wire.Client) *health {
	p := s.box.Spec.Main
	check := *s.box.Spec.Health
	p.Args, p.TTY, p.Timeout = check.Args, false, check.Timeout
	id, generation := s.box.ID, s.box.Generation
	return makeHealth(check, s.log,
		func(ctx context.Context) (wire.CheckReply, error) {
			reply, err := agent.Check(ctx, p)
			if errors.Is(err, wire.ErrClosed) {
				select {
				case <-agent.Session().Done():
				default:
					err = errors.New("the box gave no answer") // it closed the stream, and lives
				}
			}
			return reply, err
		},
		func(ctx context.Context, to state.Health) error {
			c := state.Change{
				Generation: generation, Event: "health_status", Attrs: map[string]string{"status": string(to)},
				Dispensable: true, // the guest decides when there is one, and it is tried again
			}
			_, err := s.keeper.DB.Update(ctx, id, c, func(b *state.Box) error {
				if b.Phase != state.Running {
					return state.ErrStale
				}
				b.Health = to
				return nil
			})
			return err
		})
}

func makeHealth(check spec.Health, log *slog.Logger, run func(context.Context) (wire.CheckReply, error),
	record func(context.Context, state.Health) error) *health {
	return &health{Health: check, log: log, run: run, record: record, changed: make(chan struct{}, 1), started: time.Now(),
		now: Health{Status: state.HealthStarting}}
}

// report is the present state.
func (h *health) report() Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.now
	out.Log = slices.Clone(out.Log)
	return out
}

// watch has the box checked, one check after the other, until ctx ends. Then none runs, and nothing is recorded any more.
func (h *health) watch(ctx context.Context) {
	var records sync.WaitGroup
	records.Go(func() { h.keepRecord(ctx) })
	defer records.Wait()
	h.started = time.Now()
	t := time.NewTimer(h.pause())
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		early := time.Since(h.started) < h.StartPeriod // whatever is made of the host's clock meanwhile
		r, ok := h.check(ctx)
		if ctx.Err() != nil {
			return // that ended it, and not the box
		}
		if ok {
			h.judge(r, early)
		}
		t.Reset(h.pause())
	}
}

// pause is the time until the next check.
func (h *health) pause() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.now.Status == state.HealthStarting && time.Since(h.started) < h.StartPeriod {
		return h.StartInterval
	}
	return h.Interval
}

// check runs one check. It says nothing about a box that is ending.
func (h *health) check(ctx context.Context) (r HealthResult, ok bool) {
	r.Start = time.Now().UTC()
	limit, cancel := context.WithTimeout(ctx, min(h.Timeout, MaxStop)+checkGrace)
	defer cancel()
	reply, err := h.run(limit)
	r.End = time.Now().UTC()
	switch {
	case errors.Is(err, wire.ErrStopping), errors.Is(err, wire.ErrClosed):
		return r, false
	case err != nil && limit.Err() != nil:
		r.ExitCode, r.Output = -1, fmt.Sprintf("the box did not tell how the check ended, %v after its timeout of %v", checkGrace, h.Timeout)
	case err != nil:
		r.ExitCode, r.Output = -1, bounded([]byte(err.Error()), false)
	case reply.Exit.TimedOut:
		r.ExitCode = -1
		r.Output = bounded(append(fmt.Appendf(nil, "killed, for it had not ended after %v; its output:\n", h.Timeout), reply.Output...), reply.Cut)
	default:
		r.ExitCode, r.Output = reply.Exit.Code, bounded(reply.Output, reply.Cut)
	}
	return r, true
}

// bounded is a bounded string of what a box says.
func bounded(b []byte, cut bool) string {
	if len(b) > wire.MaxCheckOutput {
		b, cut = b[:wire.MaxCheckOutput], true
	}
	s := strings.ToValidUTF8(string(b), "\uFFFD")
	if cut {
		s += "..."
	}
	return s
}

// judge takes a result into account. Early is a check that began in the start period.
func (h *health) judge(r HealthResult, early bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now.Log = append(h.now.Log, r)
	if n := len(h.now.Log) - maxResults; n > 0 {
		h.now.Log = slices.Delete(h.now.Log, 0, n)
	}
	was := h.now.Status
	switch {
	case r.ExitCode == 0:
		h.now.Status, h.now.FailingStreak = state.Healthy, 0
	case was == state.HealthStarting && early:
	default:
		if h.now.FailingStreak++; h.now.FailingStreak >= h.Retries {
			h.now.Status = state.Unhealthy
		}
	}
	if h.now.Status != was {
		h.tell()
	}
}

func (h *health) tell() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// keepRecord records changes of the status until ctx ends.
func (h *health) keepRecord(ctx context.Context) {
	recorded := state.HealthStarting
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.changed:
		}
		if now := h.report().Status; now != recorded {
			err := h.record(ctx, now)
			switch {
			case err == nil:
				recorded = now
			case ctx.Err() != nil, errors.Is(err, state.ErrStale), errors.Is(err, state.ErrNotFound):
				return // the box is being stopped or removed
			default:
				h.log.Warn("health not recorded", "status", now, "error", err)
				h.tell()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(recordPause):
		}
	}
}
