//go:build linux

package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/wire"
)

// TestSendExtras: however many there are, each comes once, in messages that the agent takes.
func TestSendExtras(t *testing.T) {
	const files = 3000
	all := func(yield func(image.Extra, error) bool) {
		for i := range files {
			x := image.Extra{Path: fmt.Appendf(nil, "/a/\xff%d", i), Xattrs: []image.Xattr{
				{Name: "security.capability", Value: []byte("x")},
				{Name: "user." + strings.Repeat("\x01", i%250), Value: bytes.Repeat([]byte{byte(i)}, i%4000)},
			}}
			switch i % 100 {
			case 7:
				x.Device = &image.Device{Mode: 0o20600, Major: 1, Minor: uint32(i)}
			case 8:
				x.Path, x.Xattrs, x.Device = fmt.Appendf(nil, "/dev/%d", i), nil, &image.Device{}
			case 9:
				x.Xattrs[1].Value = bytes.Repeat([]byte{1}, 64<<10)
			case 10:
				x.Path = bytes.Repeat([]byte("/long"), 1000)
			}
			if !yield(x, nil) {
				return
			}
		}
	}
	messages, xattrs, devices, bytes := 0, 0, 0, 0
	without, err := sendExtras(all, func(e wire.Extras) error {
		b, err := json.Marshal(e)
		if err != nil || len(b) > maxExtras+1000 {
			t.Errorf("a message of %d bytes, %v", len(b), err)
		}
		messages++
		bytes += len(b)
		xattrs += len(e.Xattrs)
		devices += len(e.Devices)
		return nil
	})
	if err != nil || xattrs != files-60 || devices != 30 || without["security.capability"] != files-60 || len(without) != 1 {
		t.Errorf("%d attributes, %d devices, without %v, %v", xattrs, devices, without, err)
	}
	if messages < bytes/maxExtras || messages > 2*bytes/maxExtras+1 {
		t.Errorf("%d messages for %d bytes", messages, bytes)
	}
	if _, err := sendExtras(func(func(image.Extra, error) bool) {}, func(wire.Extras) error { t.Error("an empty message"); return nil }); err != nil {
		t.Error(err)
	}
	without, err = sendExtras(func(yield func(image.Extra, error) bool) {
		for i := range files {
			yield(image.Extra{Path: []byte("/x"), Xattrs: []image.Xattr{{Name: fmt.Sprint("trusted.", i)}}}, nil)
		}
	}, nil)
	if err != nil || len(without) != maxAbsent+1 || without[others] != files-maxAbsent {
		t.Errorf("without %v, %v", without, err)
	}
	failed := errors.New("failed")
	if _, err := sendExtras(all, func(wire.Extras) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("a message that is not taken: %v", err)
	}
	if _, err := sendExtras(func(yield func(image.Extra, error) bool) { yield(image.Extra{}, failed) }, nil); !errors.Is(err, failed) {
		t.Errorf("extras that cannot be read: %v", err)
	}
}
