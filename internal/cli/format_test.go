package cli

import (
	"bytes"
	"errors"
	"testing"
)

// TestVisible: nothing that a box chooses reaches the terminal as more than text.
func TestVisible(t *testing.T) {
	for in, want := range map[string]string{
		"plain ä 世 \"'\\": "plain ä 世 \"'\\", "\x1b[2J": `\x1b[2J`, "a\nb\tc\r": `a\nb\tc\r`, "\u202egpj": `\u202egpj`,
		"\x9b1m": `\x9b1m`, "\u009b": `\u009b`, "\ufffd": "\ufffd", "\x00\x7f": `\x00\x7f`,
	} {
		if got := visible(in); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
	var out bytes.Buffer
	err := show(&out, format{how: "table"}, []string{"\x1b]0;x\a", "two\nlines"}, []column[string]{{"NAME", func(s string) string { return s }}})
	if want := "NAME\n\\x1b]0;x\\a\ntwo\\nlines\n"; err != nil || out.String() != want {
		t.Errorf("%q, %v", out.String(), err)
	}
	var errs bytes.Buffer
	(&app{err: &errs}).complain(errors.New("start \x1b[2J: not found\nand more"))
	if want := "coffer: start \\x1b[2J: not found\ncoffer: and more\n"; errs.String() != want {
		t.Errorf("%q", errs.String())
	}
}
