//go:build !linux

package supervise

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Boxes need Linux, so there is nothing to supervise elsewhere. What follows lets the library be built there.

func pidfdOpen(int) (int, error) { return -1, errors.ErrUnsupported }

func pidfdSignal(int, unix.Signal) error { return errors.ErrUnsupported }

func collect(int) {}

func fileHandle(int) ([]byte, int32) { return nil, 0 }

func openFileHandle([]byte, int32) (int, error) { return -1, errors.ErrUnsupported }

func setLock(*os.File, *unix.Flock_t) error { return errors.ErrUnsupported }

func getLock(*os.File, *unix.Flock_t) error { return errors.ErrUnsupported }

func idOfUnasked(string) (fileID, bool) { return fileID{}, false }
