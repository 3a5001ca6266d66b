// Package sentry runs gVisor's user-space kernel for one box, in a process that the jail has already confined. It replaces the
// runsc command: no container state is kept, nothing is re-executed, and no control socket is reachable from outside, because
// supervision is Coffer's own. It is linked only into the coffer-sentry program.
package sentry

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/cpuid"
	"gvisor.dev/gvisor/pkg/fd"
	"gvisor.dev/gvisor/pkg/log"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/pkg/unet"
	"gvisor.dev/gvisor/pkg/urpc"
	"gvisor.dev/gvisor/runsc/boot"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/specutils"

	"github.com/coffer-box/coffer/internal/engine/gvisor/launch"

	// The only platform that needs neither hardware virtualisation nor ptrace rights on the host.
	_ "gvisor.dev/gvisor/pkg/sentry/platform/systrap"
)

const platformName = "systrap"

// Main reads the configuration from [launch.ConfigFD], runs the box and returns the exit code of its agent. Errors before the
// agent runs are reported on the configuration's ReadyFD and returned.
func Main() (int, error) {
	conf, err := readConfig(os.NewFile(launch.ConfigFD, "config"))
	if err != nil {
		return 1, err
	}
	ready := os.NewFile(uintptr(conf.ReadyFD), "ready")
	code, err := run(conf, ready)
	if err != nil {
		fmt.Fprintf(ready, "%v", err)
	}
	return code, err
}

// startFast holds garbage collection back while the kernel is made, of which next to nothing is garbage; the limit is for a guest
// that keeps the kernel busy from its first moment. The function that it returns lets the start come to its end and then has a
// sandbox live frugally beside many others.
func startFast() (settle func()) {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(64 << 20)
	return func() {
		time.AfterFunc(time.Second, func() {
			debug.SetGCPercent(50)
			debug.SetMemoryLimit(math.MaxInt64)
			debug.FreeOSMemory()
		})
	}
}

func readConfig(f *os.File) (*launch.Config, error) {
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("read launch configuration: %w", err)
	}
	var c launch.Config
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("parse launch configuration: %w", err)
	}
	return &c, nil
}

func run(c *launch.Config, ready *os.File) (int, error) {
	level := log.Warning
	if c.Debug {
		level = log.Debug
	}
	log.SetTarget(log.GoogleEmitter{Writer: &log.Writer{Next: os.Stderr}})
	log.SetLevel(level)
	debug.SetTraceback("system")
	settle := startFast()

	cpuid.Initialize()
	if err := registerFilter(); err != nil {
		return 1, err
	}
	gconf, err := gvisorConfig(c)
	if err != nil {
		return 1, err
	}
	spec := ociSpec(c)
	listener, err := controlListener()
	if err != nil {
		return 1, err
	}
	platformFD, err := openPlatform(gconf)
	if err != nil {
		return 1, err
	}
	stdio, err := nullStdio()
	if err != nil {
		return 1, err
	}
	args := boot.Args{
		ID:               c.ID,
		Spec:             spec,
		Conf:             gconf,
		ControllerFD:     listener,
		Device:           platformFD,
		PinRingFD:        -1,
		DevGoferFD:       -1,
		ExecFD:           -1,
		PodInitConfigFD:  -1,
		RootfsUpperTarFD: -1,
		StdioFDs:         stdio,
		PassFDs:          []boot.FDMapping{{Guest: launch.AgentFD, Host: c.AgentFD}},
		NumCPU:           c.NumCPU,
		CPUQuota:         -1,
		TotalMem:         c.TotalMemory,
		TotalHostMem:     hostMemory(),
	}
	args.GoferFDs, args.GoferMountConfs = goferMounts(c)

	l, err := boot.New(args)
	if err != nil {
		return 1, fmt.Errorf("create kernel: %w", err)
	}
	start, err := startRequest(listener, c.ID)
	if err != nil {
		return 1, err
	}
	started := make(chan error, 1)
	go func() { started <- start() }()
	go func() {
		// The answer comes when the agent's task has been made and the kernel runs. Without it nothing would ever run.
		if err := <-started; err != nil {
			fmt.Fprintf(ready, "start the agent: %v", err)
			os.Exit(1)
		}
		_, _ = ready.Write([]byte{launch.ReadyByte}) // who waits for it may have given up
		ready.Close()
		settle()
	}()
	l.WaitForStartSignal()
	if err := l.Run(); err != nil {
		return 1, fmt.Errorf("start kernel: %w", err)
	}
	ws := l.WaitExit()
	if ws.Signaled() {
		return 128 + int(ws.TerminationSignal()), nil
	}
	return int(ws.ExitStatus()), nil
}

// gvisorConfig starts from runsc's defaults: its own flags are the only complete list of them.
func gvisorConfig(c *launch.Config) (*config.Config, error) {
	fs := flag.NewFlagSet("sentry", flag.ContinueOnError)
	config.RegisterFlags(fs)
	set := map[string]string{
		"network":            "none",
		"platform":           platformName,
		"directfs":           "false", // files go through the jail's own server, never through host paths
		"overlay2":           "none",
		"file-access":        "exclusive",
		"file-access-mounts": "shared", // volumes change under us; the state mount, and what else does not, have hints of their own
		"host-uds":           "none",
		"host-fifo":          "none",
		"ignore-cgroups":     "true",
		"rootless":           "true",
		"debug":              strconv.FormatBool(c.Debug),
	}
	for k, v := range set {
		if err := fs.Set(k, v); err != nil {
			return nil, fmt.Errorf("set kernel option %s=%s: %w", k, v, err)
		}
	}
	conf, err := config.NewFromFlags(fs)
	if err != nil {
		return nil, fmt.Errorf("kernel options: %w", err)
	}
	return conf, nil
}

