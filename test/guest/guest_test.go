package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coffer-box/coffer/test/guest/plan"
)

// program is one test program that runs in a guest.
type program struct {
	name, pkg string
	run       string // pattern of the tests to run; empty: all
	bin       string // the coffer to be tested, in the guest; empty: the one that was built
	mustFail  string // what the program must say, and fail; empty: it must pass
}

// seed are the leak contract's first cases: five times run and rm, five times start and stop.
const seed = "^(TestSeedRemove|TestSeedStop|TestForegroundRemove)$"

// noKill is a coffer without the whole-tree kill, in the guest.
const noKill = "/nokill/coffer"

// A guest's processor is emulated, so that each test costs many times what it does on the host: what is run is what depends on the
// kind of control groups.
var guests = []struct {
	kind     plan.Cgroups
	programs []program
}{
	{plan.V2, []program{
		{name: "cgroup", pkg: "internal/cgroup"},
		{name: "supervise", pkg: "internal/supervise"},
		{name: "inside", pkg: "test/guest/inside"},
		{name: "seed", pkg: "test/e2e", run: seed},
		{name: "killed", pkg: "test/e2e", run: "^TestKilledMember$/^(shim|init|sentry)$/^rm$"},
		{name: "trees", pkg: "test/e2e", run: "^(TestStoppedTree|TestForkBomb|TestOOM)$"},
		// The last, since it leaves what it does.
		{name: "nokill", pkg: "test/e2e", run: "^TestSeedRemove$", bin: noKill, mustFail: "things of the box are left"},
	}},
	{plan.V1, []program{
		{name: "cgroup", pkg: "internal/cgroup"},
		{name: "inside", pkg: "test/guest/inside"},
		{name: "seed", pkg: "test/e2e", run: seed},
		{name: "trees", pkg: "test/e2e", run: "^(TestStoppedTree|TestOOM)$"},
	}},
	{plan.None, []program{
		{name: "inside", pkg: "test/guest/inside"},
		{name: "seed", pkg: "test/e2e", run: seed},
		{name: "trees", pkg: "test/e2e", run: "^(TestStoppedTree|TestForkBomb)$"},
	}},
}

// TestGuest runs the leak contract's seed cases, the limits and the packages under them on hosts that this one is not.
func TestGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("emulated machines take minutes; this is -short")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("the guests' kernel and machine are for amd64")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("hosts with other control groups are tested in virtual machines: make deps, or apt-get install qemu-system-x86: %v", err)
	}
	if _, err := os.Stat(filepath.Join(kernelDir(t), "vmlinuz")); err != nil {
		t.Skipf("hosts with other control groups are tested in virtual machines, and there is no kernel for them: make deps: %v", err)
	}
	common := files(t)
	for _, g := range guests {
		t.Run(string(g.kind), func(t *testing.T) {
			image := initrd(t, g.kind, g.programs, common)
			said := boot(t, qemu, image)
			if what := said.stalled(); what != "" {
				t.Logf("in %s something took a minute that takes a second; the machine is booted once more", what)
				said = boot(t, qemu, image)
			}
			if !said.passed {
				t.Error("the guest did not do all that it was told to")
			}
			for _, p := range g.programs {
				switch code, ok := said.ended[p.name]; {
				case !ok:
					t.Errorf("%s did not end", p.name)
				case p.mustFail == "" && code != "0":
					t.Errorf("%s ended with exit code %s", p.name, code)
				case p.mustFail != "" && (code == "0" || !strings.Contains(said.text[p.name], p.mustFail)):
					t.Errorf("%s ended with exit code %s; it must fail with %q, or the tests that pass prove nothing", p.name, code, p.mustFail)
				}
			}
		})
	}
}

// kernelDir is where test/deps.sh puts the guests' kernel and its modules.
func kernelDir(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("no place where the guests' kernel could be: %v", err)
	}
	return filepath.Join(cache, "coffer-test", "kernel")
}

// modules are what the kernel needs for a disk, in the order of loading.
func modules() []string {
	return []string{"virtio_ring.ko", "virtio.ko", "virtio_mmio.ko", "virtio_blk.ko"}
}

// said is what a guest told on its console.
type said struct {
	ended  map[string]string // exit codes by step
	text   map[string]string // what each step printed
	passed bool
}

// stalled names a step that failed for want of time alone. Emulated machines have been seen to stand still for as long as a start may
// take, about once in a hundred boxes. A step that left anything behind did not fail for that.
func (s said) stalled() string {
	for step, code := range s.ended {
		text := s.text[step]
		if code != "0" && strings.Contains(text, "deadline exceeded") && !strings.Contains(text, "are left") {
			return step
		}
	}
	return ""
}

