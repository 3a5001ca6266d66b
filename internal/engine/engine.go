// Package engine is the contract between the shim and whatever gives a box its kernel. An engine turns a description into one
// jailed program and a connection to the agent inside; it keeps no state, supervises nothing and knows neither the database nor
// other engines. Callers decide by [Capabilities], never by an engine's name.
package engine

import (
	"context"
	"net"

	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/spec"
)

// Capabilities says what an engine can do on this host, and if it can run at all.
type Capabilities struct {
	Name    string `json:"name"`
	Usable  bool   `json:"usable"`
	Reason  string `json:"reason,omitempty"`  // why not usable, or what was chosen
	Install string `json:"install,omitempty"` // next step when not usable
	Kernel  string `json:"kernel,omitempty"`  // what kernel a box gets
	// HardwareIsolation is true where the box's kernel is kept apart by the processor's virtualisation.
	HardwareIsolation bool `json:"hardware_isolation"`
}

// Spec is one start of one box.
type Spec struct {
	ID       string // names the generation, for logs
	Box      spec.Box
	Sentry   string   // program of the gvisor engine
	Scaffold string   // image that holds the agent
	Images   []string // the box's read-only root: EROFS files to be laid one over the other, the lowest first
	StateDir string   // the box's writable layer
	HostID   uint32   // first unprivileged id of the jail, for root
	Debug    bool
}

// Launcher spawns the jail that an engine asks for: it places the first process, records it and only then lets it go. The engine
// fills in what runs inside and leaves the rest of the configuration to the launcher.
type Launcher interface {
	Launch(ctx context.Context, cfg jail.Config) (*jail.Jail, error)
}

// Instance is a started engine.
type Instance interface {
	// Agent is the stream to the box's agent, owned by the caller.
	Agent() net.Conn
	// Jail is what it runs in: its end is the engine's end.
	Jail() *jail.Jail
}

// Engine starts boxes.
type Engine interface {
	Name() string
	// Probe looks at the host; it starts nothing that outlives the call.
	Probe(ctx context.Context) Capabilities
	// Start returns when the kernel runs and the agent is about to. On error nothing is left but what the launcher owns.
	Start(ctx context.Context, s Spec, l Launcher) (Instance, error)
}
