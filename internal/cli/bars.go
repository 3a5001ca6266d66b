package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/coffer-box/coffer"
)

// bars shows a line with a bar for each layer of a pull, at a terminal. It is our own because every library for it costs each start of
// the program, mostly for commands that show none, more than this is.
type bars struct {
	w      io.Writer
	rows   int // of the terminal
	cols   int
	layers []*layerBar
	byID   map[string]*layerBar
	drawn  int // lines
	last   time.Time
}

type layerBar struct {
	id, status string
	now, total int64
}

const (
	barWidth  = 24
	barsEvery = 80 * time.Millisecond
)

func newBars(w io.Writer, rows, cols int) *bars {
	return &bars{w: w, rows: rows, cols: cols, byID: map[string]*layerBar{}}
}

func (b *bars) step(p coffer.PullProgress) {
	if p.Layer == "" {
		b.draw()
		return
	}
	l := b.byID[p.Layer]
	if l == nil {
		l = &layerBar{id: shortID(p.Layer), total: p.Total}
		b.byID[p.Layer] = l
		b.layers = append(b.layers, l)
	}
	switch {
	case p.Status == "unpacking" && l.status == "downloading" && l.now < l.total:
		return // that is what it waits for
	case p.Status == "done", p.Status == "exists":
		l.now = l.total
	default:
		l.now = p.Current
	}
	l.status = p.Status
	if time.Since(b.last) >= barsEvery {
		b.draw()
	}
}

// draw writes all lines over those of the last time. What does not fit the terminal is left out, the first lines first: the lines above
// the screen cannot be reached.
func (b *bars) draw() {
	b.last = time.Now()
	show := b.layers[max(0, len(b.layers)-max(1, b.rows-1)):]
	var s strings.Builder
	if b.drawn > 0 {
		fmt.Fprintf(&s, "\x1b[%dA", b.drawn)
	}
	for _, l := range show {
		line := fmt.Sprintf("%s %-11s [%s] %s / %s", l.id, l.status, l.bar(), size(l.now), size(l.total))
		fmt.Fprintf(&s, "\r%s\x1b[K\n", line[:min(len(line), max(1, b.cols-1))])
	}
	b.drawn = len(show)
	_, _ = io.WriteString(b.w, s.String()) // the pull goes on without a reader
}

func (l *layerBar) bar() string {
	full := barWidth
	if l.total > 0 {
		full = int(min(barWidth, l.now*barWidth/l.total))
	}
	return strings.Repeat("=", full) + strings.Repeat(" ", barWidth-full)
}
