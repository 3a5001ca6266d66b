package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kill sends SIGKILL to every process of the group, frozen ones too. It does not wait for their end.
func (g *Group) Kill(ctx context.Context, leaves ...Leaf) error {
	if g.rec.Unified != "" {
		dirs := []string{g.rec.Unified}
		if len(leaves) > 0 {
			dirs = nil
			for _, l := range leaves {
				dirs = append(dirs, g.leaf(l))
			}
		}
		for _, d := range dirs {
			err := writeFile(d, "cgroup.kill", "1")
			switch {
			case err == nil || errors.Is(err, fs.ErrNotExist) && !exists(d):
			case errors.Is(err, fs.ErrNotExist):
				// Linux before 5.14: the freezer keeps members from forking away from the signals.
				if err := freezeKillThaw(ctx, d, "cgroup.freeze", "1", "0"); err != nil {
					return err
				}
			default:
				return fmt.Errorf("kill %s: %w", d, err)
			}
		}
	} else if d := g.rec.V1["freezer"]; d != "" {
		half := leaves
		if len(half) == 0 {
			half = []Leaf{Tree, Shim}
		}
		for _, l := range half {
			dir := filepath.Join(d, string(l))
			if !exists(dir) {
				continue
			}
			if err := freezeKillThaw(ctx, dir, "freezer.state", "FROZEN", "THAWED"); err != nil {
				return err
			}
		}
	}
	if len(leaves) > 0 && !slices.Contains(leaves, Tree) {
		return nil
	}
	// Only the tree stands in these, and after the above nobody should: unless there was no hierarchy to kill by.
	for c, d := range g.rec.V1 {
		if c == "freezer" {
			continue
		}
		if err := killMembers(d); err != nil {
			return err
		}
	}
	return nil
}

// freezeBound is how long a tree may take to freeze. One with a member in uninterruptible sleep never does, and is killed as it is.
const freezeBound = time.Second

// freezeKillThaw stops a group, signals each member and lets it go: a frozen task of version 1 does not die before it thaws.
func freezeKillThaw(ctx context.Context, dir, file, frozen, thawed string) error {
	pids, err := below(dir)
	if err != nil || len(pids) == 0 {
		return err
	}
	err = writeFile(dir, file, frozen)
	poll(ctx, freezeBound, func() bool {
		if file == "cgroup.freeze" {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
			return err != nil || field(string(b), "frozen") != 0
		}
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || strings.TrimSpace(string(b)) == frozen {
			return true
		}
		// Some kernels freeze a process that was forked meanwhile only when asked again.
		_ = writeFile(dir, file, frozen)
		return false
	})
	// The thaw must come whatever the kill met, or nothing in there ever dies.
	return errors.Join(err, killMembers(dir), writeFile(dir, file, thawed))
}

// below lists the members of a directory and of all below it.
func below(dir string) ([]int, error) {
	var out []int
	for _, d := range append(subdirs(dir), dir) {
		p, err := members(d)
		if err != nil {
			return nil, err
		}
		out = append(out, p...)
	}
	return out, nil
}

// subdirs lists the directories below dir, children before parents.
func subdirs(dir string) []string {
	var out []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			d := filepath.Join(dir, e.Name())
			out = append(append(out, subdirs(d)...), d)
		}
	}
	return out
}

// Populated tells whether a process runs in the group. Zombies do not count.
func (g *Group) Populated() (bool, error) {
	if g.rec.Unified != "" {
		return populated(g.rec.Unified)
	}
	m, err := g.Members()
	return len(m) > 0, err
}

func populated(dir string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read cgroup: %w", err)
	}
	return strings.Contains(string(b), "populated 1"), nil
}

// WaitEmpty returns when no process runs in the group (or in the one leaf given).
func (g *Group) WaitEmpty(ctx context.Context, leaf ...Leaf) error {
	if g.rec.Unified == "" {
		dirs := g.dirs()
		if len(leaf) > 0 {
			dirs = []string{filepath.Join(g.rec.V1["freezer"], string(leaf[0]))}
			for c, d := range g.rec.V1 {
				if c != "freezer" && leaf[0] == Tree { // the shim stands in the freezer only
					dirs = append(dirs, d)
				}
			}
		}
		empty := func() bool {
			for _, d := range dirs {
				if m, err := members(d); err != nil || len(m) > 0 {
					return false
				}
			}
			return true
		}
		if !poll(ctx, 0, empty) {
			return ctx.Err()
		}
		return nil
	}
	dir := g.rec.Unified
	if len(leaf) > 0 {
		dir = g.leaf(leaf[0])
	}
	f, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if n == 0 && errors.Is(err, unix.ENODEV) || strings.Contains(string(buf[:n]), "populated 0") {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// The event is edge-triggered from the last read on; the bound is for contexts that end meanwhile.
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch cgroup: %w", err)
		}
	}
}
