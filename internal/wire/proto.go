package wire

import (
	"time"

	"github.com/coffer-box/coffer/internal/spec"
)

// Version is the protocol's. Both ends are of one release, so they only compare it.
const Version = 1

// Operations the agent serves. The shim has more, and names them itself.
const (
	OpExtras    = "extras"
	OpConfigure = "configure"
	OpPing      = "ping"
	OpExec      = "exec"
	OpCheck     = "check"
	OpSignal    = "signal"
	OpProcesses = "processes"
	OpStats     = "stats"
	OpSync      = "sync"
	OpShutdown  = "shutdown"
	OpStat      = "stat"
	OpTarOut    = "tar-out"
	OpTarIn     = "tar-in"
)

// Extras are what an image has and its kernel does not show of it. They come before [Setup], in as many messages as it takes, once in a
// box's life, and are made in the writable layer.
type Extras struct {
	Lower   []string      `json:"lower,omitempty"` // as in Setup
	State   string        `json:"state,omitempty"`
	Xattrs  []SetupXattr  `json:"xattrs,omitempty"`
	Devices []SetupDevice `json:"devices,omitempty"`
}

// Setup tells an agent what it is in: the box's root and what is in it. Paths of the scaffold are those before the box's
// own root is entered.
type Setup struct {
	Hostname string   `json:"hostname"`
	Lower    []string `json:"lower,omitempty"` // the image: what is to be laid over each other, the lowest first
	State    string   `json:"state,omitempty"` // holds upper and work, made when missing; empty: "/state"
	ReadOnly bool     `json:"read_only,omitempty"`
	// Volumes are mounted in the order of their targets' depth, so that one may lie in another.
	Volumes []SetupVolume `json:"volumes,omitempty"`
	Tmpfs   []spec.Tmpfs  `json:"tmpfs,omitempty"`
	Files   []SetupFile   `json:"files,omitempty"`
}

