// Package observer looks at a host from outside and says what of a box is there. It shares no code with the product, so that a
// mistake of the product cannot hide itself: it reads /proc, the control groups, the mounts, the sockets and the files.
package observer

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Process is one process of the host that belongs to a mark.
type Process struct {
	PID   int
	Comm  string
	State byte
	Why   string // by what it was recognised
}

func (p Process) String() string {
	return fmt.Sprintf("%d %s (%c) by %s", p.PID, p.Comm, p.State, p.Why)
}

// Processes lists the processes that carry one of the marks: in their command line, environment, control group, working directory,
// root, open files or mapped files, or by living in the pid namespace of one that does. Zombies of others are dead; those of the
// caller count.
func Processes(marks ...string) []Process {
	entries, _ := os.ReadDir("/proc")
	var out []Process
	namespaces := map[string]bool{}
	own := namespace(os.Getpid())
	var rest []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, ok := look(pid)
		if !ok {
			continue
		}
		if why := carries(pid, marks); why != "" {
			p.Why = why
			out = append(out, p)
			if ns := namespace(pid); ns != "" && ns != own {
				namespaces[ns] = true
			}
			continue
		}
		rest = append(rest, pid)
	}
	for _, pid := range rest {
		if ns := namespace(pid); ns != "" && namespaces[ns] {
			if p, ok := look(pid); ok {
				p.Why = "pid namespace"
				out = append(out, p)
			}
		}
	}
	return out
}

func look(pid int) (Process, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, false
	}
	s := string(b)
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	f := strings.Fields(s[end+1:])
	p := Process{PID: pid, Comm: s[open+1 : end], State: f[0][0]}
	if p.State == 'Z' && f[1] != strconv.Itoa(os.Getpid()) {
		return p, false
	}
	return p, true
}

func namespace(pid int) string {
	s, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	return s
}

func carries(pid int, marks []string) string {
	dir := fmt.Sprintf("/proc/%d/", pid)
	has := func(b []byte) bool {
		return slices.ContainsFunc(marks, func(m string) bool { return m != "" && bytes.Contains(b, []byte(m)) })
	}
	for _, name := range []string{"cmdline", "environ", "cgroup", "maps"} {
		if b, err := os.ReadFile(dir + name); err == nil && has(b) {
			return name
		}
	}
	for _, name := range []string{"cwd", "root", "exe"} {
		if s, err := os.Readlink(dir + name); err == nil && has([]byte(s)) {
			return name
		}
	}
	fds, _ := os.ReadDir(dir + "fd")
	for _, e := range fds {
		if s, err := os.Readlink(dir + "fd/" + e.Name()); err == nil && has([]byte(s)) {
			return "fd " + s
		}
	}
	return ""
}

// Cgroups lists control groups, in every hierarchy, whose path carries a mark.
func Cgroups(marks ...string) []string {
	var out []string
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if !strings.Contains(sc.Text(), " - cgroup") {
			continue
		}
		top := strings.Fields(sc.Text())[4]
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(p, m) }) {
				out = append(out, p)
			}
			return nil
		})
	}
	return out
}

// Mounts lists the mounts of every mount namespace whose line carries a mark.
func Mounts(marks ...string) []string {
	seen := map[string]bool{}
	var out []string
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		ns, err := os.Readlink("/proc/" + e.Name() + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		b, _ := os.ReadFile("/proc/" + e.Name() + "/mountinfo")
		for line := range strings.Lines(string(b)) {
			if slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(line, m) }) {
				out = append(out, e.Name()+": "+strings.TrimSpace(line))
			}
		}
	}
	return out
}

// Sockets lists named Unix sockets in use whose name carries a mark.
func Sockets(marks ...string) []string {
	var out []string
	b, _ := os.ReadFile("/proc/net/unix")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 7 && slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(f[7], m) }) {
			out = append(out, f[7])
		}
	}
	return out
}

// Files lists what stands in the usual places for sockets under a name with a mark, used or stale: a directory of its own there, and
// everything in it.
func Files(marks ...string) []string {
	var out []string
	for _, top := range []string{"/run/coffer-*", "/tmp/coffer-*"} {
		dirs, _ := filepath.Glob(top)
		for _, dir := range dirs {
			if !slices.ContainsFunc(marks, func(m string) bool { return strings.Contains(dir, m) }) {
				continue
			}
			_ = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
				// An empty directory is left only where nobody else can take its name.
				if err == nil && (p != dir || strings.HasPrefix(dir, "/run/")) {
					out = append(out, p)
				}
				return nil
			})
		}
	}
	return out
}

// Left lists everything of the marks: processes, control groups, mounts, sockets and their files.
func Left(marks ...string) []string {
	var out []string
	for _, p := range Processes(marks...) {
		out = append(out, "process "+p.String())
	}
	for _, c := range Cgroups(marks...) {
		out = append(out, "cgroup "+c)
	}
	for _, m := range Mounts(marks...) {
		out = append(out, "mount "+m)
	}
	for _, s := range Sockets(marks...) {
		out = append(out, "socket "+s)
	}
	for _, f := range Files(marks...) {
		out = append(out, "file "+f)
	}
	return out
}
