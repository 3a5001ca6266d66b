// Package shim is the process that supervises one running box. It owns the box's lock for as long as it lives, starts each
// generation through an engine, records how to find it before anything of the guest's runs, keeps the main process' output, and
// carries out the box's policy when that process ends. Whatever it cannot do because it was killed, the next command does.
package shim

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
)

// Operations that a shim serves on its socket itself; all others it passes on to the agent.
const (
	OpAttach = "shim.attach" // an attachment to the main process; body AttachRequest
	OpStop   = "shim.stop"   // a call; body StopRequest
	OpHealth = "shim.health" // a call without a body; answered by Health
)

// AttachRequest connects a client to the main process.
type AttachRequest struct {
	// Start starts the main process once the client is connected, so that nothing of its output is missed.
	Start bool `json:"start,omitempty"`
	// Backlog sends first what was logged before.
	Backlog bool `json:"backlog,omitempty"`
	// CloseStdin ends the main process' input when this client's ends.
	CloseStdin bool         `json:"close_stdin,omitempty"`
	WinSize    spec.WinSize `json:"win_size,omitzero"`
}

// MaxStop bounds how long a box may take to stop.
const MaxStop = 365 * 24 * time.Hour

// StopRequest ends the box in order. The shim answers at once and is gone when it is done.
type StopRequest struct {
	Timeout int64 `json:"timeout"`          // nanoseconds; negative: the box's own
	Resume  bool  `json:"resume,omitempty"` // for a command that was killed: nothing is done if the stop is under way
}

// Health is what a box's health checks have shown since its start.
type Health struct {
	Status        state.Health `json:"status"`         // starting, healthy, unhealthy
	FailingStreak int          `json:"failing_streak"` // failures since the last success, those of the start period not counted
	// Log has the last five results, the oldest first.
	Log []HealthResult `json:"log,omitempty"`
}

// HealthResult is how one check ended.
type HealthResult struct {
	Start    time.Time `json:"start"`
	End      time.Time `json:"end"`
	ExitCode int       `json:"exit_code"` // 0: healthy; -1: it had no end in its time, or could not be run
	// Output is the beginning of what it wrote to both outputs, at most 4096 bytes, or why there is no exit code.
	Output string `json:"output"`
}

// Args of a shim's command line after [supervise.ShimArg].
type Args struct {
	Home       string
	ID         string
	Generation uint64
	Mode       Mode
}

// Mode is what a shim was started for.
type Mode string

// Modes. Only a detached shim moves to the box's own control group: the others work for a command in the foreground, and stay in
// the group of whoever started them.
const (
	Detached Mode = "detached" // start the main process
	Attached Mode = "attached" // wait for a client that starts the main process
	Files    Mode = "files"    // start no main process, but let the launcher at the box's files as long as it holds the launch pipe
)

// ParseArgs reads the words after [supervise.ShimArg].
func ParseArgs(words []string) (Args, error) {
	if len(words) != 4 {
		return Args{}, errors.New("this command is for coffer itself")
	}
	gen, err := strconv.ParseUint(words[2], 10, 64)
	if err != nil {
		return Args{}, fmt.Errorf("generation: %w", err)
	}
	a := Args{Home: words[0], ID: words[1], Generation: gen, Mode: Mode(words[3])}
	if a.Mode != Detached && a.Mode != Attached && a.Mode != Files {
		return Args{}, fmt.Errorf("unknown mode %q", a.Mode)
	}
	return a, nil
}

// Words is the command line that [ParseArgs] reads.
func (a Args) Words() []string {
	return []string{supervise.ShimArg, a.Home, a.ID, strconv.FormatUint(a.Generation, 10), string(a.Mode)}
}

// LaunchFD is the descriptor on which the shim tells its launcher how the start went, as one [LaunchReply]. A launcher that is to
// connect keeps its end open until it has: at its end the shim knows that nobody will come.
const LaunchFD = 3

// LockFD is the descriptor of the box's shim lock, which the launcher has taken: from before the shim is started until it ends, there is
// no moment at which the lock is free.
const LockFD = LaunchFD + 1

// LaunchReply is the shim's word to its launcher.
type LaunchReply struct {
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"` // exit code for a command that could not be run
}
