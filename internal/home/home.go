// Package home names every file that Coffer keeps, so that no two packages compute the same path differently. It creates the
// directories of a box and reads none.
package home

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// Dir is the state directory to use: the given one, else COFFER_HOME, else the user's own place.
func Dir(given string, getenv func(string) string) (string, error) {
	dir := given
	if dir == "" {
		dir = getenv("COFFER_HOME")
	}
	if dir == "" {
		if os.Geteuid() == 0 {
			return "/var/lib/coffer", nil
		}
		data := getenv("XDG_DATA_HOME")
		if data == "" {
			h := getenv("HOME")
			if h == "" {
				return "", fmt.Errorf("no place for state: set COFFER_HOME, XDG_DATA_HOME or HOME")
			}
			data = filepath.Join(h, ".local", "share")
		}
		dir = filepath.Join(data, "coffer")
	}
	return filepath.Abs(dir)
}

// Layout is one home.
type Layout struct {
	Root     string // the state directory
	Instance string // its identity
}

// Images is the image store.
func (l Layout) Images() string { return filepath.Join(l.Root, "images") }

// Assets holds the programs unpacked from coffer.
func (l Layout) Assets() string { return filepath.Join(l.Root, "assets") }

// Boxes holds a directory for each box.
func (l Layout) Boxes() string { return filepath.Join(l.Root, "boxes") }

// Trash holds what is being removed.
func (l Layout) Trash() string { return filepath.Join(l.Root, "trash") }

// Volumes holds anonymous volumes, a directory for each, below one for each box.
func (l Layout) Volumes(box string) string { return filepath.Join(l.Root, "volumes", box) }

// shared is a directory in which every user may make others.
const shared = "/tmp"

// Run is the directory of sockets. It is short, since a socket's path has room for 107 bytes, and gone after a reboot.
func (l Layout) Run() string {
	name := "coffer-" + l.Instance
	if os.Geteuid() == 0 {
		if st, err := os.Stat("/run"); err == nil && st.IsDir() {
			return filepath.Join("/run", name)
		}
	}
	return filepath.Join(shared, "coffer-"+strconv.Itoa(os.Geteuid())+"-"+l.Instance)
}

// MakeRun makes the directory of sockets and checks that it is this user's alone: in /tmp somebody else may have been faster.
func (l Layout) MakeRun() error {
	dir := l.Run()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("directory of sockets: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("directory of sockets: %w", err)
	}
	if !st.IsDir() || !ownedByMe(st) || st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("directory of sockets %s is not yours alone: remove it, or make it mode 0700 and your own", dir)
	}
	return nil
}

// Box is one box's directory.
type Box struct {
	Dir  string
	id   string
	root Layout
}

// Box names the files of a box.
func (l Layout) Box(id string) Box { return Box{Dir: filepath.Join(l.Boxes(), id), id: id, root: l} }

// OpLock serialises what commands do to a box.
func (b Box) OpLock() string { return filepath.Join(b.Dir, "op.lock") }

// ShimLock is held by the box's shim as long as it lives.
func (b Box) ShimLock() string { return filepath.Join(b.Dir, "shim.lock") }

// InitLock is kept open by the jail's first process as long as that lives.
func (b Box) InitLock() string { return filepath.Join(b.Dir, "init.lock") }

// ShimLog takes what the shim, the jail and the kernel have to say.
func (b Box) ShimLog() string { return filepath.Join(b.Dir, "shim.log") }

// Log is the main process' output.
func (b Box) Log() string { return filepath.Join(b.Dir, "output.log") }

// State is the writable layer.
func (b Box) State() string { return filepath.Join(b.Dir, "state") }

// Socket is where the shim listens.
func (b Box) Socket() string { return filepath.Join(b.root.Run(), b.id[:16]+".sock") }

// RemoveSocket removes the box's socket, if it is there, and the directory with the last one in it. Whoever makes a socket at that
// moment makes the directory again. Where everybody may make directories it stays: its name is known by then, and another user who took
// it would keep all boxes from starting.
func (b Box) RemoveSocket() error {
	if err := os.Remove(b.Socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove socket: %w", err)
	}
	if dir := b.root.Run(); filepath.Dir(dir) != shared {
		_ = os.Remove(dir)
	}
	return nil
}

// GenerationName is the name of everything outside the home that belongs to one generation.
func (l Layout) GenerationName(id string, gen uint64) string {
	return l.GenerationPrefix() + id + "-" + strconv.FormatUint(gen, 10)
}

// GenerationPrefix begins the names of all generations of this home.
func (l Layout) GenerationPrefix() string { return "coffer-" + l.Instance + "-" }
