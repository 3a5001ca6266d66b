package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/wire"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// wanted says which streams of a process are connected; the others are /dev/null.
type wanted struct {
	in, out, err bool
	joined       bool // what goes to err comes on out
}

// spawn starts a process as p describes, main being the box's main process. The caller holds the agent's lock.
func (a *Agent) spawn(p spec.Process, main bool, w wanted) (*proc, error) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return nil, wire.Errorf(wire.CodeInvalid, "no command given")
	}
	for _, s := range append(append([]string{p.Dir}, p.Args...), p.Env...) {
		if strings.IndexByte(s, 0) >= 0 {
			return nil, wire.Errorf(wire.CodeInvalid, "arguments, environment and directory cannot hold a NUL byte")
		}
	}
	id, err := a.users.lookup(p.User)
	if err != nil {
		return nil, err
	}
	env := environment(p, id, a.env)
	dir, err := workDir(p.Dir, main)
	if err != nil {
		return nil, err
	}
	path, err := findCommand(p.Args[0], lookupEnv(env, "PATH"), dir)
	if err != nil {
		return nil, err
	}
	pr := &proc{finished: make(chan struct{}), tty: p.TTY}
	var files stdio
	defer files.closeChild()
	if p.TTY {
		err = files.terminal(pr, p.WinSize, id, w.in)
	} else {
		err = files.pipes(pr, id, w)
	}
	if err != nil {
		files.closeOurs(pr)
		return nil, fmt.Errorf("connect the process: %w", err)
	}
	attr := &syscall.ProcAttr{
		Dir:   dir,
		Env:   env,
		Files: files.child[:],
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: p.TTY, Ctty: 0},
	}
	if len(p.Rlimits) > 0 {
		pr.child, err = a.startLimited(path, p, id, attr, main)
	} else {
		if needsCredential(id) {
			attr.Sys.Credential = &syscall.Credential{Uid: id.uid, Gid: id.gid, Groups: id.groups}
		}
		pr.child, err = a.reap.start(path, p.Args, attr, main)
	}
	if err != nil {
		files.closeOurs(pr)
		return nil, startError(p.Args[0], path, dir, err)
	}
	return pr, nil
}

// needsCredential saves three system calls where the process is to be what the agent is.
func needsCredential(id identity) bool {
	if int(id.uid) != os.Getuid() || int(id.gid) != os.Getgid() || len(id.groups) > 0 {
		return true
	}
	own, err := os.Getgroups()
	return err != nil || len(own) > 0
}

// startError says whose fault a failed start is, as shells have it.
func startError(name, path, dir string, err error) error {
	if _, ok := errors.AsType[*wire.Error](err); ok {
		return err
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return wire.Errorf(wire.CodeNotFound, "start %s: %s, or the interpreter it names, is not in the box", name, path)
	case errors.Is(err, unix.ENOEXEC):
		return wire.Errorf(wire.CodeNotExecutable, "start %s: %s is no program for this machine, nor a script with a #! line", name, path)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return wire.Errorf(wire.CodeNotExecutable, "start %s: the user may not execute %s, or not enter %s: %v", name, path, dir, err)
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ETXTBSY), errors.Is(err, unix.EISDIR), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ELIBBAD):
		return wire.Errorf(wire.CodeNotExecutable, "start %s: %s cannot be executed: %v", name, path, err)
	case errors.Is(err, unix.E2BIG):
		return wire.Errorf(wire.CodeInvalid, "start %s: arguments and environment are too large", name)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("start %s: the box has no process or memory left: %w", name, err)
	}
	return fmt.Errorf("start %s: %w", name, err)
}

// environment completes what was asked for. Of duplicates the last wins.
func environment(p spec.Process, id identity, defaults map[string]string) []string {
	seen := make(map[string]int, len(p.Env)+4)
	out := make([]string, 0, len(p.Env)+4)
	for _, kv := range p.Env {
		k, _, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			continue
		}
		if i, dup := seen[k]; dup {
			out[i] = kv
			continue
		}
		seen[k] = len(out)
		out = append(out, kv)
	}
	add := func(k, v string) {
		if _, ok := seen[k]; !ok && v != "" {
			out = append(out, k+"="+v)
		}
	}
	add("PATH", defaultPath)
	add("HOSTNAME", defaults["HOSTNAME"])
	add("HOME", id.home)
	if p.TTY {
		add("TERM", "xterm")
	}
	return out
}

func lookupEnv(env []string, key string) string {
	for _, kv := range env {
		if k, v, _ := strings.Cut(kv, "="); k == key {
			return v
		}
	}
	return ""
}

