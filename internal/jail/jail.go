// Package jail puts everything that touches a guest's bytes into namespaces, limits and filters of its own, as root and as an
// ordinary user alike. The jail's first process is pid 1 of a new pid namespace, so its death is the death of all of it; it
// serves the box's files, starts one program (the engine), reaps, and ends when that program ends.
//
// A jail is spawned behind a gate: its first process exists, and can be identified, placed into a cgroup and recorded, before
// it does anything. If the spawner dies first, the gate's end of file ends the process. The package knows no box, no cgroup and
// no database.
package jail

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"

	"golang.org/x/sys/unix"
)

// Marker is the first word of the command line of a jail's first process; the jail's name follows it.
const Marker = "coffer-init"

// Arg is the hidden command of the coffer program that runs [Init].
const Arg = "_init"

// Fixed descriptors of the jail's first process. What the program and the file servers use comes after them.
const (
	controlFD = 3
	lockFD    = 4
	firstFD   = 5
)

// Config describes a jail before it is spawned.
type Config struct {
	// Name stands in the command line of the jail's first process, for people; identity never rests on it.
	Name string
	// Exe is the coffer program. Empty: this program's own file.
	Exe string
	// Lock is inherited by the jail's first process and stays open as long as that lives. It must hold an open file
	// description of its own, not shared with the spawner.
	Lock *os.File
	// Cgroup is the directory of the version 2 control group that the jail's first process is born into; nil: the spawner's.
	Cgroup *os.File
	// Stderr takes the log of the jail and of its program.
	Stderr *os.File
	// HostID is the unprivileged host uid and gid that the jail takes when the spawner is root, and the first of IDCount ids
	// that volumes may use. An ordinary user's jail keeps the user's own id.
	HostID uint32

	Binds   []Bind
	Servers []FileServer
	Program Program
}

// IDCount is how many ids belong to one jail of root's, from Config.HostID on.
const IDCount = 65536

// Bind is a host file or directory made visible in the jail's file system.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"` // absolute, in the jail
	ReadOnly bool   `json:"read_only,omitempty"`
	Exec     bool   `json:"exec,omitempty"`
	// IDMapped shows the host's ids 0 to 65535 as the jail's range. Root only; needs a file system that can do it.
	IDMapped bool `json:"id_mapped,omitempty"`

	FD int `json:"fd,omitempty"` // descriptor of a detached mount, made by the spawner; 0: none
}

// FileServer serves one of the jail's directories on a LISAFS socket.
type FileServer struct {
	Socket   *os.File `json:"-"`
	FD       int      `json:"fd"`
	Root     string   `json:"root"`           // path in the jail
	Host     bool     `json:"host,omitempty"` // a volume of the host's: passed through as it is; otherwise files of a box's own
	ReadOnly bool     `json:"read_only,omitempty"`
	// Quota is what all servers of the jail that have one may take together, in bytes; 0: no bound, and what it takes is not counted. The
	// program cannot reach the files of one that has, but through it.
	Quota int64 `json:"quota,omitempty"`
}

// Program is what the jail runs.
type Program struct {
	Path string   `json:"path"` // in the jail
	Args []string `json:"args"` // with argv[0]
	// Files become the program's descriptors 3, 4, …
	Files []*os.File `json:"-"`
	FDs   []int      `json:"fds"`
	// Opens are paths in the jail, opened for reading; they become the descriptors after those of Files. A file that several jails
	// share is given this way, through a read-only bind: a descriptor from outside would carry the rights of the host's mount, so
	// that the file's owner could change its mode through it.
	Opens []string `json:"opens,omitempty"`
}

// order is the whole of what the first process is told when the gate opens.
type order struct {
	Binds    []Bind       `json:"binds"`
	Servers  []FileServer `json:"servers"`
	Program  Program      `json:"program"`
	DropTo   uint32       `json:"drop_to"`           // id inside the namespace; 0: stay
	KeepCaps bool         `json:"keep_caps"`         // writable id-mapped volumes need chown and the like
	Without  []string     `json:"without,omitempty"` // obeyed by no build but that of the escape tests
}

// report is what it answers, one JSON value per line.
type report struct {
	Layers []Layer `json:"layers,omitempty"`
	Ready  bool    `json:"ready,omitempty"`
	Error  string  `json:"error,omitempty"`
	Exit   *int    `json:"exit,omitempty"`
}

// Layer is one protection and whether it is active.
type Layer struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	Detail string `json:"detail,omitempty"` // why not, or what exactly
}

