//go:build amd64 || arm64

package jail

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denied is what neither the file server nor a user-space kernel ever needs, and what an escaped guest would try first. The
// sentry adds a far narrower allow-list of its own before it runs guest code.
func denied() []uint32 {
	return append([]uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE,
		unix.SYS_FSOPEN, unix.SYS_FSMOUNT, unix.SYS_FSCONFIG, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, unix.SYS_SETNS, unix.SYS_UNSHARE,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD, unix.SYS_SYSLOG,
		unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX,
		unix.SYS_CLOCK_ADJTIME, unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_PROCESS_VM_READV,
		unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER,
		unix.SYS_IO_URING_REGISTER, unix.SYS_FANOTIFY_INIT, unix.SYS_FANOTIFY_MARK, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL,
		unix.SYS_VHANGUP, unix.SYS_PERSONALITY, unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID,
		unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_SETGROUPS, unix.SYS_SETFSUID, unix.SYS_SETFSGID, unix.SYS_CAPSET,
		unix.SYS_MKNODAT,
	}, deniedHere()...)
}

// newNamespaces are the flags of clone that make one. In a user namespace of its own a process has every capability again.
const newNamespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS |
	unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

// Offsets in struct seccomp_data (linux/seccomp.h). Of an argument the filter looks at the low half, which is all that the kernel takes
// of those below, on machines that have it first.
const (
	offNumber = 0
	offArch   = 4
	offArg0   = 16
)

// filter is the jail's system call filter as a BPF program: all is allowed but what is named. The kernel stops at the first return.
func filter() []unix.SockFilter {
	const (
		allow  = unix.SECCOMP_RET_ALLOW
		refuse = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		absent = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	)
	load := func(off uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: off}
	}
	ret := func(action uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
	}
	// when runs then, which must return, if what is loaded compares with k; unless, if not.
	when := func(op uint16, k uint32, then ...unix.SockFilter) []unix.SockFilter {
		return append([]unix.SockFilter{{Code: unix.BPF_JMP | op | unix.BPF_K, K: k, Jf: uint8(len(then))}}, then...)
	}
	unless := func(op uint16, k uint32, then ...unix.SockFilter) []unix.SockFilter {
		return append([]unix.SockFilter{{Code: unix.BPF_JMP | op | unix.BPF_K, K: k, Jt: uint8(len(then))}}, then...)
	}
	p := slices.Concat(
		// Through another architecture's entrance, such as a 64-bit kernel's for 32-bit programs, calls have other numbers, and none
		// below would be recognised.
		[]unix.SockFilter{load(offArch)}, unless(unix.BPF_JEQ, auditArch, ret(refuse)),
		[]unix.SockFilter{load(offNumber)}, foreignNumbers(when, ret(refuse)),
	)
	for _, n := range denied() {
		p = append(p, when(unix.BPF_JEQ, n, ret(refuse))...)
	}
	return slices.Concat(p,
		// Its flags are in memory, where no filter sees them. C libraries take this error as a reason to use clone.
		when(unix.BPF_JEQ, unix.SYS_CLONE3, ret(absent)),
		when(unix.BPF_JEQ, unix.SYS_CLONE, slices.Concat(
			[]unix.SockFilter{load(offArg0)}, when(unix.BPF_JSET, newNamespaces, ret(refuse)), []unix.SockFilter{ret(allow)})...),
		// The jail has no network. Of the other families some reach past the network namespace: vsock to the hypervisor.
		when(unix.BPF_JEQ, unix.SYS_SOCKET, slices.Concat(
			[]unix.SockFilter{load(offArg0)}, unless(unix.BPF_JEQ, unix.AF_UNIX, ret(refuse)), []unix.SockFilter{ret(allow)})...),
		[]unix.SockFilter{ret(allow)},
	)
}

func applySeccomp(*order) (Layer, error) {
	// With filters the kernel would read the one that is not given here, and without it does not come to that.
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0); errors.Is(err, unix.EINVAL) {
		return Layer{Detail: "the kernel has no seccomp filters"}, nil
	}
	prog := filter()
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	thread, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	switch {
	case e != 0:
		return Layer{}, fmt.Errorf("install system call filter: %w", e)
	case thread != 0:
		return Layer{}, fmt.Errorf("install system call filter: thread %d cannot be given it", thread)
	}
	return Layer{Active: true, Detail: fmt.Sprintf("%d system calls refused to the jail; the engine adds its own allow-list", len(denied()))}, nil
}
