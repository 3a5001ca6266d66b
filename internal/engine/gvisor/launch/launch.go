// Package launch is what the gVisor engine tells the sentry program at its start: which descriptors it was given and what to
// mount where. It is data only, shared by two programs that import nothing else of each other, so that neither the command
// line nor the library is linked with gVisor's kernel.
package launch

// ConfigFD is the descriptor from which the sentry reads its [Config] as JSON, up to the end of the file.
const ConfigFD = 3

// ReadyByte is what the sentry writes to [Config.ReadyFD] once the agent is about to run its first instruction. Any other
// bytes are the text of an error.
const ReadyByte = 'R'

// Paths inside the sandbox, before the agent has made the box's own root.
const (
	AgentPath = "/agent" // the agent's program, in the scaffold image
	LowerPath = "/lower" // the segments of the box's image, read-only, at LowerPath/0, LowerPath/1, …
	StatePath = "/state" // the box's writable layer, served by the jail's file server
	VolPath   = "/vol"   // volumes are at VolPath/0, VolPath/1, …
	AgentFD   = 3        // the agent's descriptor of the stream to the shim
)

// Config describes one sandbox.
type Config struct {
	ID       string `json:"id"`
	Hostname string `json:"hostname"`

	ReadyFD    int   `json:"ready_fd"`
	AgentFD    int   `json:"agent_fd"`    // stream socket that becomes the agent's descriptor AgentFD
	ScaffoldFD int   `json:"scaffold_fd"` // EROFS image that is the sandbox's first root
	ImageFDs   []int `json:"image_fds"`   // EROFS images of the box, the lowest first
	StateFD    int   `json:"state_fd"`    // LISAFS socket of the writable layer

	Volumes []Volume `json:"volumes,omitempty"`

	AgentArgs []string `json:"agent_args"`

	NumCPU      int    `json:"num_cpu"`      // 0: as many as the host has
	TotalMemory uint64 `json:"total_memory"` // bytes the guest is told it has; 0: the host's
	Debug       bool   `json:"debug,omitempty"`
}

// Volume is one LISAFS connection mounted at VolPath/<index>.
type Volume struct {
	FD        int  `json:"fd"`
	ReadOnly  bool `json:"read_only,omitempty"`
	Exclusive bool `json:"exclusive,omitempty"` // nobody else changes it while the sandbox runs, so its kernel may cache it
}