// Jail is a spawned jail.
type Jail struct {
	cmd     *exec.Cmd
	control *os.File
	order   order

	done   chan struct{}
	exit   int
	exitOK bool
	err    error
	ready  chan struct{}
	layers []Layer
}

// PID is the first process in the spawner's pid namespace.
func (j *Jail) PID() int { return j.cmd.Process.Pid }

// Release opens the gate and returns when the program runs confined. After an error the jail is gone.
func (j *Jail) Release(ctx context.Context) ([]Layer, error) {
	if err := json.NewEncoder(j.control).Encode(j.order); err != nil {
		j.Kill()
		j.watch()
		return nil, fmt.Errorf("release jail: %w", err)
	}
	go j.watch()
	select {
	case <-j.ready:
		return j.layers, nil
	case <-j.done:
		if j.err == nil {
			j.err = errors.New("jail ended before its program ran")
		}
		return nil, j.err
	case <-ctx.Done():
		j.Kill()
		<-j.done
		return nil, ctx.Err()
	}
}

// watch reads the first process' reports until it ends, then reaps it.
func (j *Jail) watch() {
	defer close(j.done)
	dec := json.NewDecoder(io.LimitReader(j.control, 1<<20))
	isReady := false
	for {
		var r report
		if err := dec.Decode(&r); err != nil {
			break
		}
		switch {
		case r.Error != "":
			j.err = fmt.Errorf("jail: %s", r.Error)
		case r.Exit != nil:
			j.exit, j.exitOK = *r.Exit, true
		case r.Ready && !isReady:
			isReady = true
			j.layers = r.Layers
			close(j.ready)
		}
	}
	err := j.cmd.Wait()
	if !j.exitOK {
		var ee *exec.ExitError
		if errors.As(err, &ee) && ee.Exited() {
			j.exit = ee.ExitCode()
		} else {
			j.exit = 128 + int(unix.SIGKILL)
		}
	}
	j.control.Close()
}

// Kill ends the first process and with it the whole jail. It does not wait.
func (j *Jail) Kill() { _ = j.cmd.Process.Kill() }

// Abandon kills and reaps a jail whose gate was never opened.
func (j *Jail) Abandon() {
	j.Kill()
	_ = j.cmd.Wait()
	j.control.Close()
}

// Done is closed when the first process, and so everything in the jail, has ended and been reaped.
func (j *Jail) Done() <-chan struct{} { return j.done }

// ExitCode is the program's exit code once Done is closed; 137 when the jail was killed.
func (j *Jail) ExitCode() int { return j.exit }

// Switch is a setting of the host that forbids what a jail needs.
type Switch struct {
	Path     string
	Value    string
	Blocking bool
	Reason   string
	Fix      string
}

// Switches reads the host settings that decide whether user namespaces can be made by this process.
func Switches() []Switch { return switchesIn("/proc/sys", os.Geteuid() == 0) }

func switchesIn(sysctl string, root bool) []Switch {
	type rule struct {
		path, bad, reason, fix string
		rootToo                bool
	}
	rules := []rule{
		{"user/max_user_namespaces", "0", "the host allows no user namespaces", "as root: sysctl -w user.max_user_namespaces=15000", true},
		{"kernel/unprivileged_userns_clone", "0", "the host allows user namespaces to root only", "as root: sysctl -w kernel.unprivileged_userns_clone=1", false},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor forbids user namespaces to programs without a profile",
			"as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or install an AppArmor profile for coffer with the rule «userns,»", false},
	}
	var out []Switch
	for _, r := range rules {
		v, ok := readWord(sysctl + "/" + r.path)
		if !ok {
			continue
		}
		s := Switch{Path: r.path, Value: v}
		if v == r.bad && (r.rootToo || !root) {
			s.Blocking, s.Reason, s.Fix = true, r.reason+" ("+r.path+"="+v+")", r.fix
		}
		out = append(out, s)
	}
	return out
}

func readWord(path string) (string, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", false
	}
	n, err := strconv.Atoi(string(trimSpace(b)))
	if err != nil {
		return "", false
	}
	return strconv.Itoa(n), true
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == ' ') {
		b = b[:len(b)-1]
	}
	return b
}

// HostIDFor derives the jail's range of host ids from a box's id, above those that systemd and user databases hand out
// (https://systemd.io/UIDS-GIDS). Two boxes may meet in a range; nothing rests on their being apart but defence in depth.
func HostIDFor(id string) uint32 {
	const base, slots = 0x70000000, 2048
	n, err := strconv.ParseUint(id[:min(8, len(id))], 16, 32)
	if err != nil {
		return base
	}
	return base + uint32(n%slots)*IDCount
}
