// Package plan is what the guest's first process is told to do. It is data only.
package plan

// File is where the guest's first process finds the plan, as JSON.
const File = "/plan.json"

// Disk is where that process mounts its disk, and what becomes the root.
const Disk = "/disk"

// What the guest says on its console, each at the beginning of a line.
const (
	SaysEnd  = "GUEST END"  // a step's name and exit code follow
	SaysPass = "GUEST PASS" // everything was done, whatever the steps' exit codes
	SaysFail = "GUEST FAIL" // a reason follows
)

// Cgroups says which control groups a guest has.
type Cgroups string

// Kinds of guests.
const (
	V2   Cgroups = "v2"   // version 2 only, with controllers
	V1   Cgroups = "v1"   // version 1 only
	None Cgroups = "none" // version 2, mounted read-only, as in a container without delegation
)

// Plan is one run of a guest.
type Plan struct {
	Cgroups Cgroups
	Modules []string // kernel modules, in the order of their loading
	Steps   []Step
}

// Step is one program.
type Step struct {
	Name string
	Argv []string
	Env  []string
	Dir  string
}
