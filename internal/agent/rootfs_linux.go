package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/spec"
	"github.com/coffer-box/coffer/internal/wire"
)

// boxRoot makes a box's root by overlay, out of an image and a writable directory, in the scaffold that an engine prepared.
//
// It resolves every path of the box by itself, inside the new root: an image may hold a symlink anywhere, and before the root
// is entered such a link would lead into the scaffold. Nothing of the box runs yet, so nothing changes between a look and a
// use but a volume that another box writes to; what that could gain is a mount at another place of this same sandbox.
type boxRoot struct {
	newroot  string
	warnings []string
	mounted  bool
	ro       bool // the root file system is mounted read-only by now
}

// NewRootfs returns the Rootfs for a real box. It mounts on "/newroot" of the scaffold.
func NewRootfs() Rootfs { return &boxRoot{newroot: "/newroot"} }

// NewRootfsAt is NewRootfs with another scaffold directory.
func NewRootfsAt(newroot string) Rootfs { return &boxRoot{newroot: newroot} }

func (b *boxRoot) warn(what string, err error) {
	if err != nil {
		b.warnings = append(b.warnings, what+": "+err.Error())
	}
}

// Enter implements Rootfs.
func (b *boxRoot) Enter(s wire.Setup) ([]string, error) {
	if err := b.overlay(s.Lower, s.State); err != nil {
		return nil, err
	}
	for _, f := range []func(wire.Setup) error{b.prepare, b.fill, b.seal, b.system, b.tmpfs, b.volumes} {
		if err := f(s); err != nil {
			return nil, err
		}
	}
	if s.Hostname != "" {
		b.warn("set hostname", unix.Sethostname([]byte(s.Hostname)))
	}
	if err := b.enter(); err != nil {
		return nil, err
	}
	return b.warnings, nil
}

// overlay mounts the box's root, if it is not there yet.
func (b *boxRoot) overlay(lower []string, state string) error {
	if b.mounted {
		return nil
	}
	if err := os.MkdirAll(b.newroot, 0o755); err != nil {
		return err
	}
	err := b.mountOverlay(lower, state, 0)
	b.mounted = err == nil
	return err
}

func (b *boxRoot) mountOverlay(lower []string, state string, flags uintptr) error {
	top := slices.Clone(lower)
	slices.Reverse(top) // the kernel wants the uppermost first
	state = stateDir(state)
	upper, work := filepath.Join(state, "upper"), filepath.Join(state, "work")
	for _, d := range []string{work, upper} {
		err := os.Mkdir(d, 0o755)
		if err == nil && d == upper {
			err = ownRoot(upper, top)
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make the box's writable layer: %w", err)
		}
	}
	opts := "lowerdir=" + strings.Join(top, ":") + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", b.newroot, "overlay", flags, opts); err != nil {
		return fmt.Errorf("mount the box's root (%s): %w", opts, err)
	}
	return nil
}

