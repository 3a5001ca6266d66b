//go:build !leaktest_nokill

package jail

import "syscall"

// dieWithParent is what the kernel sends to a jail when its shim ends. It is none only in the build that shows the leak tests failing.
const dieWithParent = syscall.SIGKILL

// Outlives is set in that build only.
const Outlives = false
