// Package escape runs a program in the place of the engine's kernel, as an attacker who has taken that kernel over would have it, and
// lets it try to get out of the jail. Every attempt must fail; and with the layers left out that stop it, the same attempt must
// get through, or it would prove nothing.
package escape

// SetuidPath is a program with the setuid bit, in the directory of the box's writable layer, which the kernel is given.
const SetuidPath = "/state/setuid"

// ReportMark begins the line of the shim's log that holds the report, which is a JSON object of outcomes by the attempts' names.
const ReportMark = "prisoner's report: "

// PlanSize is how many bytes at the end of the prisoner's file hold the [Plan] as JSON, padded with spaces.
const PlanSize = 8192

// HostPrefix is where a build without the layer «own root» shows the host's files.
const HostPrefix = "/host"

// Plan tells the prisoner what to try. All of it is on the host, outside the jail.
type Plan struct {
	OtherFile string // a file of another box
	Database  string
	PID       int    // a process of the same user's
	Mark      string // in that process' command line
	LeakDev   uint64 // the file that the command which started the box had open
	LeakIno   uint64
	Port      int    // on the loopback interface
	Abstract  string // name of a socket
	ShmKey    int    // of a System V segment
	// Namespaces are the host's, by the name of the file in /proc/self/ns.
	Namespaces map[string]string
}

// Outcome is how one attempt ended.
type Outcome struct {
	Through bool
	// Unknown is why this host cannot show it.
	Unknown string `json:",omitempty"`
	Detail  string
}
