package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/coffer-box/coffer"
)

// boxFlags are the flags that describe a box, of run and create.
type boxFlags struct {
	env, envFiles, labels, ulimits, tmpfs, volumes []string
	name, dir, user, entrypoint, hostname          string
	memory, disk, restart, stopSignal, engine      string
	cpus                                           float64
	pids                                           int64
	stopTimeout                                    int
	timeout                                        time.Duration
	tty, stdin, rm, readOnly, bestEffort           bool
	pull                                           string
	pulling                                        pullFlags
	health                                         healthFlags
}

func (o *boxFlags) add(f *pflag.FlagSet) {
	f.SetInterspersed(false)
	f.StringArrayVarP(&o.env, "env", "e", nil, "set an environment variable (NAME=value, or NAME to pass it on)")
	f.StringArrayVar(&o.envFiles, "env-file", nil, "read environment variables from a file")
	f.StringArrayVarP(&o.labels, "label", "l", nil, "set a label (key=value)")
	f.StringArrayVar(&o.ulimits, "ulimit", nil, "set a resource limit (name=soft[:hard])")
	f.StringArrayVar(&o.tmpfs, "tmpfs", nil, "mount a file system in memory (path[:size=64m,mode=1777,exec,suid,dev,ro])")
	f.StringArrayVarP(&o.volumes, "volume", "v", nil, "show a file or directory of the host (host:box[:ro]), or make an anonymous volume that begins with what the image has there (box)")
	f.StringVar(&o.name, "name", "", "name of the box")
	f.StringVarP(&o.dir, "workdir", "w", "", "working directory in the box")
	f.StringVarP(&o.user, "user", "u", "", "user in the box (name|uid[:group|gid])")
	f.StringVar(&o.entrypoint, "entrypoint", "", "replace the image's entrypoint")
	f.StringVar(&o.hostname, "hostname", "", "host name in the box")
	f.StringVarP(&o.memory, "memory", "m", "", "memory limit (bytes, or with k, m, g)")
	f.Float64Var(&o.cpus, "cpus", 0, "limit of processors, in cores")
	f.Int64Var(&o.pids, "pids-limit", 0, "limit of processes and threads on the host, the box's kernel included")
	f.StringVar(&o.disk, "disk-size", "", "limit of what the box writes to disk, its anonymous volumes included (bytes, or with k, m, g)")
	f.BoolVar(&o.bestEffort, "limits-best-effort", false, "run without the limits that this host cannot enforce")
	f.StringVar(&o.restart, "restart", "no", "restart policy: no, on-failure[:max], always")
	f.StringVar(&o.stopSignal, "stop-signal", "", "signal that stops the box")
	f.IntVar(&o.stopTimeout, "stop-timeout", 10, "seconds between the stop signal and the kill")
	f.DurationVar(&o.timeout, "timeout", 0, "stop the box after this time (30s, 5m)")
	f.StringVar(&o.engine, "engine", "auto", "what gives the box its kernel: auto, gvisor")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the main process a terminal")
	f.BoolVarP(&o.stdin, "interactive", "i", false, "connect standard input")
	f.BoolVar(&o.rm, "rm", false, "remove the box when its main process has ended")
	f.BoolVar(&o.readOnly, "read-only", false, "make the root file system read-only")
	f.StringVar(&o.pull, "pull", coffer.PullMissing, "when to pull the image: missing, always, never")
	o.pulling.add(f)
	o.health.add(f)
}

