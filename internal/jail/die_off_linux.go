//go:build leaktest_nokill

package jail

import "syscall"

// dieWithParent is none in this build, as in runtimes whose tree outlives the launcher.
const dieWithParent = syscall.Signal(0)

// Outlives has the first process live on when its program has ended, and its shim go away without ending it.
const Outlives = true
