//go:build linux && (amd64 || arm64)

package jail

import (
	"testing"

	"golang.org/x/sys/unix"
)

// judge runs a filter as the kernel does, over a call of this architecture or another.
func judge(t *testing.T, prog []unix.SockFilter, arch, number, arg0 uint32) uint32 {
	t.Helper()
	data := map[uint32]uint32{offNumber: number, offArch: arch, offArg0: arg0}
	var a uint32
	for pc := 0; pc < len(prog); {
		in := prog[pc]
		pc++
		var holds bool
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			v, ok := data[in.K]
			if !ok {
				t.Fatalf("instruction %d loads from offset %d", pc-1, in.K)
			}
			a = v
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			holds = a == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			holds = a >= in.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			holds = a&in.K != 0
		default:
			t.Fatalf("instruction %d has code %#x", pc-1, in.Code)
		}
		if holds {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

func TestFilter(t *testing.T) {
	const (
		allowed = uint32(unix.SECCOMP_RET_ALLOW)
		refused = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		absent  = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	)
	prog := filter()
	type call struct {
		name               string
		arch, number, arg0 uint32
		want               uint32
	}
	calls := []call{
		{"clone3", auditArch, unix.SYS_CLONE3, 0, absent},
		{"clone of a process", auditArch, unix.SYS_CLONE, uint32(unix.SIGCHLD), allowed},
		{"clone of a thread", auditArch, unix.SYS_CLONE, unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND, allowed},
		{"clone of a user namespace", auditArch, unix.SYS_CLONE, unix.CLONE_NEWUSER | uint32(unix.SIGCHLD), refused},
		{"clone of a network namespace", auditArch, unix.SYS_CLONE, unix.CLONE_NEWNET, refused},
		{"unix socket", auditArch, unix.SYS_SOCKET, unix.AF_UNIX, allowed},
		{"internet socket", auditArch, unix.SYS_SOCKET, unix.AF_INET, refused},
		{"vsock", auditArch, unix.SYS_SOCKET, unix.AF_VSOCK, refused},
		{"netlink socket", auditArch, unix.SYS_SOCKET, unix.AF_NETLINK, refused},
		{"read", auditArch, unix.SYS_READ, 0, allowed},
		{"openat", auditArch, unix.SYS_OPENAT, 0, allowed},
		{"execve", auditArch, unix.SYS_EXECVE, 0, allowed},
		{"seccomp", auditArch, unix.SYS_SECCOMP, 0, allowed},
		{"read of 32-bit x86", unix.AUDIT_ARCH_I386, 3, 0, refused},
		{"read of 32-bit ARM", unix.AUDIT_ARCH_ARM, 3, 0, refused},
	}
	for _, n := range denied() {
		calls = append(calls, call{"a denied call", auditArch, n, 0, refused})
	}
	if auditArch == unix.AUDIT_ARCH_X86_64 {
		calls = append(calls, call{"read of x32", auditArch, 0x40000000 + unix.SYS_READ, 0, refused})
	}
	for _, c := range calls {
		if got := judge(t, prog, c.arch, c.number, c.arg0); got != c.want {
			t.Errorf("%s (number %d of %#x, argument %#x): action %#x, want %#x", c.name, c.number, c.arch, c.arg0, got, c.want)
		}
	}
}
