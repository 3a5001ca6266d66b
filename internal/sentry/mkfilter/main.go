// Mkfilter compiles the system call filter of coffer-sentry, so that no box has to wait for that at its start. gVisor does the same
// in its own build, and leaves the result out of its Go module. It runs on the architecture that the filter is for:
//
//	go run ./internal/sentry/mkfilter DIRECTORY
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/seccomp"
	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter"
	"gvisor.dev/gvisor/runsc/boot/filter/config"

	"github.com/coffer-box/coffer/internal/sentry"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mkfilter:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("want one directory, not %q", args)
	}
	p, err := compile()
	if err != nil {
		return err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(args[0], sentry.FilterFile(runtime.GOARCH)), b, 0o644)
}

// compile finds where in the filter the values stand that are known only at a start: it is compiled with several stand-ins for them.
func compile() (precompiledseccomp.Program, error) {
	opt, err := sentry.FilterOptions()
	if err != nil {
		return precompiledseccomp.Program{}, err
	}
	p, err := precompiledseccomp.Precompile(opt.ConfigKey(), slices.Collect(maps.Keys(opt.Vars())), func(v precompiledseccomp.Values) *seccomp.Program {
		o := opt
		o.Platform = standIn{opt.Platform, v}
		return program(o)
	})
	if err != nil {
		return p, err
	}
	// With this process' own values it must be what gVisor compiles here: a value that is taken for constant would not be.
	opt.ControllerFD = 1234
	got, err := p.RenderInstructions(opt.Vars())
	if err != nil {
		return p, err
	}
	want, _, err := program(opt).Build()
	if err != nil {
		return p, err
	}
	if !slices.Equal(got, want) {
		return p, errors.New("the compiled filter is not the one that gVisor compiles at a start: its rules have changed")
	}
	return p, nil
}

func program(o filter.Options) *seccomp.Program {
	allow, deny := config.Rules(o)
	return &seccomp.Program{
		RuleSets: []seccomp.RuleSet{{Rules: deny.Copy()}, {Rules: allow.Copy(), Action: seccomp.Allow}},
		Options:  config.SeccompOptions(o),
	}
}

// standIn is a platform whose variables override all others, which come before them.
type standIn struct {
	platform.SeccompInfo
	values precompiledseccomp.Values
}

func (s standIn) Variables() precompiledseccomp.Values { return s.values }

// SyscallFilters has the process' id as a variable too, where the platform writes its own into the rules.
func (s standIn) SyscallFilters(v precompiledseccomp.Values) seccomp.SyscallRules {
	rules := s.SeccompInfo.SyscallFilters(v)
	if r, ok := rules.Get(unix.SYS_RT_TGSIGQUEUEINFO).(seccomp.PerArg); ok && r[0] == seccomp.EqualTo(os.Getpid()) {
		r[0] = seccomp.EqualTo(v.GetUint64("self_pid"))
		rules.Remove(unix.SYS_RT_TGSIGQUEUEINFO)
		rules.Set(unix.SYS_RT_TGSIGQUEUEINFO, r)
	}
	return rules
}