// workDir makes sure of the working directory. The main process' is made where it is missing, as Docker does; elsewhere a missing
// one is a mistake.
func workDir(dir string, create bool) (string, error) {
	if dir == "" || dir == "/" {
		return "/", nil
	}
	if !filepath.IsAbs(dir) {
		return "", wire.Errorf(wire.CodeBadDir, "working directory %q is not absolute", dir)
	}
	dir = filepath.Clean(dir)
	st, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) && create {
		if err = os.MkdirAll(dir, 0o755); err == nil {
			return dir, nil
		}
	}
	if err != nil {
		return "", wire.Errorf(wire.CodeBadDir, "working directory %s: %v", dir, errors.Unwrap(err))
	}
	if !st.IsDir() {
		return "", wire.Errorf(wire.CodeBadDir, "working directory %s is not a directory", dir)
	}
	return dir, nil
}

// findCommand looks a command up as a shell in dir would. A file that is there and not executable is told apart from none.
func findCommand(name, path, dir string) (string, error) {
	var denied string
	try := func(file string) (string, bool) {
		if !filepath.IsAbs(file) {
			file = filepath.Join(dir, file)
		}
		st, err := os.Stat(file)
		switch {
		case err == nil && !st.IsDir() && st.Mode()&0o111 != 0:
			return file, true
		case err == nil || errors.Is(err, fs.ErrPermission):
			if denied == "" {
				denied = file
			}
		}
		return "", false
	}
	if strings.Contains(name, "/") {
		if file, ok := try(name); ok {
			return file, nil
		}
	} else {
		for elem := range strings.SplitSeq(path, ":") {
			if file, ok := try(filepath.Join(elem, name)); ok {
				return file, nil
			}
		}
	}
	if denied != "" {
		return "", wire.Errorf(wire.CodeNotExecutable, "start %s: %s is not an executable file", name, denied)
	}
	if strings.Contains(name, "/") {
		return "", wire.Errorf(wire.CodeNotFound, "start %s: no such file in the box", name)
	}
	return "", wire.Errorf(wire.CodeNotFound, "start %s: not found in the box's PATH (%s)", name, path)
}

// stdio holds the process's ends while it is started. They stay plain descriptors: a Go file would make them non-blocking,
// which the process would inherit.
type stdio struct {
	child [3]uintptr
	fds   []int
}

func (s *stdio) closeChild() {
	for _, fd := range s.fds {
		unix.Close(fd)
	}
}

func (s *stdio) closeOurs(p *proc) {
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// pipes connects the streams that are wanted.
func (s *stdio) pipes(p *proc, id identity, w wanted) error {
	ours := [3]**os.File{&p.stdin, &p.stdout, &p.stderr}
	for i, want := range [3]bool{w.in, w.out, w.err} {
		if i == 2 && w.joined {
			s.child[i] = s.child[1]
			continue
		}
		if !want {
			fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open /dev/null: %w", err)
			}
			s.fds = append(s.fds, fd)
			s.child[i] = uintptr(fd)
			continue
		}
		var fd [2]int
		if err := unix.Pipe2(fd[:], unix.O_CLOEXEC); err != nil {
			return err
		}
		theirs, mine := fd[1], fd[0]
		if i == 0 {
			theirs, mine = fd[0], fd[1]
		}
		s.fds = append(s.fds, theirs)
		s.child[i] = uintptr(theirs)
		if id.uid != 0 {
			// Else an ordinary user could not open /dev/stdout again, as programs do.
			_ = unix.Fchown(theirs, int(id.uid), int(id.gid))
		}
		f, err := pollable(mine, "pipe")
		if err != nil {
			return err
		}
		*ours[i] = f
	}
	return nil
}

func pollable(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// terminal connects all three streams to a new terminal of the box.
func (s *stdio) terminal(p *proc, size spec.WinSize, id identity, input bool) error {
	master, slave, err := openPTY()
	if err != nil {
		return err
	}
	s.fds = append(s.fds, slave)
	s.child = [3]uintptr{uintptr(slave), uintptr(slave), uintptr(slave)}
	if id.uid != 0 {
		_ = unix.Fchown(slave, int(id.uid), -1)
	}
	if p.stdout, err = pollable(master, "terminal"); err != nil {
		return err
	}
	if input {
		p.stdin = p.stdout
	}
	if size.Rows > 0 && size.Cols > 0 {
		setSize(p.stdout, size)
	}
	return nil
}

func openPTY() (master, slave int, err error) {
	master, err = unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open /dev/ptmx: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(master)
		}
	}()
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return -1, -1, fmt.Errorf("number of the terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, -1, fmt.Errorf("unlock the terminal: %w", err)
	}
	slave, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("open the terminal: %w", err)
	}
	return master, slave, nil
}

func setSize(f *os.File, s spec.WinSize) {
	if rc, err := f.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) {
			_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
		})
	}
}