// SetupVolume is a volume that the engine has put at Staging.
type SetupVolume struct {
	Staging  string `json:"staging"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// Fill gives it what the image has at its target, owner and mode included, once in the box's life.
	Fill bool `json:"fill,omitempty"`
}

// SetupFile is a file written into the box's root before anything runs: /etc/hosts, /etc/resolv.conf. It is written where it
// differs from what is there; with Keep only where there is none, or an empty one.
type SetupFile struct {
	Path string `json:"path"`
	Data []byte `json:"data"`
	Mode uint32 `json:"mode,omitempty"` // 0: 0644
	Keep bool   `json:"keep,omitempty"`
}

// SetupXattr is an extended attribute of a file of the image.
type SetupXattr struct {
	Path  []byte `json:"path"` // names of an image need not be UTF-8
	Name  string `json:"name"`
	Value []byte `json:"value"`
}

// SetupDevice is a device file of the image.
type SetupDevice struct {
	Path  []byte `json:"path"`
	Mode  uint32 `json:"mode"` // type and permissions
	UID   uint32 `json:"uid,omitempty"`
	GID   uint32 `json:"gid,omitempty"`
	Sec   int64  `json:"sec,omitempty"` // when it was changed, since 1970
	Nsec  int64  `json:"nsec,omitempty"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// Info is an agent's answer to a ping, to extras and to its configuration.
type Info struct {
	Version int    `json:"version"`
	Kernel  string `json:"kernel,omitempty"`
	PID     int    `json:"pid"`
	// Warnings are steps of the configuration that failed and that a box can do without.
	Warnings []string `json:"warnings,omitempty"`
}

// ExecRequest starts a process.
type ExecRequest struct {
	Process spec.Process `json:"process"`
	// Detach lets the process outlive its client.
	Detach bool `json:"detach,omitempty"`
	// Main makes it the box's main process: it outlives its client, and when it ends the box does. There is one.
	Main bool `json:"main,omitempty"`
}

// ExitStatus is how a process ended.
type ExitStatus struct {
	Code     int  `json:"code"`             // as a shell has it: 128+n for death by signal n
	Signal   int  `json:"signal,omitempty"` // the signal that killed it; 0: it exited
	CoreDump bool `json:"core_dump,omitempty"`
	TimedOut bool `json:"timed_out,omitempty"` // killed for its Process.Timeout
	// Processor time and peak memory of the process and the children it waited for.
	User   time.Duration `json:"user,omitempty"`
	System time.Duration `json:"system,omitempty"`
	MaxRSS int64         `json:"max_rss,omitempty"` // bytes
	// Truncated output was still open in the hands of what the process left behind, and is no longer followed.
	Truncated bool `json:"truncated,omitempty"`
}

// CheckRequest runs one health check, to its end or its timeout. There is one at a time, and it ends with the stream that asked for it.
type CheckRequest struct {
	Process spec.Process `json:"process"` // without a terminal
}

// MaxCheckOutput is what is kept of a check's output.
const MaxCheckOutput = 4 << 10

// CheckReply is how a check ended.
type CheckReply struct {
	Exit ExitStatus `json:"exit"`
	// Output is the beginning of both its outputs. [Client.Check] sees to it that it is at most MaxCheckOutput bytes.
	Output []byte `json:"output,omitempty"`
	Cut    bool   `json:"cut,omitempty"` // there was more
}

// Event is what a client sends on a control stream.
type Event struct {
	Signal int           `json:"signal,omitempty"`
	Resize *spec.WinSize `json:"resize,omitempty"`
}

// status is what the serving side sends on a control stream: Started or Error first, then Exit, and before that perhaps Ended.
type status struct {
	Started bool        `json:"started,omitempty"`
	PID     int         `json:"pid,omitempty"`
	Error   *Error      `json:"error,omitempty"`
	Ended   bool        `json:"ended,omitempty"` // only output still comes, and not without end
	Exit    *ExitStatus `json:"exit,omitempty"`
}

// ProcessInfo is one process of a box.
type ProcessInfo struct {
	PID     int           `json:"pid"`
	PPID    int           `json:"ppid"`
	Session int           `json:"session"`
	UID     uint32        `json:"uid"`
	User    string        `json:"user,omitempty"` // name in the box's passwd
	State   string        `json:"state"`
	CPU     time.Duration `json:"cpu"`
	Age     time.Duration `json:"age"`
	RSS     int64         `json:"rss"` // bytes
	Command []string      `json:"command"`
}

// Stats is what the box's kernel says about it.
type Stats struct {
	MemTotal     int64         `json:"mem_total"`
	MemAvailable int64         `json:"mem_available"`
	Processes    int           `json:"processes"`
	Uptime       time.Duration `json:"uptime"`
	DiskTotal    int64         `json:"disk_total"` // file system of "/"
	DiskFree     int64         `json:"disk_free"`
	AgentRSS     int64         `json:"agent_rss"`
}

// FileInfo describes a file in a box.
type FileInfo struct {
	Path    string    `json:"path"` // after links, where they were followed
	Name    string    `json:"name"`
	Size    int64     `json:"size"`
	Mode    uint32    `json:"mode"` // as io/fs.FileMode
	ModTime time.Time `json:"mtime"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Link    string    `json:"link,omitempty"` // a symlink's target
}

// PathRequest names a file in a box.
type PathRequest struct {
	Path   string `json:"path"`
	Follow bool   `json:"follow,omitempty"` // if Path itself is a symlink, mean its target
}

// TarInOptions says how an archive is unpacked.
type TarInOptions struct {
	// NoOverwriteDir refuses to replace a directory by something else, or the other way round.
	NoOverwriteDir bool `json:"no_overwrite_dir,omitempty"`
	// Owner, when set, owns everything unpacked, instead of the archive's owners. "user[:group]", as for a process.
	Owner string `json:"owner,omitempty"`
	// Mkdir creates the destination directory when it is missing.
	Mkdir bool `json:"mkdir,omitempty"`
}

// TarInRequest is the body of OpTarIn.
type TarInRequest struct {
	Path string `json:"path"`
	TarInOptions
}

// SignalRequest sends a signal to the main process.
type SignalRequest struct {
	Signal int `json:"signal"`
}

// ShutdownRequest ends a box in order.
type ShutdownRequest struct {
	Signal  int           `json:"signal"` // to the main process first; 0: SIGTERM
	Timeout time.Duration `json:"timeout"`
}

// ShutdownReply says how it went.
type ShutdownReply struct {
	Exit   *ExitStatus `json:"exit,omitempty"` // of the main process, if there was one
	Forced bool        `json:"forced,omitempty"`
}
