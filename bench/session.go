package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// session is one run of the benchmark.
type session struct {
	o   options
	tmp string
	log io.Writer
	rep *report
	fs  *rootfs

	coffer, podman, runc, runscFile, runscDir *contender
	erofs                                     string
	alive                                     []box // removed at the end, whatever happens
	seq                                       int
}

type box struct {
	c  *contender
	id string
}

func (s *session) say(f string, args ...any) { fmt.Fprintf(s.log, f+"\n", args...) }

// everyone is who takes part in most comparisons.
func (s *session) everyone() []*contender {
	return []*contender{s.coffer, s.runscFile, s.runscDir, s.runc, s.podman}
}

func (s *session) setUp(ctx context.Context) error {
	work := filepath.Join(s.tmp, "work")
	if err := goBuild(ctx, "bench/work", work); err != nil {
		return err
	}
	if s.o.runsc == "" {
		s.say("building gVisor's runtime")
		s.o.runsc = filepath.Join(s.tmp, "runsc")
		if err := goBuild(ctx, "bench/runsc", s.o.runsc); err != nil {
			return err
		}
	}
	var err error
	if s.fs, err = makeRootfs(ctx, s.tmp, work); err != nil {
		return err
	}
	s.coffer = newCoffer(s.o.bin, filepath.Join(s.tmp, "home"))
	s.podman = newPodman(filepath.Join(s.tmp, "podman"))
	for c, argv := range map[*contender][]string{
		s.coffer: {s.o.bin, "import", s.fs.tar, image},
		s.podman: append(append([]string(nil), s.podman.ps[:len(s.podman.ps)-2]...), "import", s.fs.tar, image),
	} {
		if _, err := c.do(ctx, argv); err != nil {
			return err
		}
	}
	files, err := filepath.Glob(filepath.Join(s.tmp, "home/images/rootfs/*.erofs"))
	if err != nil {
		return err
	}
	if len(files) != 1 {
		return fmt.Errorf("expected one image file in the home, found %d", len(files))
	}
	s.erofs = files[0]
	s.runc = newRunc(filepath.Join(s.tmp, "runc"), s.fs)
	s.runscFile = newRunsc("runsc (image file)", s.o.runsc, filepath.Join(s.tmp, "rf"), s.fs, s.erofs, "")
	s.runscDir = newRunsc("runsc (directory)", s.o.runsc, filepath.Join(s.tmp, "rd"), s.fs, "", "")
	for _, c := range s.everyone() {
		v, err := c.do(ctx, c.version)
		if err != nil {
			return err
		}
		s.rep.Versions[c.name] = strings.Join(strings.Fields(v), " ")
	}
	return nil
}

func goBuild(ctx context.Context, dir, to string) error {
	c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w -X gvisor.dev/gvisor/runsc/version.version=bench", "-o", to, ".")
	c.Dir, c.Env = dir, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", dir, err, out)
	}
	return nil
}

func (s *session) id() string {
	s.seq++
	return "cbench-" + strconv.Itoa(os.Getpid()) + "-" + strconv.Itoa(s.seq)
}

// start brings an idle box up; close removes it if nothing else has.
func (s *session) start(ctx context.Context, c *contender) (string, error) {
	id := s.id()
	if err := c.prepare(ctx, id, idle()); err != nil {
		return "", err
	}
	s.alive = append(s.alive, box{c, id})
	_, err := c.do(ctx, c.up(id))
	return id, err
}

func (s *session) remove(ctx context.Context, c *contender, id string) error {
	if _, err := c.do(ctx, c.rm(id)); err != nil {
		return err
	}
	s.forget(id)
	return nil
}

func (s *session) forget(id string) {
	for i, b := range s.alive {
		if b.id == id {
			s.alive = append(s.alive[:i], s.alive[i+1:]...)
			return
		}
	}
}

// close leaves the machine as it was.
func (s *session) close() error {
	ctx, stop := context.WithTimeout(context.Background(), 5*time.Minute)
	defer stop()
	var errs []error
	for _, b := range s.alive {
		if _, err := b.c.do(ctx, b.c.rm(b.id)); err != nil {
			errs = append(errs, err)
		}
	}
	for _, c := range []*contender{s.coffer, s.podman, s.runc, s.runscFile, s.runscDir} {
		if c == nil {
			continue
		}
		if _, n, err := c.pss(); err == nil {
			errs = append(errs, fmt.Errorf("%s: %d processes are left, with %v in their command line, files or control group", c.name, n, c.marks()))
		}
	}
	if s.podman != nil {
		// Its storage holds mounts that it alone takes down.
		_, err := s.podman.do(ctx, append(append([]string(nil), s.podman.ps[:len(s.podman.ps)-2]...), "system", "reset", "--force"))
		errs = append(errs, err)
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/coffer-bench")
	for _, g := range append(groups, "/sys/fs/cgroup/coffer-bench") {
		_ = os.Remove(g) // runc has left the parent that it made
	}
	return errors.Join(append(errs, os.RemoveAll(s.tmp))...)
}

// timed is how long a command takes from its start to its end.
func timed(ctx context.Context, c *contender, argv []string) (time.Duration, error) {
	start := time.Now()
	_, err := c.do(ctx, argv)
	return time.Since(start), err
}
