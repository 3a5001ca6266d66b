// Package spec holds the resolved description of a box: what the shim, the engine and the agent need to know to run it, after
// names, defaults and the image's configuration have been worked out. It is data only: it validates nothing, reads no file and
// starts nothing. The public package turns a user's request into a [Box]; the state database stores it as JSON.
package spec

import "time"

// Box is everything that does not change between two starts of a box.
type Box struct {
	Image       string            `json:"image"`     // reference as the user wrote it
	ImageID     string            `json:"image_id"`  // digest of the image's configuration, "sha256:…"
	RootfsID    string            `json:"rootfs_id"` // names the root filesystem artifact in the image store
	Engine      string            `json:"engine"`    // name of the engine that was chosen
	Main        Process           `json:"main"`      // the box's main process
	Hostname    string            `json:"hostname"`  // never empty
	Labels      map[string]string `json:"labels,omitempty"`
	Ports       []string          `json:"ports,omitempty"` // that the image says it serves, as "5432/tcp"
	Resources   Resources         `json:"resources"`
	ReadOnly    bool              `json:"read_only,omitempty"`
	Tmpfs       []Tmpfs           `json:"tmpfs,omitempty"`
	Volumes     []Volume          `json:"volumes,omitempty"`
	StopSignal  int               `json:"stop_signal"`  // signal number, never 0
	StopTimeout time.Duration     `json:"stop_timeout"` // between the stop signal and the kill
	Remove      bool              `json:"remove,omitempty"`
	Restart     Restart           `json:"restart"`
	Timeout     time.Duration     `json:"timeout,omitempty"` // whole run of one generation; 0: none
	Health      *Health           `json:"health,omitempty"`  // nil: not checked
	OpenStdin   bool              `json:"open_stdin,omitempty"`
	LogMaxBytes int64             `json:"log_max_bytes,omitempty"` // per log file; 0: the default
	LogFiles    int               `json:"log_files,omitempty"`     // kept files; 0: the default
}

// Process is a program to run inside a box, main or exec'd.
type Process struct {
	Args    []string `json:"args"`           // Args[0] is looked up in Env's PATH inside the box
	Env     []string `json:"env,omitempty"`  // complete; later duplicates win
	Dir     string   `json:"dir,omitempty"`  // empty: "/"
	User    string   `json:"user,omitempty"` // "user[:group]", names or numbers, looked up in the box's own passwd; empty: 0:0
	TTY     bool     `json:"tty,omitempty"`
	Rlimits []Rlimit `json:"rlimits,omitempty"`
	WinSize WinSize  `json:"win_size,omitzero"`
	// Timeout ends the process, and every process of its session, after this time; 0: never.
	Timeout time.Duration `json:"timeout,omitempty"`
}

// Health is how a box is found to be healthy: a command that is run in it again and again, and must exit with 0.
type Health struct {
	Args          []string      `json:"args"`
	Interval      time.Duration `json:"interval"`       // from the end of a check to the next
	Timeout       time.Duration `json:"timeout"`        // of one check
	StartPeriod   time.Duration `json:"start_period"`   // what fails in it, before a first success, does not count
	StartInterval time.Duration `json:"start_interval"` // instead of Interval, in that time
	Retries       int           `json:"retries"`        // so many failures in a row make a box unhealthy
}

// WinSize is a terminal's size in characters.
type WinSize struct {
	Rows uint16 `json:"rows"`
	Cols uint16 `json:"cols"`
}

// Rlimit is one resource limit, named as in setrlimit(2) without its prefix and in lower case: "nofile", "nproc", …
type Rlimit struct {
	Name string `json:"name"`
	Soft uint64 `json:"soft"`
	Hard uint64 `json:"hard"`
}

// Resources bounds what the box may use of the host. Zero values mean no limit.
type Resources struct {
	Memory     int64   `json:"memory,omitempty"`    // bytes
	CPUs       float64 `json:"cpus,omitempty"`      // in units of one core
	PIDs       int64   `json:"pids,omitempty"`      // processes and threads
	DiskSize   int64   `json:"disk_size,omitempty"` // bytes of the writable layer and the anonymous volumes together
	BestEffort bool    `json:"best_effort,omitempty"`
}

// Tmpfs is a file system in memory, mounted inside the box. As with Docker, nothing on it can be executed, is set-user-id or a
// device, unless that is asked for.
type Tmpfs struct {
	Target   string `json:"target"`
	Size     int64  `json:"size,omitempty"` // bytes; 0: the kernel's default
	Mode     uint32 `json:"mode,omitempty"` // permission bits; 0: 01777
	ReadOnly bool   `json:"read_only,omitempty"`
	Exec     bool   `json:"exec,omitempty"`
	SUID     bool   `json:"suid,omitempty"`
	Dev      bool   `json:"dev,omitempty"`
}

// Volume is a host file or directory seen inside the box.
type Volume struct {
	Source    string `json:"source"` // absolute, symlinks resolved at creation
	Target    string `json:"target"` // absolute path in the box
	ReadOnly  bool   `json:"read_only,omitempty"`
	Anonymous bool   `json:"anonymous,omitempty"` // made by Coffer, removed with rm -v
}

// Restart says when a box whose main process ended is started again.
type Restart struct {
	Policy string `json:"policy"`        // "no", "on-failure", "always"
	Max    int    `json:"max,omitempty"` // for on-failure; 0: no bound
}
