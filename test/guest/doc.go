// Package guest runs the built program in virtual machines whose control groups are what this host's are not: version 2 only, with
// controllers, as on a usual server today; version 1 only; and none that can be written to, as in a container. Its tests boot Debian's
// kernel under QEMU's own processor emulation, so that they need no hardware for it. Package inside holds what is run there beside the
// tests that run on every host. It is for tests only.
package guest
