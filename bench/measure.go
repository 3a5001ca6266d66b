package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// settling lets what a contender's command left running come to its end, before it is charged to the next one's turn: podman's exec
// returns before its clean-up, which doubled what was measured after it.
const settling = time.Second

// turns measures every contender once per round, and throws the first round away: it warms caches.
func (s *session) turns(ctx context.Context, metric, unit string, n int, cs []*contender, once func(*contender) (float64, []string, error)) error {
	for round := range n + 1 {
		for _, c := range cs {
			if err := pause(ctx, settling); err != nil {
				return err
			}
			v, argv, err := once(c)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if round > 0 {
				s.rep.add(metric, c.name, unit, v, argv)
			}
		}
	}
	return nil
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (s *session) measureRun(ctx context.Context) error {
	return s.turns(ctx, "run", "ms", s.o.n, s.everyone(), func(c *contender) (float64, []string, error) {
		id, args := s.id(), []string{"true"}
		if err := c.prepare(ctx, id, args); err != nil {
			return 0, nil, err
		}
		argv := c.run(id, args...)
		d, err := timed(ctx, c, argv)
		if err == nil && (c == s.runc || c == s.runscDir || c == s.runscFile) {
			_, _ = c.do(ctx, c.rm(id)) // `run` has deleted it already
		}
		return millis(d), argv, err
	})
}

func (s *session) measureExec(ctx context.Context) error {
	ids := map[*contender]string{}
	for _, c := range s.everyone() {
		id, err := s.start(ctx, c)
		if err != nil {
			return err
		}
		ids[c] = id
	}
	err := s.turns(ctx, "exec", "ms", s.o.n, s.everyone(), func(c *contender) (float64, []string, error) {
		argv := c.exec(ids[c], "true")
		d, err := timed(ctx, c, argv)
		return millis(d), argv, err
	})
	if err != nil {
		return err
	}
	for c, id := range ids {
		if err := s.remove(ctx, c, id); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) measureRemove(ctx context.Context) error {
	return s.turns(ctx, "rm", "ms", s.o.n, s.everyone(), func(c *contender) (float64, []string, error) {
		id, err := s.start(ctx, c)
		if err != nil {
			return 0, nil, err
		}
		argv := c.rm(id)
		d, err := timed(ctx, c, argv)
		if err == nil {
			s.forget(id)
		}
		return millis(d), argv, err
	})
}

// measureList lists many boxes of which some run.
func (s *session) measureList(ctx context.Context) error {
	cs := []*contender{s.coffer, s.podman}
	from := len(s.alive)
	for _, c := range cs {
		for i := range s.o.boxes {
			if i < s.o.idle {
				if _, err := s.start(ctx, c); err != nil {
					return err
				}
				continue
			}
			id := s.id()
			s.alive = append(s.alive, box{c, id})
			if _, err := c.do(ctx, c.create(id)); err != nil {
				return err
			}
		}
	}
	err := s.turns(ctx, "ps", "ms", s.o.n, cs, func(c *contender) (float64, []string, error) {
		d, err := timed(ctx, c, c.ps)
		return millis(d), c.ps, err
	})
	if err != nil {
		return err
	}
	out, err := s.coffer.do(ctx, s.coffer.ps)
	if err != nil {
		return err
	}
	if n := strings.Count(out, "\n") - 1; n != s.o.boxes {
		return fmt.Errorf("ps listed %d boxes, want %d", n, s.o.boxes)
	}
	for _, b := range append([]box(nil), s.alive[from:]...) {
		if err := s.remove(ctx, b.c, b.id); err != nil {
			return err
		}
	}
	return nil
}

// measureMemory weighs all processes of a number of idle boxes. One contender at a time: pages that two share would be halved.
func (s *session) measureMemory(ctx context.Context) error {
	for _, c := range []*contender{s.coffer, s.runscFile, s.runscDir, s.podman} {
		var ids []string
		for range s.o.idle {
			id, err := s.start(ctx, c)
			if err != nil {
				return err
			}
			ids = append(ids, id)
		}
		for range s.o.n {
			sum, procs, err := c.pss()
			if err != nil {
				return err
			}
			s.rep.add("memory", c.name, "MiB", float64(sum)/float64(s.o.idle)/(1<<20), c.up("ID"))
			s.rep.Processes[c.name] = float64(procs) / float64(s.o.idle)
			// What is weighed is a state; the pause lets collectors of garbage do what they do in idle boxes.
			if err := pause(ctx, 500*time.Millisecond); err != nil {
				return err
			}
		}
		for _, id := range ids {
			if err := s.remove(ctx, c, id); err != nil {
				return err
			}
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// measureBurst starts many at once, and counts those that do not come up.
func (s *session) measureBurst(ctx context.Context) error {
	return s.turns(ctx, "burst", "ms", s.o.n, []*contender{s.coffer, s.runscFile, s.podman}, func(c *contender) (float64, []string, error) {
		ids := make([]string, s.o.burst)
		for i := range ids {
			ids[i] = s.id()
			if err := c.prepare(ctx, ids[i], idle()); err != nil {
				return 0, nil, err
			}
			s.alive = append(s.alive, box{c, ids[i]})
		}
		errs := make([]error, len(ids))
		var wg sync.WaitGroup
		start := time.Now()
		for i, id := range ids {
			wg.Go(func() { _, errs[i] = c.do(ctx, c.up(id)) })
		}
		wg.Wait()
		d := time.Since(start)
		for i, id := range ids {
			err := errs[i]
			if err == nil {
				_, err = c.do(ctx, c.exec(id, "true"))
			}
			if err != nil {
				s.rep.Failed[c.name]++
				s.say("burst: %v", err)
			}
			if _, err := c.do(ctx, c.rm(id)); err != nil && errs[i] == nil {
				return 0, nil, err
			}
			s.forget(id)
		}
		return millis(d), c.up("ID"), nil
	})
}

// measureFiles compares places where a box's files can live.
func (s *session) measureFiles(ctx context.Context) error {
	if s.o.files == 0 {
		return nil
	}
	shared := filepath.Join(s.tmp, "volume")
	if err := os.Mkdir(shared, 0o777); err != nil {
		return err
	}
	host := &contender{name: "host", prepare: none, run: func(id string, _ ...string) []string {
		return []string{filepath.Join(s.tmp, "work"), filepath.Join(shared, id)}
	}}
	vol := newCoffer(s.o.bin, filepath.Join(s.tmp, "home"))
	vol.name = "coffer, volume"
	vol.run = func(id string, _ ...string) []string {
		return []string{s.o.bin, "run", "--rm", "-v", shared + ":/v", image, "work", "/v/" + id}
	}
	written := newRunsc("runsc (directory, written through)", s.o.runsc, filepath.Join(s.tmp, "rw"), s.fs, "", "none")
	places := []*contender{host, s.runc, s.coffer, vol, s.runscFile, s.runscDir, written}
	for round := range s.o.files + 1 {
		for _, c := range places {
			if err := ctx.Err(); err != nil {
				return err
			}
			id := s.id()
			args := []string{"work", "/root/" + id}
			if err := c.prepare(ctx, id, args); err != nil {
				return err
			}
			argv := c.run(id, args...)
			out, err := c.do(ctx, argv)
			if err != nil {
				return err
			}
			var took map[string]int64
			if err := json.Unmarshal([]byte(out), &took); err != nil {
				return fmt.Errorf("%s: %w: %q", c.name, err, out)
			}
			if round > 0 {
				for step, ns := range took {
					s.rep.add("files/"+step, c.name, "ms", millis(time.Duration(ns)), argv)
				}
			}
			_ = os.RemoveAll(filepath.Join(s.fs.dir, "root", id))
			_ = os.RemoveAll(filepath.Join(shared, id))
		}
	}
	return nil
}
