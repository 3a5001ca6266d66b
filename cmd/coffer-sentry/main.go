// Command coffer-sentry is the user-space kernel of one box. It is embedded in coffer and started inside the jail; it is of no
// use on its own.
package main

import (
	"fmt"
	"os"

	"github.com/coffer-box/coffer/internal/sentry"
)

func main() {
	code, err := sentry.Main()
	if err != nil {
		fmt.Fprintln(os.Stderr, "coffer-sentry:", err)
	}
	os.Exit(code)
}
