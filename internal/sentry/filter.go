package sentry

import (
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	_ "unsafe" // for linkname

	"gvisor.dev/gvisor/pkg/seccomp/precompiledseccomp"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/runsc/boot/filter"
)

// data holds what mkfilter made. Without it gVisor compiles the same rules at every start, which costs about 20 ms.
//
//go:embed data
var data embed.FS

// FilterFile is the name of the compiled filter of an architecture.
func FilterFile(arch string) string { return "seccomp-" + arch + ".json" }

// FilterOptions says which filter a sentry with this package's configuration installs.
func FilterOptions() (filter.Options, error) {
	p, err := platform.Lookup(platformName)
	if err != nil {
		return filter.Options{}, fmt.Errorf("platform %s: %w", platformName, err)
	}
	infos := p.PrecompiledSeccompInfo()
	if len(infos) != 1 {
		return filter.Options{}, fmt.Errorf("platform %s has %d kinds of filters, not one", platformName, len(infos))
	}
	return filter.Options{Platform: infos[0]}, nil
}

// precompiledPrograms is what gVisor looks into before it compiles its rules. Its Go module lets nobody add to it otherwise. A
// filter of another name than the one that is asked for is not found, and the rules are compiled.
//
//go:linkname precompiledPrograms gvisor.dev/gvisor/runsc/boot/filter.precompiledPrograms
var precompiledPrograms map[string]precompiledseccomp.Program //nolint:gochecknoglobals // it is gVisor's

// registerFilter gives gVisor the filter that was compiled when this program was built, if it was.
func registerFilter() error {
	b, err := data.ReadFile("data/" + FilterFile(runtime.GOARCH))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // built on another architecture
	}
	if err != nil {
		return err
	}
	var p precompiledseccomp.Program
	if err := json.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("read compiled system call filter: %w", err)
	}
	filter.ListPrecompiled() // makes the map, once
	precompiledPrograms[p.Name] = p
	return nil
}
