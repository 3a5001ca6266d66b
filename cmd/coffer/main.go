// Command coffer runs OCI images as boxes: isolated workspaces with a kernel of their own. See README.md.
package main

import (
	"os"

	"github.com/coffer-box/coffer/internal/cli"
	"github.com/coffer-box/coffer/internal/helper"
)

func main() {
	if code, mine := helper.Run(os.Args); mine {
		os.Exit(code)
	}
	os.Exit(cli.Main(os.Args[1:]))
}
