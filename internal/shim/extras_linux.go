package shim

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/wire"
)

// extras gives the box what gVisor does not see in the image and a box can have all the same. It is made once: from then on it is the
// box's.
func (s *shim) extras(ctx context.Context, agent *wire.Client, images *image.Store, lower []string) error {
	if !s.box.StartedAt.IsZero() || s.args.Mode == Files {
		return nil
	}
	without, err := sendExtras(images.Extras(image.Image{RootfsID: s.box.Spec.RootfsID}), func(e wire.Extras) error {
		e.Lower = lower
		info, err := agent.Extras(ctx, e)
		for _, w := range info.Warnings {
			s.log.Warn("the box does without", "what", w)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("set up the box's image: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(without)) {
		s.log.Warn("gVisor has no such attribute", "name", name, "files", without[name])
	}
	return nil
}

const (
	// maxExtras is about how large one message is; it must stay below [wire.MaxHeader].
	maxExtras = 1 << 20
	// maxPath is the longest path that a system call takes.
	maxPath = 4095
	// maxAbsent bounds how many attributes that a box does without have a line of their own in its log.
	maxAbsent = 20
	others    = "others"
)

// sendExtras cuts extras into messages of bounded size. It returns of how many files attributes cannot be had, by name.
func sendExtras(extras iter.Seq2[image.Extra, error], send func(wire.Extras) error) (without map[string]int, err error) {
	without = map[string]int{}
	var e wire.Extras
	size := 0
	flush := func(next int) error {
		if size += next; size <= maxExtras || size == next {
			return nil
		}
		err := send(e)
		e, size = wire.Extras{}, next
		return err
	}
	for x, err := range extras {
		if err != nil {
			return nil, err
		}
		if len(x.Path) > maxPath {
			continue // nothing in the box can name it either, but from close by
		}
		// The agent fills /dev itself.
		if d := x.Device; d != nil && !bytes.HasPrefix(x.Path, []byte("/dev/")) {
			if err := flush(jsonSize(len(x.Path))); err != nil {
				return nil, err
			}
			e.Devices = append(e.Devices, wire.SetupDevice{Path: x.Path, Mode: d.Mode, UID: d.UID, GID: d.GID, Sec: d.Sec, Nsec: d.Nsec, Major: d.Major, Minor: d.Minor})
		}
		for _, a := range x.Xattrs {
			if !strings.HasPrefix(a.Name, "user.") {
				name := a.Name
				if _, ok := without[name]; !ok && len(without) >= maxAbsent {
					name = others
				}
				without[name]++
				continue
			}
			// A byte of a name may take six.
			if err := flush(jsonSize(len(x.Path)) + 6*len(a.Name) + jsonSize(len(a.Value))); err != nil {
				return nil, err
			}
			e.Xattrs = append(e.Xattrs, wire.SetupXattr{Path: x.Path, Name: a.Name, Value: a.Value})
		}
	}
	if size == 0 {
		return without, nil
	}
	return without, send(e)
}

// jsonSize bounds what n bytes take, with what stands around them.
func jsonSize(n int) int { return 128 + (n+2)/3*4 }
