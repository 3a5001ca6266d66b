//go:build !race

// The race detector has gVisor ask for another filter.

package sentry

import (
	"os"
	"runtime"
	"testing"

	"gvisor.dev/gvisor/runsc/boot/filter"
)

// gVisor must find the filter that was compiled at build time under the name that it looks for; that it is the right filter is seen
// by mkfilter, which makes none otherwise.
func TestRegisterFilter(t *testing.T) {
	if _, err := os.Stat("data/" + FilterFile(runtime.GOARCH)); err != nil {
		t.Skipf("no filter was compiled: run `make assets` first: %v", err)
	}
	opt, err := FilterOptions()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := filter.GetPrecompiled(opt.ConfigKey()); ok {
		t.Fatal("gVisor has the filter by itself: then none need be compiled")
	}
	if err := registerFilter(); err != nil {
		t.Fatal(err)
	}
	p, ok := filter.GetPrecompiled(opt.ConfigKey())
	if !ok {
		t.Fatalf("no filter is named %s", opt.ConfigKey())
	}
	if n := len(p.VarOffsets["self_pid_low32bits"]); n == 0 {
		t.Error("the filter has no place for the process' id: it would be the builder's")
	}
	if _, err := p.RenderInstructions(opt.Vars()); err != nil {
		t.Error(err)
	}
}
