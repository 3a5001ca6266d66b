// Package shim is the process that supervises one running box. It owns the box's lock for as long as it lives, starts each
// generation through an engine, records how to find it before anything of the guest's runs, keeps the main process' output, and
// carries out the box's policy when that process ends. Whatever it cannot do because it was killed, the next command does.
package shim

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/supervise"
)

// Operations that a shim serves on its socket itself; all others it passes on to the agent.
const (
	OpAttach = "shim.attach" // an attachment to the main process; body AttachRequest
	OpStop   = "shim.stop"   // a call; body StopRequest
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

// StopRequest ends the box in order. The shim answers at once and is gone when it is done.
type StopRequest struct {
	Signal  int   `json:"signal,omitempty"` // 0: the box's own
	Timeout int64 `json:"timeout"`          // nanoseconds; negative: the box's own
	Resume  bool  `json:"resume,omitempty"` // for a command that was killed: nothing is done if the stop is under way
}

// Args of a shim's command line after [supervise.ShimArg].
type Args struct {
	Home       string
	ID         string
	Generation uint64
	// Attached has the shim wait for a client that starts the main process. It stays in the control group of whoever started it
	// then, as is right for a command in the foreground; otherwise it moves to the box's own.
	Attached bool
}

// ParseArgs reads the words after [supervise.ShimArg].
func ParseArgs(words []string) (Args, error) {
	if len(words) != 4 {
		return Args{}, errors.New("this command is for coffer itself")
	}
	gen, err := strconv.ParseUint(words[2], 10, 64)
	if err != nil {
		return Args{}, fmt.Errorf("generation: %w", err)
	}
	return Args{Home: words[0], ID: words[1], Generation: gen, Attached: words[3] == "attached"}, nil
}

// Words is the command line that [ParseArgs] reads.
func (a Args) Words() []string {
	mode := "detached"
	if a.Attached {
		mode = "attached"
	}
	return []string{supervise.ShimArg, a.Home, a.ID, strconv.FormatUint(a.Generation, 10), mode}
}

// LaunchFD is the descriptor on which the shim tells its launcher how the start went, as one [LaunchReply]. A launcher that is to
// connect keeps its end open until it has: at its end the shim knows that nobody will come.
const LaunchFD = 3

// LaunchReply is the shim's word to its launcher.
type LaunchReply struct {
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
	Code  int    `json:"code,omitempty"` // exit code for a command that could not be run
}
