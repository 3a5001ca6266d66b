//go:build jailtest_without

package jail

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func (o *order) off(layer string) bool { return slices.Contains(o.Without, layer) }

// without reads the names of the layers to leave out, one per line, from the file beside this program that is called like it with
// ".without" added.
func without() []string {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	b, err := os.ReadFile(exe + ".without")
	if err != nil {
		panic(err)
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' })
}

// hostTree takes hold of the host's files before the jail's root covers any; attach makes them visible under /host in the jail.
func (o *order) hostTree() (attach func(base string) error, err error) {
	if !o.off(layerRoot) {
		return func(string) error { return nil }, nil
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, err
	}
	return func(base string) error {
		dir := filepath.Join(base, "host")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		return unix.MoveMount(fd, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}, nil
}