func (o *boxFlags) spec(a *app, f *pflag.FlagSet, args []string) (coffer.Spec, error) {
	s := coffer.Spec{Image: args[0], Name: o.name, Dir: o.dir, User: o.user, Hostname: o.hostname, TTY: o.tty, Stdin: o.stdin, CPUs: o.cpus,
		PIDs: o.pids, BestEffort: o.bestEffort, ReadOnly: o.readOnly, StopSignal: o.stopSignal, Remove: o.rm, Timeout: o.timeout, Engine: o.engine,
		Pull: o.pull, Platform: o.pulling.platform}
	if len(args) > 1 {
		s.Cmd = args[1:]
	}
	if f.Changed("entrypoint") {
		s.Entrypoint = []string{}
		if o.entrypoint != "" {
			s.Entrypoint = []string{o.entrypoint}
		}
	}
	if f.Changed("stop-timeout") {
		d, err := seconds("stop-timeout", o.stopTimeout)
		if err != nil {
			return s, err
		}
		s.StopTimeout = &d
	}
	for _, positive := range []struct {
		flag string
		bad  bool
	}{{"cpus", o.cpus <= 0}, {"pids-limit", o.pids <= 0}, {"timeout", o.timeout <= 0}} {
		if f.Changed(positive.flag) && positive.bad {
			return s, fmt.Errorf("--%s must be more than 0; leave it out for no limit", positive.flag)
		}
	}
	var err error
	if s.Health, err = o.health.check(); err != nil {
		return s, err
	}
	if s.PullProgress, err = a.progress(o.pulling.progress); err != nil {
		return s, err
	}
	if s.Env, err = environment(o.env, o.envFiles); err != nil {
		return s, err
	}
	if s.Labels, err = pairs("label", o.labels); err != nil {
		return s, err
	}
	for _, size := range []struct {
		flag, value string
		to          *int64
	}{{"memory", o.memory, &s.Memory}, {"disk-size", o.disk, &s.DiskSize}} {
		if !f.Changed(size.flag) {
			continue
		}
		if *size.to, err = units.RAMInBytes(size.value); err != nil || *size.to <= 0 {
			return s, fmt.Errorf("--%s %q: use a positive number of bytes, or one with k, m or g", size.flag, size.value)
		}
	}
	if s.Restart, err = restartPolicy(o.restart); err != nil {
		return s, err
	}
	for _, u := range o.ulimits {
		l, err := units.ParseUlimit(u)
		if err != nil {
			return s, fmt.Errorf("--ulimit %q: %w: use name=soft[:hard]", u, err)
		}
		s.Rlimits = append(s.Rlimits, coffer.Rlimit{Name: l.Name, Soft: uint64(l.Soft), Hard: uint64(l.Hard)})
	}
	for _, t := range o.tmpfs {
		m, err := tmpfs(t)
		if err != nil {
			return s, err
		}
		s.Tmpfs = append(s.Tmpfs, m)
	}
	for _, v := range o.volumes {
		m, err := volume(v)
		if err != nil {
			return s, err
		}
		s.Volumes = append(s.Volumes, m)
	}
	return s, nil
}

