package jail

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_AARCH64

func deniedHere() []uint32 { return nil }

func foreignNumbers(func(uint16, uint32, ...unix.SockFilter) []unix.SockFilter, unix.SockFilter) []unix.SockFilter {
	return nil
}
