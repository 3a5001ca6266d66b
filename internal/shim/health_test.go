//go:build linux

package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/wire"
)

// TestHealthRules follows boxes through time: when each check is run, and what is made of it.
func TestHealthRules(t *testing.T) {
	sec := time.Second
	for name, tc := range map[string]struct {
		check spec.Health
		codes string // of one check after the other; t: timeout, e: error, s: the box is stopping
		want  string // after each: second of its start, status, streak
	}{
		"retries": {
			spec.Health{Interval: 30 * sec, Retries: 3}, "11101110",
			"30 starting 1, 60 starting 2, 90 unhealthy 3, 120 healthy 0, 150 healthy 1, 180 healthy 2, 210 unhealthy 3, 240 healthy 0",
		},
		"every code but 0 is a failure": {
			spec.Health{Interval: 10 * sec, Retries: 5}, "12te3",
			"10 starting 1, 20 starting 2, 30 starting 3, 40 starting 4, 50 unhealthy 5",
		},
		"failures of the start period do not count": {
			spec.Health{Interval: 10 * sec, Retries: 1, StartPeriod: 35 * sec, StartInterval: 10 * sec}, "11111",
			"10 starting 0, 20 starting 0, 30 starting 0, 40 unhealthy 1, 50 unhealthy 2",
		},
		"a success ends the start period": {
			spec.Health{Interval: 20 * sec, Retries: 2, StartPeriod: 100 * sec, StartInterval: 5 * sec}, "1011",
			"5 starting 0, 10 healthy 0, 30 healthy 1, 50 unhealthy 2",
		},
		"a start period that is over is none": {
			spec.Health{Interval: 20 * sec, Retries: 2, StartPeriod: 12 * sec, StartInterval: 5 * sec}, "1111",
			"5 starting 0, 10 starting 0, 15 starting 1, 35 unhealthy 2",
		},
		"what is stopping is not judged": {
			spec.Health{Interval: 10 * sec, Retries: 1}, "s0s", "10 starting 0, 20 healthy 0, 30 healthy 0",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				ctx, cancel := context.WithCancel(t.Context())
				var got []string
				var h *health
				n := 0
				h = makeHealth(tc.check, slog.New(slog.DiscardHandler), func(context.Context) (wire.CheckReply, error) {
					if n > 0 {
						now := h.report()
						got[n-1] += fmt.Sprintf(" %s %d", now.Status, now.FailingStreak)
					}
					if n == len(tc.codes) {
						cancel()
						return wire.CheckReply{}, ctx.Err()
					}
					got = append(got, fmt.Sprint(int(time.Since(begun)/sec)))
					n++
					switch c := tc.codes[n-1]; c {
					case 't':
						return wire.CheckReply{Exit: wire.ExitStatus{TimedOut: true}}, nil
					case 'e':
						return wire.CheckReply{}, wire.ErrCommandNotFound
					case 's':
						return wire.CheckReply{}, wire.ErrStopping
					default:
						return wire.CheckReply{Exit: wire.ExitStatus{Code: int(c - '0')}}, nil
					}
				}, func(context.Context, state.Health) error { return nil })
				h.watch(ctx)
				if d := cmp.Diff(strings.Split(tc.want, ", "), got); d != "" {
					t.Error(d)
				}
				if len(h.report().Log) > maxResults {
					t.Errorf("%d results are kept", len(h.report().Log))
				}
			})
		})
	}
}

