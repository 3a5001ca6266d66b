//go:build !linux

package erofs

import (
	"errors"
	"os"
)

// punchHole is not offered here; the caller writes zeros.
func punchHole(*os.File, int64, int64) error { return errors.ErrUnsupported }
