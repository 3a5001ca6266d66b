package cli

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/pflag"

	"github.com/coffer-box/coffer"
)

// detachKeys is the default, Docker's.
const detachKeys = "ctrl-p,ctrl-q"

func addDetachKeys(f *pflag.FlagSet, keys *string) {
	f.StringVar(keys, "detach-keys", detachKeys, `keys that leave the box running: letters or ctrl-LETTER, with commas between; "" for none`)
}

// parseKeys reads the value of --detach-keys as the bytes that a terminal sends.
func parseKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var keys []byte
	for k := range strings.SplitSeq(s, ",") {
		c, ctrl := strings.CutPrefix(k, "ctrl-")
		switch {
		case len(c) != 1:
			return nil, fmt.Errorf("--detach-keys %q: %q is no key: use letters or ctrl-LETTER, with commas between", s, k)
		case !ctrl:
			keys = append(keys, c[0])
		case 'a' <= c[0] && c[0] <= 'z':
			keys = append(keys, c[0]-'a'+1)
		case 'A' <= c[0] && c[0] <= '_' || c[0] == '@':
			keys = append(keys, c[0]-'@')
		default:
			return nil, fmt.Errorf("--detach-keys %q: there is no %q", s, k)
		}
	}
	return keys, nil
}

// keyReader passes a terminal's input on, but for the keys: at those it calls detach, and ends with [coffer.ErrDetached]. A part of
// them is held back until it is known that no more of them come.
type keyReader struct {
	r      io.Reader
	keys   []byte
	detach func()
	held   int    // so many of keys were typed
	gone   bool   // all of them were
	out    []byte // to be passed on
}

func (k *keyReader) Read(p []byte) (int, error) {
	for len(k.out) == 0 {
		if k.gone {
			k.detach()
			return 0, coffer.ErrDetached
		}
		buf := make([]byte, max(1, len(p)))
		n, err := k.r.Read(buf)
		for _, c := range buf[:n] {
			if k.gone = k.take(c); k.gone {
				break
			}
		}
		if err != nil && !k.gone {
			// What was held back turned out to be no part of the keys.
			k.out = append(k.out, k.keys[:k.held]...)
			k.held = 0
		}
		if err != nil && len(k.out) == 0 && !k.gone {
			return 0, err
		}
	}
	n := copy(p, k.out)
	k.out = k.out[n:]
	return n, nil
}

// take takes a byte in and tells whether it completes the keys.
func (k *keyReader) take(c byte) bool {
	typed := append(append([]byte(nil), k.keys[:k.held]...), c)
	// The longest end of what was typed that may become the keys stays back.
	for keep := min(len(typed), len(k.keys)); ; keep-- {
		if bytes.Equal(typed[len(typed)-keep:], k.keys[:keep]) {
			k.out = append(k.out, typed[:len(typed)-keep]...)
			k.held = keep
			return keep == len(k.keys)
		}
	}
}

// detachable lets the keys, typed at a terminal, end the connection with [coffer.ErrDetached].
func (t *terminal) detachable(keys []byte, giveUp context.CancelCauseFunc) {
	if t.raw != nil && len(keys) > 0 {
		t.input = &keyReader{r: t.a.in, keys: keys, detach: func() { giveUp(coffer.ErrDetached) }}
	}
}

// detached gives the terminal back after the keys were typed; the box runs on.
func (t *terminal) detached() {
	t.close()
	fmt.Fprintln(t.a.out)
}
