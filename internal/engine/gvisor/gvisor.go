// Package gvisor is the engine that runs a box on gVisor's user-space kernel, on any Linux host without hardware virtualisation.
// The kernel is a program of its own (coffer-sentry); this package only prepares its jail and its descriptors, so what links it
// is not linked with gVisor.
package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/engine"
	"github.com/coffer-box/coffer/internal/engine/gvisor/launch"
	"github.com/coffer-box/coffer/internal/jail"
)

// Name is the engine's name in flags and records.
const Name = "gvisor"

// Engine implements [engine.Engine]. The zero value is ready.
type Engine struct{}

// Name implements [engine.Engine].
func (Engine) Name() string { return Name }

// Probe implements [engine.Engine]: it runs wherever a user namespace can be made.
func (Engine) Probe(context.Context) engine.Capabilities {
	c := engine.Capabilities{Name: Name, Kernel: "gVisor (systrap)"}
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		c.Reason, c.Install = "gVisor has no port to "+runtime.GOARCH, "use a host with an amd64 or arm64 processor"
		return c
	}
	for _, s := range jail.Switches() {
		if s.Blocking {
			c.Reason, c.Install = s.Reason, s.Fix
			return c
		}
	}
	c.Usable = true
	return c
}

// Paths inside the jail.
const (
	sentryPath   = "/sentry"
	scaffoldPath = "/scaffold"
	imagePath    = "/image" // with /0, /1, … below it
	statePath    = "/state"
	volPath      = "/vol"
)

// Start implements [engine.Engine].
func (Engine) Start(ctx context.Context, s engine.Spec, l engine.Launcher) (engine.Instance, error) {
	var own, given closers // our ends; the jail's ends, which are closed here once it has them
	defer given.close()
	fail := func(err error) (engine.Instance, error) {
		own.close()
		return nil, err
	}
	agent, agentPeer, err := socketPair("agent")
	if err != nil {
		return fail(err)
	}
	own.add(agent)
	given.add(agentPeer)
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	given.add(readyW)
	defer readyR.Close()

	var files []*os.File
	fd := func(f *os.File) int {
		given.add(f)
		files = append(files, f)
		return launch.ConfigFD + len(files) // the configuration itself comes first
	}
	c := launch.Config{
		ID: s.ID, Hostname: s.Box.Hostname, Debug: s.Debug, TotalMemory: uint64(s.Box.Resources.Memory),
		ReadyFD: fd(readyW), AgentFD: fd(agentPeer),
	}
	if n := s.Box.Resources.CPUs; n > 0 {
		c.NumCPU = min(max(1, int(n+0.999)), runtime.NumCPU())
	}
	cfg := jail.Config{HostID: s.HostID, Binds: []jail.Bind{
		{Source: s.Sentry, Target: sentryPath, ReadOnly: true, Exec: true},
		{Source: s.Scaffold, Target: scaffoldPath, ReadOnly: true, Exec: true},
		// Programs of the guest are mapped for execution by its kernel, straight from these files; to the host's execve they are
		// none, for want of the permission bit.
		{Source: s.StateDir, Target: statePath, Exec: true},
	}}
	opens := []string{scaffoldPath}
	for i, path := range s.Images {
		target := fmt.Sprintf("%s/%d", imagePath, i)
		cfg.Binds = append(cfg.Binds, jail.Bind{Source: path, Target: target, ReadOnly: true, Exec: true})
		opens = append(opens, target)
	}
	quota := s.Box.Resources.DiskSize
	serve := func(root string, host, readOnly bool) (int, error) {
		client, server, err := socketPair("lisafs")
		if err != nil {
			return 0, err
		}
		given.add(server)
		f := jail.FileServer{Socket: server, Root: root, Host: host, ReadOnly: readOnly}
		if !host {
			f.Quota = quota
		}
		cfg.Servers = append(cfg.Servers, f)
		return fd(client), nil
	}
	if c.StateFD, err = serve(statePath, false, false); err != nil {
		return fail(err)
	}
	for i, v := range s.Box.Volumes {
		target := fmt.Sprintf("%s/%d", volPath, i)
		// The files of an anonymous volume are Coffer's own and kept like the box's layer, with any owner. Others are the host's.
		host := !v.Anonymous
		cfg.Binds = append(cfg.Binds, jail.Bind{Source: v.Source, Target: target, ReadOnly: v.ReadOnly, Exec: true, IDMapped: host})
		n, err := serve(target, host, v.ReadOnly)
		if err != nil {
			return fail(err)
		}
		// With a quota the kernel gets no descriptors to map files by; it maps its own pages then, but only of what is its alone.
		c.Volumes = append(c.Volumes, launch.Volume{FD: n, ReadOnly: v.ReadOnly, Exclusive: v.Anonymous && quota > 0})
	}
	// Opened in the jail, after the descriptors that come from here.
	c.ScaffoldFD = launch.ConfigFD + len(files) + 1
	for i := range s.Images {
		c.ImageFDs = append(c.ImageFDs, c.ScaffoldFD+1+i)
	}
	conf, err := configFile(c)
	if err != nil {
		return fail(err)
	}
	given.add(conf)
	cfg.Program = jail.Program{Path: sentryPath, Args: []string{"coffer-sentry", s.ID}, Files: append([]*os.File{conf}, files...),
		Opens: opens}

	j, err := l.Launch(ctx, cfg)
	if err != nil {
		return fail(err)
	}
	given.close()
	if err := awaitReady(ctx, readyR, j); err != nil {
		j.Kill()
		<-j.Done()
		return fail(err)
	}
	conn, err := net.FileConn(agent)
	if err != nil {
		j.Kill()
		<-j.Done()
		return fail(fmt.Errorf("agent stream: %w", err))
	}
	own.close()
	return &instance{conn: conn, jail: j}, nil
}

type instance struct {
	conn net.Conn
	jail *jail.Jail
}

func (i *instance) Agent() net.Conn  { return i.conn }
func (i *instance) Jail() *jail.Jail { return i.jail }

// awaitReady reads the kernel's one byte, or the text of why there is none.
func awaitReady(ctx context.Context, r *os.File, j *jail.Jail) error {
	stop := context.AfterFunc(ctx, func() { j.Kill() })
	defer stop()
	b, err := io.ReadAll(io.LimitReader(r, 4096))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("wait for the kernel: %w", err)
	case len(b) == 1 && b[0] == launch.ReadyByte:
		return nil
	case len(b) == 0:
		return errors.New("the kernel ended before the agent ran; the box's shim.log has its last words")
	}
	return fmt.Errorf("start kernel: %s", strings.TrimSpace(string(b)))
}

// configFile holds the configuration in memory, so that no file of it is left and the reader finds an end.
func configFile(c launch.Config) (*os.File, error) {
	fd, err := unix.MemfdCreate("coffer-launch", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("launch configuration: %w", err)
	}
	f := os.NewFile(uintptr(fd), "launch")
	if err := json.NewEncoder(f).Encode(c); err != nil {
		f.Close()
		return nil, fmt.Errorf("launch configuration: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func socketPair(name string) (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%s sockets: %w", name, err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// closers closes each of its files once.
type closers struct{ files []*os.File }

func (c *closers) add(f *os.File) { c.files = append(c.files, f) }

func (c *closers) close() {
	for _, f := range c.files {
		f.Close()
	}
	c.files = nil
}