// ownRoot gives the writable layer's root, which is the box's, what the image says of it.
func ownRoot(upper string, lower []string) error {
	var st unix.Stat_t
	if len(lower) == 0 {
		return errors.New("the box has no image")
	}
	if err := unix.Stat(lower[0], &st); err != nil {
		return err
	}
	if st.Uid != 0 || st.Gid != 0 {
		if err := os.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if mode := st.Mode & 0o7777; mode != 0o755 {
		return unix.Chmod(upper, mode)
	}
	return nil
}

func stateDir(given string) string {
	if given == "" {
		return "/state"
	}
	return given
}

// prepare writes what must be in the root before it may become read-only: files and places to mount on.
func (b *boxRoot) prepare(s wire.Setup) error {
	for _, d := range []string{"/proc", "/sys", "/dev"} {
		if _, err := b.mountpoint(d, true); err != nil {
			return err
		}
	}
	for _, t := range s.Tmpfs {
		_, err := b.mountpoint(t.Target, true)
		b.warn("make "+t.Target, err)
	}
	for _, v := range s.Volumes {
		_, err := b.mountpoint(v.Target, isDir(v.Staging))
		b.warn("make "+v.Target, err)
	}
	// Failures so far may be repaired by mounts on top: the mounts themselves report again.
	b.warnings = nil
	files := s.Files
	if s.Hostname != "" {
		files = append([]wire.SetupFile{{Path: "/etc/hostname", Data: []byte(s.Hostname + "\n")}}, files...)
	}
	for _, f := range files {
		b.warn("write "+f.Path, b.writeFile(f))
	}
	return nil
}

func (b *boxRoot) writeFile(f wire.SetupFile) error {
	p, err := b.resolve(f.Path)
	if err != nil {
		return err
	}
	// Each look is a round trip to the jail's file server.
	st, err := os.Lstat(p)
	switch {
	case err != nil:
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s in the box is not a file", f.Path)
	case f.Keep && st.Size() > 0:
		return nil
	case st.Size() == int64(len(f.Data)):
		if old, err := os.ReadFile(p); err == nil && bytes.Equal(old, f.Data) {
			return nil
		}
	}
	mode := os.FileMode(f.Mode)
	if mode == 0 {
		mode = 0o644
	}
	return os.WriteFile(p, f.Data, mode)
}

// seal mounts the root again, read-only. A remount would do where the kernel has it; a user-space kernel may not.
func (b *boxRoot) seal(s wire.Setup) error {
	if !s.ReadOnly {
		return nil
	}
	if err := unix.Unmount(b.newroot, 0); err != nil {
		return fmt.Errorf("make the box's root read-only: %w", err)
	}
	b.ro = true
	return b.mountOverlay(s.Lower, s.State, unix.MS_RDONLY)
}

const noExec = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// system mounts what every Linux program expects.
func (b *boxRoot) system(wire.Setup) error {
	proc, err := b.mountpoint("/proc", true)
	if err != nil {
		return err
	}
	if err := unix.Mount("proc", proc, "proc", noExec, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	sys, err := b.mountpoint("/sys", true)
	if err != nil {
		return err
	}
	if err := unix.Mount("sysfs", sys, "sysfs", noExec|unix.MS_RDONLY, ""); err != nil {
		// Where the network namespace is another's, only a view of what is there is allowed.
		b.warn("mount /sys", unix.Mount("/sys", sys, "", unix.MS_BIND|unix.MS_REC, ""))
	}
	return b.devices()
}

// node is a device every box has.
type node struct {
	name         string
	major, minor uint32
}

func nodes() []node {
	return []node{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}
}

func (b *boxRoot) devices() error {
	dev, err := b.mountpoint("/dev", true)
	if err != nil {
		return err
	}
	// A memory file system with the few devices a box needs, and not the kernel's own collection: in a virtual machine that one
	// holds the disks under the box's root.
	if err := unix.Mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
		if err := unix.Mount("devtmpfs", dev, "devtmpfs", unix.MS_NOSUID, "mode=755"); err != nil {
			return fmt.Errorf("mount /dev: %w", err)
		}
	}
	for _, n := range nodes() {
		if err := b.device(dev, n); err != nil {
			if n.name == "null" {
				return fmt.Errorf("make /dev/null: %w", err)
			}
			b.warn("make /dev/"+n.name, err)
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "core": "/proc/kcore",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); !errors.Is(err, os.ErrExist) {
			b.warn("link /dev/"+name, err)
		}
	}
	for _, d := range []string{"pts", "shm", "mqueue"} {
		if err := os.Mkdir(filepath.Join(dev, d), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make /dev/%s: %w", d, err)
		}
	}
	pts := filepath.Join(dev, "pts")
	if err := unix.Mount("devpts", pts, "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"); err != nil {
		// Group 5 may not exist for us, or the options may be unknown: the plain form is always right for one box.
		if err = unix.Mount("devpts", pts, "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "ptmxmode=0666"); err != nil {
			b.warn("mount /dev/pts", unix.Mount("devpts", pts, "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, ""))
		}
	}
	if _, err := os.Lstat(filepath.Join(dev, "ptmx")); err != nil {
		b.warn("link /dev/ptmx", os.Symlink("pts/ptmx", filepath.Join(dev, "ptmx")))
	}
	b.warn("mount /dev/shm", unix.Mount("shm", filepath.Join(dev, "shm"), "tmpfs", noExec, "mode=1777"))
	return nil
}

func (b *boxRoot) device(dev string, n node) error {
	p := filepath.Join(dev, n.name)
	var st unix.Stat_t
	if unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return nil
	}
	if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(n.major, n.minor))); err == nil {
		if err := os.Chmod(p, 0o666); err != nil {
			return err
		}
		f, err := os.OpenFile(p, os.O_RDWR|unix.O_NOCTTY, 0)
		if err == nil {
			return f.Close()
		}
		if n.name == "tty" && errors.Is(err, unix.ENXIO) {
			return nil // opens for who has a terminal
		}
		// Made, and without effect: so it is where a namespace may hold devices and not use them.
		os.Remove(p)
	}
	if err := os.WriteFile(p, nil, 0o666); err != nil {
		return err
	}
	return unix.Mount("/dev/"+n.name, p, "", unix.MS_BIND, "")
}

