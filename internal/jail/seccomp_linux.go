package jail

import (
	"fmt"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// denied is what neither the file server nor a user-space kernel ever needs, and what an escaped guest would try first. The
// sentry adds a far narrower allow-list of its own before it runs guest code.
var denied = []string{
	"mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr",
	"setns", "unshare", "bpf", "perf_event_open", "userfaultfd", "keyctl", "add_key", "request_key", "kexec_load", "kexec_file_load",
	"init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog",
	"sethostname", "setdomainname", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "open_by_handle_at",
	"name_to_handle_at", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "io_uring_setup", "io_uring_enter",
	"io_uring_register", "fanotify_init", "fanotify_mark", "lookup_dcookie", "nfsservctl", "vhangup", "personality", "iopl", "ioperm",
	"modify_ldt", "uselib", "ustat", "sysfs", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups",
	"setfsuid", "setfsgid", "capset", "mknod", "mknodat",
}

// newNamespaces are the flags of clone that make one. In a user namespace of its own a process has every capability again.
const newNamespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS |
	unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

func policy() seccomp.Policy {
	when := func(name string, op seccomp.Operation, arg0 uint64) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{Name: name, Conditions: seccomp.ArgumentConditions{{Operation: op, Value: arg0}}}
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionErrno, Names: knownSyscalls(denied), NamesWithCondtions: []seccomp.NameWithConditions{
				when("clone", seccomp.BitsSet, newNamespaces),
				// The jail has no network. Of the other families some reach past the network namespace: vsock to the hypervisor.
				when("socket", seccomp.NotEqual, unix.AF_UNIX),
			}},
			// Its flags are in memory, where no filter sees them. C libraries take this error as a reason to use clone.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: knownSyscalls([]string{"clone3"})},
		},
	}
}

func applySeccomp(*order) (Layer, error) {
	if !seccomp.Supported() {
		return Layer{Detail: "the kernel has no seccomp filters"}, nil
	}
	err := seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: policy()})
	if err == nil {
		err = refuseForeignCalls()
	}
	if err != nil {
		return Layer{}, fmt.Errorf("install system call filter: %w", err)
	}
	return Layer{Active: true, Detail: fmt.Sprintf("%d system calls refused to the jail; the engine adds its own allow-list", len(denied))}, nil
}

// refuseForeignCalls refuses what comes through another architecture's entrance, such as a 64-bit kernel's for 32-bit programs:
// calls have other numbers there, so that none of those above would be recognised.
func refuseForeignCalls() error {
	native, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	const archOffset = 4 // in struct seccomp_data
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: archOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(native.ID), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
	}
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&fprog)))
	if e != 0 {
		return e
	}
	return nil
}

// knownSyscalls keeps the names that this architecture has.
func knownSyscalls(names []string) []string {
	info, err := arch.GetInfo("")
	if err != nil {
		return nil
	}
	var out []string
	for _, n := range names {
		if _, ok := info.SyscallNames[n]; ok {
			out = append(out, n)
		}
	}
	return out
}
