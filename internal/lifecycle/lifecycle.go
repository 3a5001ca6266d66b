// Package lifecycle carries out what records say about a box whose processes may be gone: it reconciles a record with what
// lives, ends a generation, and removes a box. The library and the shim both use it, so that whoever looks next can do what a
// killed process no longer could. It starts nothing.
package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/cgroup"
	"github.com/coffer-box/coffer/internal/disk"
	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/state"
	"github.com/coffer-box/coffer/internal/supervise"
)

// Reasons for the end of a generation.
const (
	ReasonExited  = "exited"
	ReasonStopped = "stopped"
	ReasonKilled  = "killed"
	ReasonOOM     = "oom"
	ReasonTimeout = "timeout"
	ReasonFailed  = "failed" // it never ran
	ReasonLost    = "lost"   // its supervisor was killed; the exit code is not known
)

// CodeLost is the exit code recorded for a generation whose supervisor was killed.
const CodeLost = 137

// Handles is how a generation is found again. Each part is written before the next thing is started.
type Handles struct {
	BootID string            `json:"boot_id"`
	Cgroup *cgroup.Record    `json:"cgroup,omitempty"`
	Shim   *supervise.Handle `json:"shim,omitempty"`
	Init   *supervise.Handle `json:"init,omitempty"`
}

// Keeper works on the boxes of one home. It is safe for concurrent use.
type Keeper struct {
	DB   *state.DB
	Home home.Layout
	Log  *slog.Logger
}

// Target is everything known about a box's present generation.
func (k *Keeper) Target(b *state.Box) supervise.Target {
	files := k.Home.Box(b.ID)
	t := supervise.Target{Name: k.Home.GenerationName(b.ID, b.Generation), ShimLock: files.ShimLock(), InitLock: files.InitLock()}
	var h Handles
	// A damaged or missing record is no reason to look less: the derived name and the locks remain.
	if json.Unmarshal(b.Handles, &h) == nil {
		t.BootID, t.Cgroup, t.Shim, t.Init = h.BootID, h.Cgroup, h.Shim, h.Init
	}
	return t
}

// Alive tells whether the box's shim lives.
func (k *Keeper) Alive(b *state.Box) (bool, error) {
	return supervise.Held(k.Home.Box(b.ID).ShimLock())
}

// Reap ends the present generation, if anything of it lives, and returns when nothing is left of it. It changes no record.
func (k *Keeper) Reap(ctx context.Context, b *state.Box) (supervise.Report, error) {
	r, err := supervise.Reap(ctx, k.Target(b), k.Log)
	if err != nil {
		return r, err
	}
	return r, k.Home.Box(b.ID).RemoveSocket()
}

// Reconcile makes the record agree with what lives. The caller holds the box's operation lock. A box that is live by its record
// and has no supervisor is reaped and marked; recorded policy is carried out. It returns nil if the policy removed the box.
func (k *Keeper) Reconcile(ctx context.Context, b *state.Box) (*state.Box, error) {
	alive, err := k.Alive(b)
	if err != nil {
		return nil, err
	}
	switch {
	case b.Phase == state.Removing || b.Phase == state.Creating:
		// Whoever did that holds the operation lock as long as it lives; we have it now.
		return nil, k.Remove(ctx, b, b.RemoveVolumes || b.Phase == state.Creating)
	case alive:
		return b, nil
	case Removable(b):
		return nil, k.Remove(ctx, b, true)
	case b.Visit:
		return k.EndVisit(ctx, b)
	case !b.Phase.Live():
		return b, nil
	}
	if _, err := k.Reap(ctx, b); err != nil {
		return nil, fmt.Errorf("box %s: its supervisor is gone: %w", b.Name, err)
	}
	b, err = k.MarkEnded(ctx, b, End{Code: CodeLost, Reason: ReasonLost})
	if err != nil {
		return nil, err
	}
	if Removable(b) {
		return nil, k.Remove(ctx, b, true)
	}
	return b, nil
}

// Removable tells whether the box's policy is to be removed, now that it has ended. The shim does so; if it could not, whoever looks
// next.
func Removable(b *state.Box) bool {
	return b.Spec.Remove && (b.Phase == state.Stopped || b.Phase == state.Failed)
}

// Settled tells whether a record says all there is to say of its box: nothing of it lives, and no policy is yet to be carried out.
func Settled(b *state.Box) bool {
	switch b.Phase {
	case state.Created, state.Stopped, state.Failed:
		return !b.Visit && !Removable(b) && !WantsRestart(b)
	}
	return false
}