func (b *boxRoot) tmpfs(s wire.Setup) error {
	list := slices.Clone(s.Tmpfs)
	slices.SortStableFunc(list, func(x, y spec.Tmpfs) int { return depth(x.Target) - depth(y.Target) })
	for _, t := range list {
		p, err := b.mountpoint(t.Target, true)
		if err != nil {
			return fmt.Errorf("tmpfs %s: %w", t.Target, err)
		}
		mode := t.Mode
		if mode == 0 {
			mode = 0o1777
		}
		opts := fmt.Sprintf("mode=%o", mode)
		if t.Size > 0 {
			opts += fmt.Sprintf(",size=%d", t.Size)
		}
		var flags uintptr
		for _, f := range []struct {
			set  bool
			flag uintptr
		}{{!t.Exec, unix.MS_NOEXEC}, {!t.SUID, unix.MS_NOSUID}, {!t.Dev, unix.MS_NODEV}, {t.ReadOnly, unix.MS_RDONLY}} {
			if f.set {
				flags |= f.flag
			}
		}
		if err := unix.Mount("tmpfs", p, "tmpfs", flags, opts); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", t.Target, err)
		}
	}
	return nil
}

func (b *boxRoot) volumes(s wire.Setup) error {
	list := slices.Clone(s.Volumes)
	slices.SortStableFunc(list, func(x, y wire.SetupVolume) int { return depth(x.Target) - depth(y.Target) })
	for _, v := range list {
		if filepath.Clean("/"+v.Target) == "/" {
			return fmt.Errorf("volume: %q cannot be the root", v.Target)
		}
		p, err := b.mountpoint(v.Target, isDir(v.Staging))
		if err != nil {
			return fmt.Errorf("volume %s: %w", v.Target, err)
		}
		if err := unix.Mount(v.Staging, p, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount volume on %s: %w", v.Target, err)
		}
		if v.ReadOnly {
			if err := readOnly(p); err != nil {
				return fmt.Errorf("make volume %s read-only: %w", v.Target, err)
			}
		}
	}
	return nil
}

// readOnly fails closed: where a bind cannot be remounted, the engine must have mounted the source read-only itself.
func readOnly(p string) error {
	rerr := unix.Mount("", p, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	if rerr == nil {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(p, &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return nil
	}
	if err := unix.Access(p, unix.W_OK); errors.Is(err, unix.EROFS) {
		return nil
	}
	return rerr
}

func depth(p string) int { return strings.Count(filepath.Clean("/"+p), "/") }

func isDir(p string) bool {
	st, err := os.Stat(p)
	return err != nil || st.IsDir()
}

// maxLinks is the kernel's own bound for symlinks in one path.
const maxLinks = 40

// resolve walks a path of the box inside the new root, following symlinks as the box would. What does not exist is taken by
// name.
func (b *boxRoot) resolve(p string) (string, error) {
	rest := strings.Split(filepath.Clean("/"+p), "/")
	at := "/"
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			at = filepath.Dir(at)
			continue
		}
		next := filepath.Join(at, name)
		target, err := os.Readlink(filepath.Join(b.newroot, next))
		if err != nil {
			at = next // no link, or nothing there
			continue
		}
		if links++; links > maxLinks {
			return "", fmt.Errorf("resolve %s: too many links", p)
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return filepath.Join(b.newroot, at), nil
}

// mountpoint resolves a path of the box and makes it, with its parents, where it is missing.
func (b *boxRoot) mountpoint(p string, dir bool) (string, error) {
	full, err := b.resolve(p)
	if err != nil {
		return "", err
	}
	if st, err := os.Lstat(full); err == nil {
		if st.IsDir() != dir {
			kind := map[bool]string{true: "a directory", false: "a file"}
			return "", fmt.Errorf("%s in the box is not %s", p, kind[dir])
		}
		return full, nil
	}
	parent := full
	if !dir {
		parent = filepath.Dir(full)
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", b.explain(p, err)
	}
	if dir {
		return full, nil
	}
	f, err := os.OpenFile(full, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return "", b.explain(p, err)
	}
	return full, f.Close()
}

func (b *boxRoot) explain(p string, err error) error {
	if b.ro && errors.Is(err, unix.EROFS) {
		return fmt.Errorf("%s is missing and lies in a read-only place: %w", p, err)
	}
	return fmt.Errorf("make %s: %w", p, err)
}

// enter makes the new root the root of the agent and of all that it starts.
func (b *boxRoot) enter() error {
	if err := unix.Chdir(b.newroot); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err == nil {
		// The old root lies on top of the new one now.
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("let go of the scaffold: %w", err)
		}
		return unix.Chdir("/")
	}
	// Not every kernel can pivot, and no Linux can from its first root, which a virtual machine starts with. A chroot can be
	// left by root of the box, and that gains nothing: outside is the scaffold of the same sandbox, with the very layers that
	// this root is made of. What keeps a box in is the sandbox.
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the box's root: %w", err)
	}
	return unix.Chdir("/")
}
