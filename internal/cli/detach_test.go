package cli

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/coffer-box/coffer"
)

func TestParseKeys(t *testing.T) {
	for in, want := range map[string]string{"": "", detachKeys: "\x10\x11", "a": "a", "ctrl-a,b,ctrl-Z": "\x01b\x1a", "ctrl-[,ctrl-@": "\x1b\x00"} {
		if got, err := parseKeys(in); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"ab", "ctrl-", "ctrl-1", ",", "a,", "ctrl-pq"} {
		if got, err := parseKeys(in); err == nil {
			t.Errorf("%q is taken as %q", in, got)
		}
	}
}

func TestKeyReader(t *testing.T) {
	for name, c := range map[string]struct {
		keys, in, out string
		detached      bool
	}{
		"no keys typed":        {"xy", "abc", "abc", false},
		"only the keys":        {"xy", "xy", "", true},
		"after other input":    {"xy", "abxycd", "ab", true},
		"a part, then other":   {"xy", "xaxb", "xaxb", false},
		"a part, then the end": {"xy", "abx", "abx", false},
		"begun twice":          {"xy", "xxy", "x", true},
		"overlapping":          {"xxy", "xxxy", "x", true},
		"overlapping far":      {"xyxz", "xyxyxz", "xy", true},
		"one key":              {"x", "abx", "ab", true},
		"nothing":              {"xy", "", "", false},
	} {
		for how, split := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader,
			"with the end": iotest.DataErrReader,
		} {
			called := false
			k := &keyReader{r: split(strings.NewReader(c.in)), keys: []byte(c.keys), detach: func() { called = true }}
			got, err := io.ReadAll(k)
			if string(got) != c.out || called != c.detached || errors.Is(err, coffer.ErrDetached) != c.detached || !c.detached && err != nil {
				t.Errorf("%s, %s: %q, detached %v, %v", name, how, got, called, err)
			}
		}
	}
}
