//go:build linux

// Command prisoner is what the escape test runs in the jail in the place of the engine's kernel.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/engine/gvisor/launch"
	"github.com/coffer-box/coffer/test/escape"
)

// errUnknown is wrapped by attempts that this host cannot show.
var errUnknown = errors.New("cannot be tried on this host")

// prisoner is what the attempts know.
type prisoner struct {
	escape.Plan
	conf  launch.Config
	fds   []int // open when the program began
	given int   // the last descriptor that it was given
}

func main() {
	switch os.Args[1] {
	case "euid":
		fmt.Fprint(os.Stdout, os.Geteuid())
		return
	case "int80":
		r, ok := int80(keyctlNumber386, unix.KEYCTL_GET_KEYRING_ID, uint32(specKeyringSession&0xffffffff), 0)
		if !ok {
			os.Exit(1)
		}
		fmt.Fprint(os.Stdout, r)
		return
	case "nothing":
		return
	}
	// Ptrace and clone are matters of one thread.
	runtime.LockOSThread()
	p := &prisoner{}
	for fd := range 1024 {
		// What the runtime opens for itself ends with an exec; what was inherited does not.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			p.fds = append(p.fds, fd)
		}
	}
	msg := "the escape attempts are over"
	if err := p.run(); err != nil {
		msg = "prisoner: " + err.Error()
	}
	// In the place of the kernel's word that it runs.
	if p.conf.ReadyFD != 0 {
		_, _ = unix.Write(p.conf.ReadyFD, []byte(msg))
	}
	fmt.Fprintln(os.Stderr, msg)
	os.Exit(1)
}

func (p *prisoner) run() error {
	if err := json.NewDecoder(os.NewFile(launch.ConfigFD, "config")).Decode(&p.conf); err != nil {
		return err
	}
	p.given = max(launch.ConfigFD, p.conf.ReadyFD, p.conf.AgentFD, p.conf.ScaffoldFD, slices.Max(p.conf.ImageFDs), p.conf.StateFD)
	for _, v := range p.conf.Volumes {
		p.given = max(p.given, v.FD)
	}
	if err := p.readPlan(); err != nil {
		return err
	}
	report := map[string]escape.Outcome{}
	for _, a := range attempts() {
		detail, err := a.try(p)
		o := escape.Outcome{Through: err == nil, Detail: detail}
		if err != nil {
			o.Detail = err.Error()
		}
		if errors.Is(err, errUnknown) {
			o.Unknown = err.Error()
		}
		report[a.name] = o
	}
	out, err := json.Marshal(report)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(os.Stderr, "%s%s\n", escape.ReportMark, out)
	return err
}

func (p *prisoner) readPlan() error {
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		f, err = os.Open("/sentry") // where the jail could not mount a /proc
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Seek(-escape.PlanSize, io.SeekEnd); err != nil {
		return err
	}
	return json.NewDecoder(f).Decode(&p.Plan)
}
