// Command jailed is both ends of the jail's tests: it spawns a jail as a supervisor does, is the jail's first process, and is the
// program that runs in it. It is a program of its own because the first process can only be one that is built without cgo.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/jail"
)

// reportFD is where the program reports to; it is also open in the spawner.
const reportFD = 3

// facts are what the program sees of itself.
type facts struct {
	Env     []string
	FDs     []int
	Dir     string
	PID     int
	Session int // of the first process
	Umask   int
	Core    unix.Rlimit
	Files   unix.Rlimit
	Status  map[string]string
}

func main() {
	switch {
	case os.Args[0] == jail.Marker:
		os.Exit(jail.Init(nil))
	case os.Args[1] == "spawn":
		if err := spawn(os.Args[2], os.Args[3:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case os.Args[1] == "without-namespaces":
		// The limit is of this process' own user namespace, in which it is root.
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
			fmt.Fprintln(os.Stderr, "cannot:", err)
			os.Exit(3)
		}
		fmt.Fprintln(os.Stderr, syscall.Exec(os.Args[2], os.Args[2:], os.Environ()))
		os.Exit(3)
	case os.Args[1] == "facts":
		if err := report(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case os.Args[1] == "hold":
		// Says that it runs, and then does until it is killed.
		_, _ = unix.Write(reportFD, []byte("runs\n"))
		for {
			_ = unix.Pause()
		}
	case os.Args[1] == "exit":
		os.Exit(7)
	case os.Args[1] == "signal":
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
}

// spawn runs this program in a jail. At "gate" it stops, with the gate shut, until its input ends.
func spawn(until string, args []string) error {
	runtime.LockOSThread()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	lock, err := os.CreateTemp("", "jailed-lock-")
	if err != nil {
		return err
	}
	os.Remove(lock.Name())
	if until == "limits" {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 128}); err != nil {
			return err
		}
	}
	j, err := jail.Spawn(jail.Config{
		Name: "jailed", Lock: lock, Stderr: os.Stderr, HostID: jail.HostIDFor("00000000"),
		Binds:   []jail.Bind{{Source: self, Target: "/program", ReadOnly: true, Exec: true}},
		Program: jail.Program{Path: "/program", Args: append([]string{"program"}, args...), Files: []*os.File{os.NewFile(reportFD, "report")}, Opens: []string{"/program"}},
	})
	if err != nil {
		return err
	}
	switch until {
	case "gate":
		fmt.Println(j.PID())
		_, _ = io.Copy(io.Discard, os.Stdin)
		j.Abandon()
		return nil
	case "killed":
		// The first process dies with the gate shut.
		j.Kill()
		for {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", j.PID()))
			if err != nil || strings.Contains(string(b), ") Z") {
				break
			}
			runtime.Gosched()
		}
		_, err := j.Release(context.Background())
		if err == nil {
			return fmt.Errorf("release of a dead jail succeeded")
		}
		select {
		case <-j.Done():
		default:
			return fmt.Errorf("the jail is not done after %w", err)
		}
		if err := unix.Kill(j.PID(), 0); err != unix.ESRCH {
			return fmt.Errorf("the first process was not reaped: %w", err)
		}
		return nil
	}
	if _, err := j.Release(context.Background()); err != nil {
		return err
	}
	if until == "kill" {
		j.Kill()
	}
	<-j.Done()
	fmt.Println(j.ExitCode())
	return nil
}

func report() error {
	var f facts
	// First, before anything is opened here.
	for fd := range 256 {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			f.FDs = append(f.FDs, fd)
		}
	}
	var err error
	f.Env, f.PID = os.Environ(), os.Getpid()
	f.Umask = unix.Umask(0)
	if f.Session, err = unix.Getsid(0); err != nil {
		return err
	}
	if f.Dir, err = os.Getwd(); err != nil {
		return err
	}
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &f.Core); err != nil {
		return err
	}
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &f.Files); err != nil {
		return err
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	f.Status = map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			f.Status[k] = strings.TrimSpace(v)
		}
	}
	return json.NewEncoder(os.NewFile(reportFD, "report")).Encode(f)
}
