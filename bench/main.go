// Command bench measures Coffer beside gVisor's own runtime, runc and podman: in one run, on one root file system, in turns, so that
// what the machine does meanwhile hits all of them alike. It needs root, and `make build` before it. It measures and reports; whether a
// change is allowed is decided by tests, which never judge time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

const image = "localhost/coffer-bench:1"

type options struct {
	n, files, boxes, idle, burst int
	bin, runsc, out, tmp, only   string
}

func main() {
	var o options
	flag.IntVar(&o.n, "n", 10, "how often each thing is measured")
	flag.IntVar(&o.files, "files", 10, "how often the file systems are measured; 0 leaves them out")
	flag.IntVar(&o.boxes, "boxes", 100, "boxes that ps lists")
	flag.IntVar(&o.idle, "idle", 10, "idle boxes whose memory is measured")
	flag.IntVar(&o.burst, "burst", 20, "boxes started at once")
	flag.StringVar(&o.bin, "coffer", "bin/coffer", "the program to measure")
	flag.StringVar(&o.runsc, "runsc", "", "gVisor's runtime; empty: build it from bench/runsc")
	flag.StringVar(&o.out, "out", "bench/results", "directory for the report")
	flag.StringVar(&o.tmp, "tmp", "/tmp", "where to work; its file system is what the file numbers are about")
	flag.StringVar(&o.only, "only", "", "measure only this part: run, exec, rm, ps, memory, burst, pull, files; the report's name tells")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("run this as root: runc, podman and bare runsc need it here")
	}
	for _, p := range []string{"podman", "runc", "busybox"} {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%s is compared with: apt-get install --no-install-recommends podman runc busybox-static", p)
		}
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(o.tmp, "cbench-")
	if err != nil {
		return err
	}
	s := &session{o: o, tmp: tmp, log: os.Stderr, rep: newReport(ctx, o, tmp)}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.setUp(ctx); err != nil {
		return err
	}
	measured := false
	for _, part := range []struct {
		name string
		fn   func(context.Context) error
	}{
		{"run", s.measureRun}, {"exec", s.measureExec}, {"rm", s.measureRemove}, {"ps", s.measureList},
		{"memory", s.measureMemory}, {"burst", s.measureBurst}, {"pull", s.measurePull}, {"files", s.measureFiles},
	} {
		if o.only != "" && o.only != part.name {
			continue
		}
		measured = true
		start := time.Now()
		if err := part.fn(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		s.say("%s: measured in %s", part.name, time.Since(start).Round(time.Second))
	}
	if !measured {
		return fmt.Errorf("-only %s: there is no such part", o.only)
	}
	s.rep.Load = append(s.rep.Load, loadAverage())
	return s.rep.write(o.out, os.Stdout)
}
