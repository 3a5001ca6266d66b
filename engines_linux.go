package coffer

import (
	"github.com/coffer-box/coffer/internal/engine"
	"github.com/coffer-box/coffer/internal/engine/gvisor"
)

// engines lists the engines of this build, best first. It is the one place where they are put together.
func engines() []engine.Engine { return []engine.Engine{gvisor.Engine{}} }
