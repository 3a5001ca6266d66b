package cli

import (
	"fmt"
	"io"
	"sync/atomic"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/coffer-box/coffer"
)

// bars shows a bar for each layer of a pull.
type bars struct {
	p      *mpb.Progress
	layers map[string]*layerBar
}

type layerBar struct {
	bar    *mpb.Bar
	status atomic.Value // string
}

func newBars(w io.Writer) *bars {
	return &bars{p: mpb.New(mpb.WithOutput(w), mpb.WithWidth(32)), layers: map[string]*layerBar{}}
}

func (b *bars) step(p coffer.PullProgress) {
	if p.Layer == "" {
		b.close()
		return
	}
	l := b.layers[p.Layer]
	if l == nil {
		l = &layerBar{}
		l.status.Store(p.Status)
		l.bar = b.p.AddBar(0,
			mpb.PrependDecorators(decor.Name(shortID(p.Layer)+" "), decor.Any(func(decor.Statistics) string {
				return fmt.Sprintf("%-12s", l.status.Load())
			})),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")))
		l.bar.SetTotal(max(p.Total, 1), false)
		b.layers[p.Layer] = l
	}
	switch p.Status {
	case "unpacking":
		if l.status.Load() == "downloading" && l.bar.Current() < p.Total {
			return // that is what it waits for
		}
		l.bar.SetCurrent(p.Current)
	case "exists":
		p.Status = "there"
	case "done":
		l.bar.SetCurrent(max(p.Total, 1))
		l.bar.SetTotal(-1, true)
	default:
		l.bar.SetCurrent(p.Current)
	}
	l.status.Store(p.Status)
}

func (b *bars) close() {
	for _, l := range b.layers {
		l.bar.Abort(false) // one that is full stays
	}
	b.p.Wait()
}