// boot runs a guest to its end.
func boot(t *testing.T, qemu, initrd string) said {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-O", "^has_journal", disk, "6G").CombinedOutput(); err != nil {
		t.Fatalf("the guest's disk: %v: %s", err, out)
	}
	ctx := t.Context()
	if end, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-10*time.Second)) // so that there is a report
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, qemu, "-M", "microvm,acpi=on", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048",
		"-kernel", filepath.Join(kernelDir(t), "vmlinuz"), "-initrd", initrd,
		"-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot", "-global", "virtio-mmio.force-legacy=off",
		"-drive", "id=disk,if=none,format=raw,cache=unsafe,file="+disk, "-device", "virtio-blk-device,drive=disk",
		"-append", "console=ttyS0 quiet loglevel=1 panic=-1 rdinit=/init tsc_early_khz="+tscKHz())
	// A test that is killed leaves no machine behind; the signal comes with the end of the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if st := cmd.ProcessState; st != nil {
			t.Logf("the guest took %s, and %s of processor time", time.Since(began).Round(time.Second), (st.UserTime() + st.SystemTime()).Round(time.Second))
		}
	}()
	s := said{ended: map[string]string{}, text: map[string]string{}}
	var text strings.Builder
	for sc := bufio.NewScanner(out); sc.Scan(); {
		line := strings.TrimRight(sc.Text(), "\r")
		if line == "" {
			continue
		}
		t.Logf("%5.1f %s", time.Since(began).Seconds(), line)
		text.WriteString(line + "\n")
		var name, code string
		if n, _ := fmt.Sscanf(line, plan.SaysEnd+" %s %s", &name, &code); n == 2 {
			s.ended[name], s.text[name] = code, text.String()
			text.Reset()
		}
		s.passed = s.passed || line == plan.SaysPass
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the guest was cut off after %s: %v: %s", time.Since(began).Round(time.Second), err, errs.String())
	}
	return s
}

// tscKHz tells a guest how fast its time stamps count, which are the host's: on a busy host it fails to measure that itself.
func tscKHz() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "cpu MHz" {
			return strings.ReplaceAll(strings.TrimSpace(v), ".", "")
		}
	}
	return "2000000"
}

// file is one file of a guest.
type file struct {
	path string
	data []byte
}

// files are what all guests have: the programs, and as much of this host's userland as the tests use.
func files(t *testing.T) []file {
	t.Helper()
	bin := os.Getenv("COFFER_BIN")
	if bin == "" {
		bin = "../../bin/coffer"
	}
	out := []file{
		{"/bin/coffer", read(t, bin)},
		{noKill, compile(t, "cmd/coffer", "build", "-tags", "leaktest_nokill")},
		{"/init", compile(t, "test/guest/init", "build")},
	}
	for _, m := range modules() {
		out = append(out, file{"/modules/" + m, read(t, filepath.Join(kernelDir(t), m))})
	}
	built := map[string]bool{}
	for _, g := range guests {
		for _, p := range g.programs {
			if !built[p.pkg] {
				built[p.pkg] = true
				out = append(out, file{testPath(p.pkg), compile(t, p.pkg, "test", "-c", "-ldflags", "-s -w")})
			}
		}
	}
	return append(out, userland(t)...)
}

func testPath(pkg string) string { return "/tests/" + filepath.Base(pkg) }

// userland copies programs of this host, each with the libraries that it is linked with.
func userland(t *testing.T) []file {
	t.Helper()
	var out []file
	have := map[string]bool{}
	for _, name := range []string{"sh", "sleep", "setsid", "head", "tail", "cat", "kill", "true"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Skipf("the guests use this host's %s: %v", name, err)
		}
		out = append(out, file{"/bin/" + name, read(t, path)})
		libs, _ := exec.CommandContext(t.Context(), "ldd", path).Output() // fails for a program that needs none
		for lib := range strings.FieldsSeq(string(libs)) {
			if strings.HasPrefix(lib, "/") && !have[lib] {
				have[lib] = true
				out = append(out, file{lib, read(t, lib)})
			}
		}
	}
	return out
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: `make build deps` makes and gets all that this test needs", err)
	}
	return b
}

// compile makes a program that needs nothing of the guest.
func compile(t *testing.T, pkg, verb string, flags ...string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	c := exec.CommandContext(t.Context(), "go", append(append([]string{verb}, flags...), "-trimpath", "-o", out, "../../"+pkg)...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", c.Args, err, b)
	}
	return read(t, out)
}

// initrd writes a guest's initial file system.
func initrd(t *testing.T, kind plan.Cgroups, programs []program, common []file) string {
	t.Helper()
	p := plan.Plan{Cgroups: kind}
	for _, m := range modules() {
		p.Modules = append(p.Modules, "/modules/"+m)
	}
	p.Steps = []plan.Step{{Name: "warm", Argv: []string{"/bin/coffer", "run", "--rm", "base", "true"}, Env: []string{"COFFER_HOME=/warm"}, Dir: "/"}}
	for _, pr := range programs {
		bin := pr.bin
		if bin == "" {
			bin = "/bin/coffer"
		}
		s := plan.Step{Name: pr.name, Argv: []string{testPath(pr.pkg), "-test.v"}, Dir: "/tests",
			Env: []string{"PATH=/bin", "HOME=/root", "COFFER_BIN=" + bin, "COFFER_TEST_WARM=/warm", "COFFER_TEST_GUEST=" + string(kind)}}
		if pr.run != "" {
			s.Argv = append(s.Argv, "-test.run", pr.run)
		}
		p.Steps = append(p.Steps, s)
	}
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := &cpio{w: f, dirs: map[string]bool{}}
	for _, d := range []string{"/dev", "/root", plan.Disk} {
		w.mkdir(d)
	}
	w.file(plan.File, b)
	for _, c := range common {
		w.file(c.path, c.data)
	}
	w.add("TRAILER!!!", 0, nil)
	if w.err != nil {
		t.Fatal(w.err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}