func environment(vars, files []string) ([]string, error) {
	var out []string
	add := func(kv string) error {
		k, _, ok := strings.Cut(kv, "=")
		if k == "" || strings.ContainsRune(kv, 0) {
			return fmt.Errorf("environment variable %q: use NAME=value", kv)
		}
		if ok {
			out = append(out, kv)
		} else if v, found := os.LookupEnv(k); found {
			out = append(out, k+"="+v)
		}
		return nil
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("environment file: %w", err)
		}
		sc := bufio.NewScanner(f)
		for sc.Scan() {
			line := strings.TrimSpace(sc.Text())
			if line == "" || line[0] == '#' {
				continue
			}
			if err := add(line); err != nil {
				f.Close()
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		f.Close()
		if sc.Err() != nil {
			return nil, fmt.Errorf("environment file %s: %w", path, sc.Err())
		}
	}
	for _, kv := range vars {
		if err := add(kv); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func pairs(flag string, in []string) (map[string]string, error) {
	out := map[string]string{}
	for _, kv := range in {
		k, v, _ := strings.Cut(kv, "=")
		if k == "" {
			return nil, fmt.Errorf("--%s %q: use key=value", flag, kv)
		}
		out[k] = v
	}
	return out, nil
}

func restartPolicy(s string) (coffer.Restart, error) {
	name, count, has := strings.Cut(s, ":")
	r := coffer.Restart{Policy: name}
	if !has {
		return r, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || name != "on-failure" {
		return r, fmt.Errorf("--restart %q: use no, on-failure[:max] or always", s)
	}
	r.Max = n
	return r, nil
}

func tmpfs(s string) (coffer.Tmpfs, error) {
	target, opts, _ := strings.Cut(s, ":")
	t := coffer.Tmpfs{Target: target}
	for o := range strings.SplitSeq(opts, ",") {
		k, v, _ := strings.Cut(o, "=")
		var err error
		switch k {
		case "":
		case "rw", "ro":
			t.ReadOnly = k == "ro"
		case "exec", "noexec":
			t.Exec = k == "exec"
		case "suid", "nosuid":
			t.SUID = k == "suid"
		case "dev", "nodev":
			t.Dev = k == "dev"
		case "size":
			t.Size, err = units.RAMInBytes(v)
		case "mode":
			var m uint64
			m, err = strconv.ParseUint(v, 8, 32)
			t.Mode = uint32(m)
		default:
			err = errors.New("unknown option " + strconv.Quote(k))
		}
		if err != nil {
			return t, fmt.Errorf("--tmpfs %q: %w: use path[:size=64m,mode=1777,exec,suid,dev,ro]", s, err)
		}
	}
	return t, nil
}

func volume(s string) (coffer.Volume, error) {
	p := strings.Split(s, ":")
	v := coffer.Volume{}
	switch {
	case len(p) == 1:
		v.Target = p[0]
	case len(p) == 2 || len(p) == 3:
		v.Source, v.Target = p[0], p[1]
		if v.Source == "" {
			return v, fmt.Errorf("--volume %q: the host's side is empty", s)
		}
		if !strings.ContainsRune(v.Source, '/') && v.Source != "." && v.Source != ".." {
			return v, fmt.Errorf("--volume %q: named volumes are not there yet; use a path, such as ./%s", s, v.Source)
		}
	default:
		return v, fmt.Errorf("--volume %q: use host:box[:ro]", s)
	}
	if len(p) == 3 {
		switch p[2] {
		case "ro":
			v.ReadOnly = true
		case "rw":
		default:
			return v, fmt.Errorf("--volume %q: unknown option %q, use ro or rw", s, p[2])
		}
	}
	return v, nil
}

func (a *app) runCmd() *cobra.Command {
	var o boxFlags
	var detach bool
	var keys string
	c := a.images(&cobra.Command{Use: "run [flags] IMAGE [COMMAND [ARG...]]", Short: "Create a box and start it", Args: needImage,
		Long: "Create a box and start it, connected to this terminal unless -d is given.\n\n" + exitCodes})
	o.add(c.Flags())
	c.Flags().BoolVarP(&detach, "detach", "d", false, "run in the background and print the box's id")
	addDetachKeys(c.Flags(), &keys)
	c.RunE = func(c *cobra.Command, args []string) error {
		detaching, err := parseKeys(keys)
		if err != nil {
			return err
		}
		s, err := o.spec(a, c.Flags(), args)
		if err != nil {
			return err
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			if detach {
				b, err := rt.Run(c.Context(), s)
				if err == nil {
					fmt.Fprintln(a.out, b.ID())
				}
				return err
			}
			// Looked at first: what cannot be connected to needs no box.
			t, err := a.terminal(s.TTY, s.Stdin)
			if err != nil {
				return err
			}
			return a.foreground(c.Context(), t, detaching, func(ctx context.Context, o coffer.AttachOptions) (*coffer.Box, *coffer.Attachment, error) {
				return rt.RunAttached(ctx, s, o)
			})
		})
	}
	return c
}

func needImage(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return errors.New("no image given: try `coffer run --rm base echo hi`")
	}
	return nil
}

// foreground has a box started connected to this terminal and exits with its main process' code.
func (a *app) foreground(ctx context.Context, t *terminal, keys []byte,
	start func(context.Context, coffer.AttachOptions) (*coffer.Box, *coffer.Attachment, error)) error {
	defer t.close()
	run, begun, giveUp := takeover(ctx)
	defer giveUp(nil)
	t.detachable(keys, giveUp)
	b, att, err := start(run, t.options(false))
	begun()
	if err != nil {
		return err
	}
	if cause := context.Cause(run); errors.Is(cause, errInterrupted) {
		// The start was faster than its interruption, and is not wanted all the same.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		err := b.Stop(ctx, coffer.WithTimeout(0))
		if errors.Is(err, coffer.ErrNotFound) {
			err = nil // it was to be removed at its end
		}
		return errors.Join(cause, att.Close(), err)
	}
	t.forward(run, att, giveUp)
	code, err := att.Wait(run)
	switch cause := context.Cause(run); {
	case err == nil || cause == nil:
	case errors.Is(cause, coffer.ErrDetached):
		t.detached()
		return nil
	default:
		return fmt.Errorf("%w; box %s is left as it is", cause, b.Name())
	}
	settle, stop := signal.NotifyContext(context.WithoutCancel(ctx), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	t.close()
	a.tellTruncated(att)
	if _, serr := b.Settle(settle, att); serr != nil {
		err = errors.Join(err, serr)
	}
	if err != nil {
		return err
	}
	if code != 0 {
		return exitError(code)
	}
	return nil
}

func (a *app) createCmd() *cobra.Command {
	var o boxFlags
	c := a.images(&cobra.Command{Use: "create [flags] IMAGE [COMMAND [ARG...]]", Short: "Create a box without starting it", Args: needImage})
	o.add(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		s, err := o.spec(a, c.Flags(), args)
		if err != nil {
			return err
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			b, err := rt.Create(c.Context(), s)
			if err == nil {
				fmt.Fprintln(a.out, b.ID())
			}
			return err
		})
	}
	return c
}
