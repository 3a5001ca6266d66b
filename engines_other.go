//go:build !linux

package coffer

import "github.com/coffer-box/coffer/internal/engine"

// engines lists none: the images of a home can be worked on here, but no box can run.
func engines() []engine.Engine { return nil }
