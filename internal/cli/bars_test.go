package cli

import (
	"strings"
	"testing"

	"github.com/coffer-box/coffer"
)

// screen is what a terminal of some lines shows of what is written.
func screen(rows int, s string) []string {
	lines, at := []string{""}, 0
	for len(s) > 0 {
		switch {
		case strings.HasPrefix(s, "\x1b[K"):
			s = s[3:]
		case strings.HasPrefix(s, "\x1b["):
			n := 0
			for s = s[2:]; s[0] != 'A'; s = s[1:] {
				n = n*10 + int(s[0]-'0')
			}
			s = s[1:]
			at = max(at-n, len(lines)-rows, 0)
		case s[0] == '\r':
			lines[at], s = "", s[1:]
		case s[0] == '\n':
			if at++; at == len(lines) {
				lines = append(lines, "")
			}
			s = s[1:]
		default:
			lines[at], s = lines[at]+s[:1], s[1:]
		}
	}
	return lines
}

func TestBars(t *testing.T) {
	var w strings.Builder
	b := newBars(&w, 5, 70)
	ids := []string{"sha256:aaaaaaaaaaaaaaaa", "sha256:bbbbbbbbbbbbbbbb", "sha256:cccccccccccccccc"}
	for _, id := range ids {
		b.step(coffer.PullProgress{Layer: id, Status: "waiting", Total: 1000})
	}
	b.step(coffer.PullProgress{Layer: ids[0], Status: "downloading", Current: 500, Total: 1000})
	b.step(coffer.PullProgress{Layer: ids[0], Status: "unpacking", Current: 100, Total: 1000})
	b.draw()
	if got := screen(5, w.String()); len(got) != 4 || !strings.Contains(got[0], "downloading [============            ] 500B / 1kB") {
		t.Errorf("in its middle: %q", got)
	}
	for _, id := range ids {
		b.step(coffer.PullProgress{Layer: id, Status: "done", Current: 1000, Total: 1000})
	}
	b.step(coffer.PullProgress{Status: "pulled"})
	got := screen(5, w.String())
	if len(got) != 4 || got[3] != "" {
		t.Errorf("at its end: %q", got)
	}
	for i, line := range got[:3] {
		if !strings.HasPrefix(line, strings.Repeat(string(rune('a'+i)), 12)+" done") || len(line) > 69 {
			t.Errorf("line %d: %q", i, line)
		}
	}
}

// More layers than lines scroll nothing away that is not theirs.
func TestBarsOfASmallTerminal(t *testing.T) {
	var w strings.Builder
	b := newBars(&w, 3, 80)
	for i := range 6 {
		b.step(coffer.PullProgress{Layer: "sha256:" + strings.Repeat(string(rune('a'+i)), 16), Status: "waiting", Total: 10})
		b.draw()
	}
	if got := screen(3, w.String()); len(got) != 3 || !strings.HasPrefix(got[0], "eeee") || !strings.HasPrefix(got[1], "ffff") {
		t.Errorf("%q", got)
	}
}
