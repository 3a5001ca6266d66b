package jail

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
)

// Names of the layers, as `inspect` shows them.
const (
	layerUser        = "user namespace"
	layerPID         = "pid namespace"
	layerMount       = "mount namespace"
	layerIPC         = "ipc namespace"
	layerUTS         = "uts namespace"
	layerCgroup      = "cgroup namespace"
	layerNet         = "network namespace"
	layerRoot        = "own root"
	layerReadOnly    = "read-only programs and images"
	layerNosuid      = "nosuid mounts"
	layerEnv         = "empty environment"
	layerSession     = "own session"
	layerDescriptors = "closed descriptors"
	layerHidden      = "files with a quota only through their server"
	layerLimits      = "rlimits"
	layerCaps        = "capabilities"
	layerUID         = "unprivileged host uid"
	layerTrace       = "first process closed to tracing"
	layerNoNewPrivs  = "no new privileges"
	layerLandlock    = "landlock"
	layerSeccomp     = "seccomp"
)

type namespace struct {
	layer  string
	flag   uintptr
	detail string
}

func namespaces() []namespace {
	return []namespace{
		{layerUser, syscall.CLONE_NEWUSER, ""}, {layerPID, syscall.CLONE_NEWPID, ""}, {layerMount, syscall.CLONE_NEWNS, ""},
		{layerIPC, syscall.CLONE_NEWIPC, ""}, {layerUTS, syscall.CLONE_NEWUTS, ""}, {layerCgroup, syscall.CLONE_NEWCGROUP, ""},
		{layerNet, syscall.CLONE_NEWNET, "no interface but loopback"},
	}
}

func (o *order) cloneFlags() uintptr {
	var flags uintptr
	for _, ns := range namespaces() {
		if !o.off(ns.layer) {
			flags |= ns.flag
		}
	}
	return flags
}

// confine takes away what the jail's first process no longer needs; the program inherits all of it.
func confine(o *order) ([]Layer, error) {
	// The guest's kernel has applied the guest's umask already; files of the box's own layer are made with fixed modes.
	unix.Umask(0)
	// What holds already: the spawner, the new root and the start of the program see to it.
	var layers []Layer
	for _, ns := range namespaces() {
		layers = append(layers, Layer{Name: ns.layer, Active: true, Detail: ns.detail})
	}
	for _, name := range []string{layerRoot, layerReadOnly, layerNosuid, layerEnv, layerSession, layerDescriptors} {
		layers = append(layers, Layer{Name: name, Active: true})
	}
	if slices.ContainsFunc(o.Servers, func(s FileServer) bool { return s.Quota > 0 }) {
		layers = append(layers, Layer{Name: layerHidden, Active: true})
	}
	for i := range layers {
		if o.off(layers[i].Name) {
			layers[i] = leftOut(layers[i].Name)
		}
	}
	// Each of these needs rights that a later one takes away.
	for _, step := range []struct {
		layer string
		take  func(*order) (Layer, error)
	}{
		{layerLimits, setLimits}, {layerCaps, emptyBoundingSet}, {layerUID, dropID}, {layerCaps, dropCapabilities},
		{layerTrace, forbidTracing}, {layerNoNewPrivs, setNoNewPrivs}, {layerLandlock, applyLandlock}, {layerSeccomp, applySeccomp},
	} {
		l := leftOut(step.layer)
		if !o.off(step.layer) {
			var err error
			if l, err = step.take(o); err != nil {
				return nil, err
			}
			l.Name = step.layer
		}
		// Capabilities take two steps, of which the second has the last word.
		layers = slices.DeleteFunc(layers, func(have Layer) bool { return have.Name == l.Name })
		layers = append(layers, l)
	}
	return layers, nil
}

func leftOut(name string) Layer { return Layer{Name: name, Detail: "left out by a build for tests"} }

func setLimits(*order) (Layer, error) {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return Layer{}, fmt.Errorf("set core limit: %w", err)
	}
	var n unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &n); err != nil {
		return Layer{}, err
	}
	// Every open file of the guest is one of the engine's, so the soft limit goes up to the hard one; raising that needs a
	// right that even root may lack.
	n.Cur = n.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &n); err != nil {
		return Layer{}, fmt.Errorf("set nofile limit: %w", err)
	}
	return Layer{Active: true, Detail: "core 0"}, nil
}

