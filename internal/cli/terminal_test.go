package cli

import (
	"bytes"
	"strings"
	"testing"
)

type truncated bool

func (c truncated) Truncated() bool { return bool(c) }

// TestTellTruncated: output that was cut is told about, and no other.
func TestTellTruncated(t *testing.T) {
	for _, cut := range []bool{true, false} {
		var errs bytes.Buffer
		a := &app{err: &errs}
		a.tellTruncated(truncated(cut))
		if got := strings.Contains(errs.String(), "still has its output open"); got != cut {
			t.Errorf("cut %v: %q", cut, errs.String())
		}
	}
}
