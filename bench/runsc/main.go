// Command runsc is gVisor's own runtime, from the module that Coffer pins, for the benchmark to compare with. It has the few commands
// that the comparison needs and leaves out the embedded checkpoint programs, which would make every start of it dearer. It is a
// module of its own, so that what only runsc needs stays out of Coffer's dependencies.
package main

import (
	"gvisor.dev/gvisor/runsc/cli"
	"gvisor.dev/gvisor/runsc/cmd"
	"gvisor.dev/gvisor/runsc/cmd/sentry/sentrycmd"
	"gvisor.dev/gvisor/runsc/cmd/util"
)

func main() {
	const user, internal = "", "internal use only"
	cli.Run(nil, map[util.SubCommand]string{
		new(cmd.Create): user,
		new(cmd.Delete): user,
		new(cmd.Exec):   user,
		new(cmd.Kill):   user,
		new(cmd.List):   user,
		new(cmd.Run):    user,
		new(cmd.Start):  user,
		new(cmd.State):  user,
		new(cmd.Wait):   user,

		new(sentrycmd.Boot):   internal,
		new(sentrycmd.Umount): internal,
		new(cmd.Gofer):        internal,
	}, nil)
}