// endOfFile types the character that ends input, where the terminal reads lines; a program that reads raw bytes would take it
// for one of them.
func endOfFile(f *os.File) {
	rc, err := f.SyscallConn()
	if err != nil {
		return
	}
	var eof []byte
	_ = rc.Control(func(fd uintptr) {
		if t, err := unix.IoctlGetTermios(int(fd), unix.TCGETS); err == nil && t.Lflag&unix.ICANON != 0 {
			eof = []byte{t.Cc[unix.VEOF]}
		}
	})
	_, _ = f.Write(eof)
}

// limitedArg is the first argument of the agent's program when it only lowers limits and becomes another.
const limitedArg = "_limits"

// limited is what a start with limits does in the new process: a fork in Go cannot set them, and setting them from outside
// would come after the first instruction.
type limited struct {
	Rlimits []spec.Rlimit `json:"rlimits"`
	UID     uint32        `json:"uid"`
	GID     uint32        `json:"gid"`
	Groups  []uint32      `json:"groups,omitempty"`
	Become  bool          `json:"become,omitempty"` // the identity differs from the agent's
}

// startLimited runs this very program first, which sets the limits as root and then becomes the user and the command.
func (a *Agent) startLimited(path string, p spec.Process, id identity, attr *syscall.ProcAttr, main bool) (*child, error) {
	for _, l := range p.Rlimits {
		if _, ok := rlimitNumber(l.Name); !ok {
			return nil, wire.Errorf(wire.CodeInvalid, "unknown resource limit %q", l.Name)
		}
	}
	what, err := json.Marshal(limited{p.Rlimits, id.uid, id.gid, id.groups, needsCredential(id)})
	if err != nil {
		return nil, err
	}
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	report := os.NewFile(uintptr(fd[0]), "report")
	defer report.Close()
	attr.Files = append(attr.Files, uintptr(fd[1]))
	args := append([]string{"coffer-agent", limitedArg, string(what), path}, p.Args...)
	c, err := a.reap.start("/proc/self/exe", args, attr, main)
	unix.Close(fd[1])
	if err != nil {
		return nil, err
	}
	// The pipe closes when the command is executed, or carries the reason why it was not.
	msg, err := io.ReadAll(io.LimitReader(report, 1024))
	if err != nil || len(msg) == 0 {
		return c, err
	}
	var e limitedError
	if err := json.Unmarshal(msg, &e); err != nil {
		return nil, fmt.Errorf("set limits: %s", msg)
	}
	if e.Errno != 0 {
		return nil, fmt.Errorf("%s: %w", e.Step, unix.Errno(e.Errno))
	}
	return nil, errors.New(e.Step)
}

type limitedError struct {
	Step  string `json:"step"`
	Errno int    `json:"errno"`
}

// RunHelper does what the agent's program is asked to by its own arguments, and does not return then. A program's main calls
// it first.
func RunHelper(args []string) {
	if len(args) < 5 || args[1] != limitedArg {
		return
	}
	const report = 3
	unix.CloseOnExec(report)
	step, err := becomeLimited(args[2], args[3], args[4:])
	e := limitedError{Step: step}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		e.Errno = int(errno)
	} else {
		e.Step += ": " + err.Error()
	}
	b, _ := json.Marshal(e)
	_, _ = unix.Write(report, b)
	os.Exit(126)
}

func becomeLimited(what, path string, args []string) (string, error) {
	var l limited
	if err := json.Unmarshal([]byte(what), &l); err != nil {
		return "read limits", err
	}
	for _, r := range l.Rlimits {
		n, _ := rlimitNumber(r.Name)
		if err := syscall.Setrlimit(n, &syscall.Rlimit{Cur: r.Soft, Max: r.Hard}); err != nil {
			return "set limit " + r.Name, err
		}
	}
	if !l.Become {
		return "execute", syscall.Exec(path, args, os.Environ())
	}
	groups := make([]int, len(l.Groups))
	for i, g := range l.Groups {
		groups[i] = int(g)
	}
	if err := syscall.Setgroups(groups); err != nil {
		return "set groups", err
	}
	if err := syscall.Setgid(int(l.GID)); err != nil {
		return "set group", err
	}
	if err := syscall.Setuid(int(l.UID)); err != nil {
		return "set user", err
	}
	return "execute", syscall.Exec(path, args, os.Environ())
}

func rlimitNumber(name string) (int, bool) {
	n, ok := map[string]int{
		"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA,
		"fsize": unix.RLIMIT_FSIZE, "locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK,
		"msgqueue": unix.RLIMIT_MSGQUEUE, "nice": unix.RLIMIT_NICE, "nofile": unix.RLIMIT_NOFILE,
		"nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS, "rtprio": unix.RLIMIT_RTPRIO,
		"rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
	}[name]
	return n, ok
}
