// Coffer-registry is the part of coffer that reaches registries. It is embedded in coffer and run by it.
package main

import (
	"fmt"
	"os"

	"github.com/coffer-box/coffer/internal/courier/server"
)

func main() {
	if err := server.Serve(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "coffer-registry:", err)
		os.Exit(1)
	}
}
