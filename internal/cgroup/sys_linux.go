package cgroup

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

func onCgroupFS(path string) bool {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	return err == nil && (int64(st.Type) == unix.CGROUP2_SUPER_MAGIC || int64(st.Type) == unix.CGROUP_SUPER_MAGIC)
}

// killPasses bounds the sweep of members that are not frozen and may fork meanwhile.
const killPasses = 100

// killMembers signals the members one by one until a pass finds nobody new. Each is held before its membership is read again, so
// that a number that was reused in between is not signalled.
func killMembers(dir string) error {
	seen := map[int]bool{}
	for range killPasses {
		pids, err := below(dir)
		if err != nil {
			return err
		}
		held := map[int]int{}
		for _, pid := range pids {
			if !seen[pid] && pid != os.Getpid() {
				if fd, err := unix.PidfdOpen(pid, 0); err == nil {
					held[pid] = fd
				}
			}
		}
		if len(held) == 0 {
			return nil
		}
		again, err := below(dir)
		for pid, fd := range held {
			if err == nil && slices.Contains(again, pid) {
				seen[pid] = true
				if e := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); e != nil && e != unix.ESRCH {
					err = fmt.Errorf("kill process %d: %w", pid, e)
				}
			}
			unix.Close(fd)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
