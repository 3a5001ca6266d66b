package jail

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// idMappedTree clones the mount tree at source and shows its ids 0 to IDCount-1 as hostID and up, so that a jail without any
// right over the host's ids can serve a volume with the owners it has. Only real root may do this.
func idMappedTree(source string, hostID uint32) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_NO_AUTOMOUNT)
	if err != nil {
		return nil, fmt.Errorf("open volume %s: %w", source, err)
	}
	tree := os.NewFile(uintptr(fd), source)
	ns, err := mappingNamespace(hostID)
	if err != nil {
		tree.Close()
		return nil, err
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tree.Close()
		return nil, fmt.Errorf("map the owners of volume %s: %w: its file system cannot be id-mapped; "+
			"put the directory on ext4, xfs, btrfs or tmpfs, or run coffer as an ordinary user", source, err)
	}
	return tree, nil
}

// mappingNamespace makes a user namespace whose only purpose is to carry the mapping.
func mappingNamespace(hostID uint32) (*os.File, error) {
	// The child stops at its exec because it is traced, and only the tracing thread may end that.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(hostID), Size: IDCount}}
	cmd := &exec.Cmd{Path: "/proc/self/exe", Args: []string{Marker}, Env: []string{}, SysProcAttr: &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: m, GidMappings: m, Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}}
	if err := cmd.Start(); err != nil {
		return nil, explainSpawn(err)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	_ = cmd.Process.Kill()
	_, _ = cmd.Process.Wait()
	if err != nil {
		return nil, fmt.Errorf("open mapping namespace: %w", err)
	}
	return ns, nil
}