// EndVisit ends a generation that was opened to get at the box's files. The box is as it was before.
func (k *Keeper) EndVisit(ctx context.Context, b *state.Box) (*state.Box, error) {
	if _, err := k.Reap(ctx, b); err != nil {
		return nil, fmt.Errorf("box %s: end the access to its files: %w", b.Name, err)
	}
	return k.DB.Update(ctx, b.ID, state.Change{Generation: b.Generation}, func(b *state.Box) error {
		b.Visit, b.Handles = false, nil
		return nil
	})
}

// WantsRestart tells whether the box's policy is to run it again, now that it has ended. The shim does so; if it was killed, whoever
// looks next.
func WantsRestart(b *state.Box) bool {
	if b.Phase != state.Stopped || b.ManualStop || b.Reason == ReasonStopped || b.Damaged {
		return false
	}
	switch b.Spec.Restart.Policy {
	case "always":
		return true
	case "on-failure":
		return b.ExitCode != 0 && (b.Spec.Restart.Max == 0 || b.RestartCount < b.Spec.Restart.Max)
	}
	return false
}

// End is how a generation ended.
type End struct {
	Code      int
	Reason    string
	OOMKilled bool
	Error     string // it failed to start
}

// MarkEnded records the end of the box's present generation, once nothing of it lives.
func (k *Keeper) MarkEnded(ctx context.Context, b *state.Box, e End) (*state.Box, error) {
	attrs := map[string]string{}
	return k.DB.Update(ctx, b.ID, state.Change{Generation: b.Generation, Event: "die", Attrs: attrs}, func(b *state.Box) error {
		if e.Error != "" && b.Phase == state.Stopping {
			// A start that somebody stopped has not failed.
			e = End{Code: CodeLost, Reason: ReasonStopped}
		}
		attrs["exitCode"], attrs["reason"] = strconv.Itoa(e.Code), e.Reason
		b.Phase = state.Stopped
		if e.Error != "" {
			b.Phase, b.Error = state.Failed, e.Error
		}
		b.ExitCode, b.Reason, b.OOMKilled, b.FinishedAt = e.Code, e.Reason, e.OOMKilled, time.Now().UTC().Round(0)
		return nil
	})
}

// Remove removes a box whose processes are gone or may be killed: it reaps, verifies, and only then lets go of the files, and of
// the record last of all. The caller holds the operation lock.
func (k *Keeper) Remove(ctx context.Context, b *state.Box, volumes bool) error {
	if b.Phase != state.Removing || volumes && !b.RemoveVolumes {
		var err error
		if b, err = k.DB.Update(ctx, b.ID, state.Change{}, func(b *state.Box) error {
			b.Phase, b.RemoveVolumes = state.Removing, b.RemoveVolumes || volumes
			return nil
		}); err != nil {
			return err
		}
	}
	if _, err := k.Reap(ctx, b); err != nil {
		return fmt.Errorf("remove box %s: %w; its record and files are kept", b.Name, err)
	}
	return k.Discard(ctx, b, b.RemoveVolumes)
}

// Discard deletes the files and the record of a box of which nothing lives.
func (k *Keeper) Discard(ctx context.Context, b *state.Box, volumes bool) error {
	dirs := []string{k.Home.Box(b.ID).Dir}
	if volumes {
		dirs = append(dirs, k.Home.Volumes(b.ID))
	}
	for i, dir := range dirs {
		if err := k.discard(dir, fmt.Sprintf("%s-%d", b.ID, i)); err != nil {
			return err
		}
	}
	return k.DB.Delete(ctx, b.ID, b.Name)
}

// discard moves a directory away in one step, so that no half of it is ever found in its place, and then deletes it, with what former
// attempts left that were cut off. Each attempt has a place of its own: two may be at it, where one was taken for dead, and nothing must
// come into a directory that somebody else is deleting.
func (k *Keeper) discard(dir, name string) error {
	trash := k.Home.Trash()
	place, err := "", os.MkdirAll(trash, 0o700)
	if err == nil {
		place, err = os.MkdirTemp(trash, name+"-*")
	}
	if err == nil {
		err = unix.Rename(dir, place) // onto the empty directory, which os.Rename refuses
	}
	if disk.NoRoom(err) {
		// No room even for a name: then in its place, where a next attempt finds what is left of it.
		err = RemoveTree(dir)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove files in %s: %w", dir, err)
	}
	entries, err := os.ReadDir(trash)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // there was no room for it
	}
	errs := []error{err}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name) {
			errs = append(errs, RemoveTree(filepath.Join(trash, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove files: %w", err)
	}
	return nil
}

// RemoveTree is [os.RemoveAll] for what a guest has made: the directories of an ordinary user's volumes have the modes that the guest
// gave them, which may keep even their owner from emptying them.
func RemoveTree(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// Nothing of the box lives, so nobody turns a directory into a link meanwhile.
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return err
	})
	return os.RemoveAll(dir)
}