const stateSource = "coffer-state"

func ociSpec(c *launch.Config) *specs.Spec {
	all := specutils.AllCapabilities()
	s := &specs.Spec{
		Version:  "1.2.0",
		Hostname: c.Hostname,
		Root:     &specs.Root{Path: "/"},
		Process: &specs.Process{
			Args:         append([]string{launch.AgentPath}, c.AgentArgs...),
			Cwd:          "/",
			Capabilities: all,
		},
		Linux: &specs.Linux{},
		Annotations: map[string]string{
			// Nobody else writes the state directory while the box runs, so the kernel may cache it.
			boot.MountPrefix + "state.source": stateSource,
			boot.MountPrefix + "state.type":   "bind",
			boot.MountPrefix + "state.share":  "container",
		},
		Mounts: []specs.Mount{
			{Destination: launch.StatePath, Type: "bind", Source: stateSource},
			// Named so that the kernel does not add one of its own.
			{Destination: "/tmp", Type: "tmpfs"},
		},
	}
	for i := range c.ImageFDs {
		s.Mounts = append(s.Mounts, specs.Mount{
			Destination: launch.LowerPath + "/" + strconv.Itoa(i), Type: "erofs", Source: "image-" + strconv.Itoa(i), Options: []string{"ro"},
		})
	}
	for i, v := range c.Volumes {
		m := specs.Mount{Destination: launch.VolPath + "/" + strconv.Itoa(i), Type: "bind", Source: "volume-" + strconv.Itoa(i)}
		if v.Exclusive {
			hint := boot.MountPrefix + m.Source
			s.Annotations[hint+".source"], s.Annotations[hint+".type"], s.Annotations[hint+".share"] = m.Source, m.Type, "container"
		}
		if v.ReadOnly {
			m.Options = []string{"ro"}
		}
		s.Mounts = append(s.Mounts, m)
	}
	return s
}

// goferMounts lists descriptors and mount kinds in the order of the root and then the spec's mounts.
func goferMounts(c *launch.Config) ([]int, []specutils.GoferMountConf) {
	fds := []int{c.ScaffoldFD, c.StateFD}
	// The scaffold gets a small upper in memory, so that mount points for any number of volumes can be made.
	confs := []specutils.GoferMountConf{
		{Lower: specutils.Erofs, Upper: specutils.MemoryOverlay},
		{Lower: specutils.Lisafs, Upper: specutils.NoOverlay},
	}
	for _, fd := range c.ImageFDs {
		fds = append(fds, fd)
		confs = append(confs, specutils.GoferMountConf{Lower: specutils.Erofs, Upper: specutils.NoOverlay})
	}
	for _, v := range c.Volumes {
		fds = append(fds, v.FD)
		confs = append(confs, specutils.GoferMountConf{Lower: specutils.Lisafs, Upper: specutils.NoOverlay})
	}
	return fds, confs
}

// controlListener makes the socket of gVisor's control server. It has a name in the jail's own, otherwise empty, network
// namespace only, and is used once, by startRequest.
func controlListener() (int, error) {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("control socket: %w", err)
	}
	if err := unix.Bind(s, &unix.SockaddrUnix{}); err != nil {
		return -1, fmt.Errorf("bind control socket: %w", err)
	}
	if err := unix.Listen(s, 1); err != nil {
		return -1, fmt.Errorf("listen on control socket: %w", err)
	}
	return s, nil
}

// startRequest connects to the control server now, while system calls are still unfiltered, and returns the calls that give the box
// its loopback and start the agent. gVisor has no other entrance to either than these requests.
func startRequest(listener int, id string) (func() error, error) {
	sa, err := unix.Getsockname(listener)
	if err != nil {
		return nil, fmt.Errorf("name of control socket: %w", err)
	}
	name := sa.(*unix.SockaddrUnix).Name
	sock, err := unet.Connect(name, false)
	if err != nil {
		return nil, fmt.Errorf("connect to control socket: %w", err)
	}
	client := urpc.NewClient(sock)
	return func() error {
		defer client.Close()
		network := boot.CreateLinksAndRoutesArgs{LoopbackLinks: []boot.LoopbackLink{boot.DefaultLoopbackLink}}
		if err := client.Call(boot.ContMgrSetNetworkArgs, &network, nil); err != nil {
			return fmt.Errorf("loopback: %w", err)
		}
		return client.Call(boot.ContMgrRootContainerStart, &id, nil)
	}, nil
}

func openPlatform(conf *config.Config) (*fd.FD, error) {
	p, err := platform.Lookup(conf.Platform)
	if err != nil {
		return nil, fmt.Errorf("platform %s: %w", conf.Platform, err)
	}
	f, err := p.OpenDevice(conf.PlatformDevicePath)
	if err != nil {
		return nil, fmt.Errorf("open platform %s: %w", conf.Platform, err)
	}
	if f == nil {
		return fd.New(-1), nil
	}
	return f, nil
}

// nullStdio gives the agent what this process has as standard input and output, which is /dev/null: any process of the guest's root can
// write to the agent's descriptors, and must not reach the host's log. The loader closes what it is given.
func nullStdio() ([]int, error) {
	fds := make([]int, 3)
	for i := range fds {
		n, err := unix.FcntlInt(uintptr(min(i, 1)), unix.F_DUPFD_CLOEXEC, 100)
		if err != nil {
			return nil, fmt.Errorf("standard descriptors of the agent: %w", err)
		}
		fds[i] = n
	}
	return fds, nil
}

func hostMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0
	}
	return uint64(si.Totalram) * uint64(si.Unit)
}