// TestHealthResults: what is kept of a check, and how much.
func TestHealthResults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		replies := []func(context.Context) (wire.CheckReply, error){
			func(context.Context) (wire.CheckReply, error) { return wire.CheckReply{Output: []byte("first")}, nil },
			func(context.Context) (wire.CheckReply, error) {
				time.Sleep(2 * time.Second)
				return wire.CheckReply{Exit: wire.ExitStatus{Code: 7}, Output: []byte("a\xffb")}, nil
			},
			func(context.Context) (wire.CheckReply, error) {
				return wire.CheckReply{Exit: wire.ExitStatus{Code: 137, TimedOut: true}, Output: []byte(strings.Repeat("x", wire.MaxCheckOutput))}, nil
			},
			func(context.Context) (wire.CheckReply, error) {
				return wire.CheckReply{}, errors.New(strings.Repeat("y", 2*wire.MaxCheckOutput))
			},
			func(ctx context.Context) (wire.CheckReply, error) { // an agent that was stopped
				<-ctx.Done()
				return wire.CheckReply{}, ctx.Err()
			},
			func(context.Context) (wire.CheckReply, error) {
				return wire.CheckReply{Output: []byte("last"), Cut: true}, nil
			},
		}
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		h := makeHealth(spec.Health{Interval: time.Second, Timeout: 3 * time.Second, Retries: 1}, slog.New(slog.DiscardHandler), func(ctx context.Context) (wire.CheckReply, error) {
			if n == len(replies) {
				cancel()
				return wire.CheckReply{}, ctx.Err()
			}
			n++
			return replies[n-1](ctx)
		}, func(context.Context, state.Health) error { return nil })
		h.watch(ctx)
		var got []string
		for _, r := range h.report().Log {
			got = append(got, fmt.Sprintf("%v %d %.20q %v", r.End.Sub(r.Start), r.ExitCode, r.Output, len(r.Output) > wire.MaxCheckOutput+3))
		}
		want := []string{
			`2s 7 "a�b" false`, `0s -1 "killed, for it had n" false`, `0s -1 "yyyyyyyyyyyyyyyyyyyy" false`,
			`18s -1 "the box did not tell" false`, `0s 0 "last..." false`,
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	})
}

// TestHealthRecords: only changes are recorded, flapping ones not as fast as they come, and failures of that are made up for.
func TestHealthRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		var records []string
		fail := errors.New("the disk is full")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		n := 0
		h := makeHealth(spec.Health{Interval: time.Millisecond, Timeout: time.Second, Retries: 1}, slog.New(slog.DiscardHandler), func(context.Context) (wire.CheckReply, error) {
			n++
			code := n % 2
			if time.Since(begun) > 5*time.Second {
				code = 0
			}
			return wire.CheckReply{Exit: wire.ExitStatus{Code: code}}, nil
		}, func(_ context.Context, to state.Health) error {
			if err := fail; err != nil {
				fail = nil
				return err
			}
			records = append(records, string(to))
			return nil
		})
		h.watch(ctx)
		if n < 5000 {
			t.Fatalf("%d checks", n)
		}
		if len(records) == 0 || len(records) > 7 || records[len(records)-1] != "healthy" {
			t.Errorf("of %d checks came the records %v", n, records)
		}
	})
}

// TestHealthOfALostBox: that the kernel of a box has ended is no failure of a check; that a box which lives gives no answer is one.
func TestHealthOfALostBox(t *testing.T) {
	for _, lives := range []bool{false, true} {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			s, err := wire.NewServer(theirs)
			if err != nil {
				return
			}
			defer s.Close()
			if _, st, err := s.Accept(context.Background()); err == nil {
				_, _ = st.Write([]byte{0, 0}) // in the middle of an answer
				if lives {
					st.Close()
					<-done
				}
			}
		}()
		sess, err := wire.NewClient(ours)
		if err != nil {
			t.Fatal(err)
		}
		s := &shim{log: slog.New(slog.DiscardHandler), box: &state.Box{Spec: spec.Box{Health: &spec.Health{Timeout: time.Minute}}}}
		if r, judged := s.newHealth(wire.NewClientOf(sess)).check(t.Context()); judged != lives || judged && r.ExitCode != -1 {
			t.Errorf("lives %v, judged %v: %+v", lives, judged, r)
		}
		close(done)
		sess.Close()
	}
}

// TestHealthEnds: a check does not keep a box from stopping, and what ended it is not held against the box.
func TestHealthEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		h := makeHealth(spec.Health{Interval: time.Second, Timeout: time.Hour, Retries: 1}, slog.New(slog.DiscardHandler),
			func(ctx context.Context) (wire.CheckReply, error) { <-ctx.Done(); return wire.CheckReply{}, ctx.Err() },
			func(context.Context, state.Health) error { t.Error("recorded"); return nil })
		ended := make(chan struct{})
		go func() { defer close(ended); h.watch(ctx) }()
		time.Sleep(time.Minute)
		cancel()
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Error("it is still watched")
		}
		if got := h.report(); got.Status != state.HealthStarting || len(got.Log) != 0 {
			t.Errorf("%+v", got)
		}
	})
}
