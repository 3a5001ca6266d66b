package supervise

import (
	"os"

	"golang.org/x/sys/unix"
)

func pidfdOpen(pid int) (int, error) { return unix.PidfdOpen(pid, 0) }

func pidfdSignal(fd int, sig unix.Signal) error { return unix.PidfdSendSignal(fd, sig, nil, 0) }

// collect takes the status of an ended process that happens to be our child, so that a long-lived caller keeps no zombies.
func collect(fd int) { _ = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG, nil) }

// fdPidfsRoot stands for the root of pidfs in open_by_handle_at.
const fdPidfsRoot = -10002

// fileHandle is the process' handle on pidfs; empty where the kernel gives none.
func fileHandle(pidfd int) ([]byte, int32) {
	h, _, err := unix.NameToHandleAt(pidfd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, 0
	}
	return h.Bytes(), h.Type()
}

func openFileHandle(handle []byte, kind int32) (pidfd int, err error) {
	return unix.OpenByHandleAt(fdPidfsRoot, unix.NewFileHandle(kind, handle), unix.O_CLOEXEC)
}

func setLock(f *os.File, l *unix.Flock_t) error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, l) }

func getLock(f *os.File, l *unix.Flock_t) error { return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, l) }

// idOfUnasked identifies a file without asking its file system: one served by a stuck process would take the caller along.
func idOfUnasked(path string) (fileID, bool) {
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st) != nil {
		return fileID{}, false
	}
	return fileID{unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino}, true
}