// keptCaps let the file server give volume files the owners that the guest asks for.
var keptCaps = []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID}

// emptyBoundingSet sees to it that no file's capabilities and no setuid bit can give the program any back. The program inherits it from
// this thread; to stop all threads for each of forty capabilities would take longer than all else here, and only keep apart what
// executes nothing.
func emptyBoundingSet(*order) (Layer, error) {
	for c := 0; c <= unix.CAP_LAST_CAP+8; c++ {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break
		}
		if err != nil {
			return Layer{}, fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return Layer{Active: true}, nil
}

func dropID(o *order) (Layer, error) {
	if o.DropTo == 0 {
		return Layer{Active: true, Detail: "the user's own"}, nil
	}
	if o.KeepCaps {
		// Cleared again by the program's exec, like every right of a non-root id.
		if _, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0, 0); e != 0 {
			return Layer{}, fmt.Errorf("keep capabilities: %w", e)
		}
	}
	id := int(o.DropTo)
	if err := syscall.Setgroups(nil); err != nil {
		return Layer{}, fmt.Errorf("drop groups: %w", err)
	}
	if err := syscall.Setresgid(id, id, id); err != nil {
		return Layer{}, fmt.Errorf("drop gid: %w", err)
	}
	if err := syscall.Setresuid(id, id, id); err != nil {
		return Layer{}, fmt.Errorf("drop uid: %w", err)
	}
	// The change of uid cleared it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(dieWithParent), 0, 0, 0); err != nil {
		return Layer{}, fmt.Errorf("set parent death signal: %w", err)
	}
	return Layer{Active: true}, nil
}

func dropCapabilities(o *order) (Layer, error) {
	l := Layer{Active: true, Detail: "none kept"}
	var keep uint32
	if o.KeepCaps {
		l.Detail = "chown, dac_override, fowner, fsetid kept by the file server, over the ids of writable volumes"
		for _, c := range keptCaps {
			keep |= 1 << c
		}
	}
	return l, setCaps(keep)
}

// forbidTracing keeps the program, which may have the same uid, out of the first process' memory and descriptors: those are the
// control stream, the lock, and file servers that see more than their client may.
func forbidTracing(*order) (Layer, error) {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return Layer{}, fmt.Errorf("forbid tracing: %w", err)
	}
	return Layer{Active: true}, nil
}

func setNoNewPrivs(*order) (Layer, error) {
	_, _, e := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if e == unix.ENOTSUP {
		return Layer{}, errors.New("set no_new_privs: this coffer was built with cgo, which cannot do it in every thread: " +
			"build it with CGO_ENABLED=0")
	}
	if e != 0 {
		return Layer{}, fmt.Errorf("set no_new_privs: %w", e)
	}
	return Layer{Active: true}, nil
}

// applyLandlock never fails: where the kernel has none, the layer says why it is not active.
func applyLandlock(o *order) (Layer, error) {
	inactive := func(err error) (Layer, error) { return Layer{Detail: err.Error()}, nil }
	var rules []landlock.Rule
	rules = append(rules, landlock.RODirs("/proc"))
	for _, b := range o.Binds {
		st, err := os.Stat(b.Target)
		if err != nil {
			return inactive(err)
		}
		switch {
		case b.ReadOnly && st.IsDir():
			rules = append(rules, landlock.RODirs(b.Target))
		case b.ReadOnly:
			rules = append(rules, landlock.ROFiles(b.Target))
		case st.IsDir():
			rules = append(rules, landlock.RWDirs(b.Target).WithRefer())
		default:
			rules = append(rules, landlock.RWFiles(b.Target))
		}
	}
	abi, err := landlockABI()
	if err != nil {
		return inactive(err)
	}
	if err := landlock.V5.BestEffort().RestrictPaths(rules...); err != nil {
		return inactive(err)
	}
	return Layer{Active: true, Detail: fmt.Sprintf("ABI %d", abi)}, nil
}

func landlockABI() (int, error) {
	v, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch {
	case errors.Is(e, unix.ENOSYS):
		return 0, errors.New("the kernel has no Landlock (Linux 5.13 or newer has)")
	case errors.Is(e, unix.EOPNOTSUPP):
		return 0, errors.New("the kernel's Landlock is switched off: add it to the kernel's lsm= list")
	case e != 0:
		return 0, e
	}
	return int(v), nil
}
