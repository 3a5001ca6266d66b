package jail

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// deniedHere are the calls that only this architecture has.
func deniedHere() []uint32 {
	return []uint32{unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_USELIB, unix.SYS_USTAT, unix.SYS_SYSFS, unix.SYS_MKNOD}
}

// foreignNumbers refuses the calls of the x32 ABI, which come under the same architecture with this bit in their number.
func foreignNumbers(when func(uint16, uint32, ...unix.SockFilter) []unix.SockFilter, refuse unix.SockFilter) []unix.SockFilter {
	const x32Bit = 0x40000000
	return when(unix.BPF_JGE, x32Bit, refuse)
}
