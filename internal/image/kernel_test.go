package image

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// checkKernelXattr mounts an image and looks at an attribute.
func checkKernelXattr(t *testing.T, path, name, attr, want string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Log("mounting an image takes root: attributes are not checked by the kernel")
		return
	}
	at := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, at).CombinedOutput(); err != nil {
		t.Logf("this host does not mount the image, attributes are not checked by the kernel: %v: %s", err, out)
		return
	}
	defer func() {
		if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	buf := make([]byte, 1024)
	n, err := unix.Lgetxattr(filepath.Join(at, name), attr, buf)
	if err != nil || string(buf[:max(n, 0)]) != want {
		t.Errorf("%s of %s: %q, %v; want %q", attr, name, buf[:max(n, 0)], err, want)
	}
}

// background is the context of the helper process, which has no test.
func background() context.Context { return context.Background() }
