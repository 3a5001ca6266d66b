package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/coffer-box/coffer/test/observer"
)

// contender is one program that runs containers, and its words for the same things.
type contender struct {
	name    string
	env     []string
	version []string

	// prepare is what has to be there before id can be run; it is not measured.
	prepare func(ctx context.Context, id string, args []string) error
	run     func(id string, args ...string) []string // in the foreground, and gone afterwards
	up      func(id string) []string                 // a sleeping one, in the background
	exec    func(id string, args ...string) []string
	rm      func(id string) []string
	create  func(id string) []string // without starting it; nil: has none
	ps      []string
	marks   func() []string // by which the observer knows its processes
}

// idle is what a box does that does nothing.
func idle() []string { return []string{"sleep", "100000"} }

// cmd is a command of the contender's. Output goes to files, never to pipes, since a detached sandbox may keep a pipe open.
func (c *contender) cmd(ctx context.Context, argv []string) *exec.Cmd {
	k := exec.CommandContext(ctx, argv[0], argv[1:]...)
	k.Env = append(os.Environ(), c.env...)
	return k
}

// do runs a command that must succeed and returns what it printed.
func (c *contender) do(ctx context.Context, argv []string) (string, error) {
	out, err := os.CreateTemp("", "bench-out-")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	k := c.cmd(ctx, argv)
	k.Stdout, k.Stderr = out, out
	runErr := k.Run()
	b, err := os.ReadFile(out.Name())
	if runErr != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), runErr, bytes.TrimSpace(b))
	}
	return string(b), err
}

func none(context.Context, string, []string) error { return nil }

func newCoffer(bin, home string) *contender {
	return &contender{
		name: "coffer", env: []string{"COFFER_HOME=" + home}, version: []string{bin, "version"}, prepare: none,
		run:    func(_ string, args ...string) []string { return append([]string{bin, "run", "--rm", image}, args...) },
		up:     func(id string) []string { return append([]string{bin, "run", "-d", "--name", id, image}, idle()...) },
		exec:   func(id string, args ...string) []string { return append([]string{bin, "exec", id}, args...) },
		rm:     func(id string) []string { return []string{bin, "rm", "-f", id} },
		create: func(id string) []string { return append([]string{bin, "create", "--name", id, image}, idle()...) },
		ps:     []string{bin, "ps", "-a"},
		marks: func() []string {
			b, err := os.ReadFile(filepath.Join(home, "instance"))
			if err != nil {
				return []string{home}
			}
			return []string{home, "coffer-" + strings.TrimSpace(string(b))}
		},
	}
}

func newPodman(root string) *contender {
	global := []string{"podman", "--root", filepath.Join(root, "storage"), "--runroot", filepath.Join(root, "run"), "--tmpdir", filepath.Join(root, "tmp"),
		"--cgroup-manager=cgroupfs", "--events-backend=file", "--runtime=runc"}
	with := func(args ...string) []string { return append(append([]string(nil), global...), args...) }
	// The variable lets the observer know the process in the container, whose command line and files name nothing of the host's.
	flags := []string{"-e", "CBENCH=" + root, "--network=none", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=1000:1000"}
	boxed := func(verb []string, rest ...string) []string { return with(append(append(verb, flags...), rest...)...) }
	return &contender{
		name: "podman+runc", version: []string{"podman", "--version"}, prepare: none,
		run: func(_ string, args ...string) []string {
			return boxed([]string{"run", "--rm"}, append([]string{image}, args...)...)
		},
		up: func(id string) []string {
			return boxed([]string{"run", "-d", "--name", id}, append([]string{image}, idle()...)...)
		},
		exec: func(id string, args ...string) []string { return with(append([]string{"exec", id}, args...)...) },
		// Without -t 0 it would first wait ten seconds for a process that ignores the stop signal.
		rm: func(id string) []string { return with("rm", "-f", "-t", "0", id) },
		create: func(id string) []string {
			return boxed([]string{"create", "--name", id}, append([]string{image}, idle()...)...)
		},
		ps:    with("ps", "-a"),
		marks: func() []string { return []string{root} },
	}
}

func newRunc(root string, fs *rootfs) *contender {
	with := func(args ...string) []string {
		return append([]string{"runc", "--root", filepath.Join(root, "state")}, args...)
	}
	bundle := func(id string) string { return filepath.Join(root, "bundles", id) }
	return &contender{
		name: "runc", version: []string{"runc", "--version"},
		prepare: func(_ context.Context, id string, args []string) error {
			return writeBundle(bundle(id), runcSpec(id, fs.dir, args))
		},
		run:   func(id string, _ ...string) []string { return with("run", "--bundle", bundle(id), id) },
		up:    func(id string) []string { return with("run", "--detach", "--bundle", bundle(id), id) },
		exec:  func(id string, args ...string) []string { return with(append([]string{"exec", id}, args...)...) },
		rm:    func(id string) []string { return with("delete", "--force", id) },
		marks: func() []string { return []string{root, "/coffer-bench/"} },
	}
}

// newRunsc is gVisor's own runtime. With an image file it runs the very file that Coffer runs; else a directory.
func newRunsc(name, bin, root string, fs *rootfs, erofs, overlay string) *contender {
	global := []string{bin, "--root", filepath.Join(root, "state"), "--network=none", "--ignore-cgroups",
		"--gofer-network-namespace=new"} // else it leaves a mount behind; the time is the same
	if overlay != "" {
		global = append(global, "--overlay2="+overlay)
	}
	with := func(args ...string) []string { return append(append([]string(nil), global...), args...) }
	bundle := func(id string) string { return filepath.Join(root, "bundles", id) }
	return &contender{
		name: name, version: []string{bin, "--version"},
		prepare: func(_ context.Context, id string, args []string) error {
			dir := fs.dir
			if overlay == "none" {
				// This one writes into the directory itself.
				dir = filepath.Join(root, "copy")
				if err := os.MkdirAll(root, 0o755); err != nil {
					return err
				}
				if out, err := exec.Command("cp", "-a", "-T", fs.dir, dir).CombinedOutput(); err != nil {
					return fmt.Errorf("copy the root file system: %w: %s", err, out)
				}
			}
			return writeBundle(bundle(id), runscSpec(dir, erofs, args))
		},
		run:   func(id string, _ ...string) []string { return with("run", "--bundle", bundle(id), id) },
		up:    func(id string) []string { return with("run", "--detach", "--bundle", bundle(id), id) },
		exec:  func(id string, args ...string) []string { return with(append([]string{"exec", id}, args...)...) },
		rm:    func(id string) []string { return with("delete", "--force", id) },
		marks: func() []string { return []string{root} },
	}
}

// pss is the proportional share of memory of all that a contender runs, in bytes, and of how many processes.
func (c *contender) pss() (int64, int, error) {
	var sum int64
	ps := observer.Processes(c.marks()...)
	for _, p := range ps {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(p.PID) + "/smaps_rollup")
		if err != nil {
			return 0, 0, fmt.Errorf("memory of %s: %w", p, err)
		}
		kb, err := field(b, "Pss:")
		if err != nil {
			return 0, 0, fmt.Errorf("memory of %s: %w", p, err)
		}
		sum += kb << 10
	}
	if len(ps) == 0 {
		return 0, 0, errors.New("memory of " + c.name + ": no process found")
	}
	return sum, len(ps), nil
}

func field(b []byte, name string) (int64, error) {
	for line := range bytes.Lines(b) {
		if f := strings.Fields(string(line)); len(f) > 1 && f[0] == name {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s", name)
}
