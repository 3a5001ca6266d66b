package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/coffer-box/coffer"
)

func (a *app) psCmd() *cobra.Command {
	var all, quiet, sizes bool
	var filters []string
	var f format
	c := &cobra.Command{Use: "ps [flags]", Short: "List boxes", Args: noArgs()}
	c.Flags().BoolVarP(&all, "all", "a", false, "show boxes that do not run, too")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "show ids only")
	c.Flags().BoolVarP(&sizes, "size", "s", false, "show what each box's own files take on disk")
	c.Flags().StringArrayVarP(&filters, "filter", "f", nil, "show only boxes with name=, id=, label=key[=value], status=, health=, image= or engine=")
	f.add(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		keep, byStatus, err := boxFilter(filters)
		if err != nil {
			return err
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			infos, failed := rt.List(c.Context())
			if failed != nil && infos == nil {
				return failed
			}
			infos = slices.DeleteFunc(infos, func(i coffer.Info) bool {
				return !keep(i) || !all && !byStatus && !shownUnasked(i.Status)
			})
			slices.Reverse(infos)
			if quiet {
				for _, i := range infos {
					fmt.Fprintln(a.out, i.ID[:12])
				}
				return failed
			}
			rows := make([]psRow, len(infos))
			for n, i := range infos {
				rows[n].Info, rows[n].Health = i, health(i)
				if !sizes {
					continue
				}
				if b, err := rt.Get(c.Context(), i.ID); err == nil {
					rows[n].Size = b.DiskUse()
				}
			}
			cols := []column[psRow]{
				{"BOX ID", func(r psRow) string { return r.ID[:12] }},
				{"IMAGE", func(r psRow) string { return r.Image }},
				{"COMMAND", func(r psRow) string { return strconv.Quote(cut(strings.Join(r.Command, " "), 24)) }},
				{"CREATED", psRow.RunningFor},
				{"STATUS", func(r psRow) string { return status(r.Info) }},
				{"NAME", psRow.Names},
			}
			if sizes {
				cols = append(cols, column[psRow]{"SIZE", func(r psRow) string { return size(r.Size) }})
			}
			return errors.Join(failed, show(a.out, f, rows, cols))
		})
	}
	return c
}

// shownUnasked tells the statuses of boxes that ps shows without -a.
func shownUnasked(status string) bool {
	switch status {
	case "running", "paused", "starting", "stopping", "restarting":
		return true
	}
	return false
}

// psRow is a box of a list. Its methods are for templates that were written for docker ps.
type psRow struct {
	coffer.Info
	Health string `json:"health"`         // in one word
	Size   int64  `json:"size,omitempty"` // bytes on disk, if asked for
}

func (r psRow) Names() string      { return r.Name }
func (r psRow) State() string      { return r.Info.Status }
func (r psRow) RunningFor() string { return ago(r.Created) }

func status(i coffer.Info) string {
	switch i.Status {
	case "running":
		up := "Up " + span(time.Since(i.Started))
		switch h := health(i); h {
		case "none":
			return up
		case "starting":
			return up + " (health: starting)"
		default:
			return up + " (" + h + ")"
		}
	case "stopped":
		s := fmt.Sprintf("Exited (%d) %s", i.ExitCode, ago(i.Finished))
		if i.Reason != "exited" && i.Reason != "stopped" {
			s += ", " + i.Reason
		}
		return s
	case "restarting":
		return fmt.Sprintf("Restarting (%d) %s", i.ExitCode, ago(i.Finished))
	case "failed":
		return "Failed: " + cut(i.Error, 40)
	}
	return strings.ToUpper(i.Status[:1]) + i.Status[1:]
}

// health is what the checks say of a box, or "none".
func health(i coffer.Info) string {
	if i.Health == nil {
		return "none"
	}
	return string(i.Health.Status)
}

// healths are what a box can be to its checks.
const healths = "starting, healthy, unhealthy, none"

// statuses are what a box can be, and Docker's word for one of them.
const statuses = "creating, created, starting, running, stopping, stopped, restarting, removing, failed, exited"

func boxFilter(filters []string) (keep func(coffer.Info) bool, byStatus bool, err error) {
	var tests []func(coffer.Info) bool
	for _, s := range filters {
		k, v, _ := strings.Cut(s, "=")
		var t func(coffer.Info) bool
		switch k {
		case "name":
			t = func(i coffer.Info) bool { return strings.Contains(i.Name, v) }
		case "id":
			t = func(i coffer.Info) bool { return strings.HasPrefix(i.ID, v) }
		case "status":
			byStatus = true
			if !slices.Contains(strings.Split(statuses, ", "), v) {
				return nil, false, fmt.Errorf("unknown status %q: use one of %s", v, statuses)
			}
			t = func(i coffer.Info) bool { return i.Status == v || v == "exited" && i.Status == "stopped" }
		case "health":
			if !slices.Contains(strings.Split(healths, ", "), v) {
				return nil, false, fmt.Errorf("unknown health %q: use one of %s", v, healths)
			}
			t = func(i coffer.Info) bool { return health(i) == v }
		case "image", "ancestor":
			t = func(i coffer.Info) bool { return i.Image == v || i.ImageID == v }
		case "engine":
			t = func(i coffer.Info) bool { return i.Engine == v }
		case "label":
			lk, lv, valued := strings.Cut(v, "=")
			t = func(i coffer.Info) bool { have, ok := i.Labels[lk]; return ok && (!valued || have == lv) }
		default:
			return nil, false, fmt.Errorf("unknown filter %q: use name, id, label, status, health, image or engine", k)
		}
		tests = append(tests, t)
	}
	return func(i coffer.Info) bool {
		return !slices.ContainsFunc(tests, func(t func(coffer.Info) bool) bool { return !t(i) })
	}, byStatus, nil
}

func (a *app) inspectCmd() *cobra.Command {
	var tmpl string
	c := a.boxes(&cobra.Command{Use: "inspect [flags] BOX [BOX...]", Short: "Show everything about boxes", Args: between(1, -1, "box")}, -1)
	c.Flags().StringVarP(&tmpl, "format", "f", "json", `"json", or a Go template such as '{{.OOMKilled}}'`)
	c.RunE = func(c *cobra.Command, args []string) error {
		infos := []coffer.Info{}
		failed := a.each(c.Context(), args, func(_ string, b *coffer.Box) error {
			i, err := b.Info(c.Context())
			if err == nil {
				infos = append(infos, i)
			}
			return err
		})
		if tmpl != "json" {
			return errors.Join(showTemplate(a.out, tmpl, infos), failed)
		}
		e := json.NewEncoder(a.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return errors.Join(e.Encode(infos), failed)
	}
	return c
}

func (a *app) logsCmd() *cobra.Command {
	var follow, stamps bool
	var tail, since string
	c := a.boxes(&cobra.Command{Use: "logs [flags] BOX", Short: "Show the output of a box's main process", Args: exactly(1, "box")}, 1)
	c.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes, until the box ends")
	c.Flags().StringVarP(&tail, "tail", "n", "all", "show only this many of the last lines")
	c.Flags().StringVar(&since, "since", "", "show only what is newer (2026-01-02T15:04:05Z, or 10m)")
	c.Flags().BoolVarP(&stamps, "timestamps", "t", false, "show when each line came")
	c.RunE = func(c *cobra.Command, args []string) error {
		o := coffer.LogOptions{Follow: follow, Tail: -1}
		if tail != "all" {
			n, err := strconv.Atoi(tail)
			if err != nil || n < 0 {
				return fmt.Errorf("--tail %q: use a number or all", tail)
			}
			o.Tail = n
		}
		var err error
		if o.Since, err = moment(since); err != nil {
			return err
		}
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			within := map[bool]bool{} // whether a stream is in the middle of a line
			return b.Logs(c.Context(), o, func(e coffer.LogEntry) error {
				w := a.out
				if e.Stderr {
					w = a.err
				}
				if !stamps {
					_, err := w.Write(e.Data)
					return err
				}
				for line := range bytes.Lines(e.Data) {
					if !within[e.Stderr] {
						line = append([]byte(e.Time.Format(stampFormat)+" "), line...)
					}
					within[e.Stderr] = !bytes.HasSuffix(line, []byte("\n"))
					if _, err := w.Write(line); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	return c
}

// stampFormat is RFC 3339 with a fixed width, as Docker has it.
const stampFormat = "2006-01-02T15:04:05.000000000Z07:00"

// moment reads a time, or a duration before now. Empty is the zero time.
func moment(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return time.Now().Add(-d), nil
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return time.Unix(n, 0), nil
	}
	for _, l := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02"} {
		if t, err := time.Parse(l, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("time %q: use 2006-01-02T15:04:05Z, or how long ago (10m)", s)
}

func (a *app) topCmd() *cobra.Command {
	var f format
	c := a.boxes(&cobra.Command{Use: "top [flags] BOX", Short: "List the processes in a box", Args: exactly(1, "box")}, 1)
	f.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			ps, err := b.Processes(c.Context())
			if err != nil {
				return err
			}
			return show(a.out, f, ps, []column[coffer.ProcessInfo]{
				{"PID", func(p coffer.ProcessInfo) string { return strconv.Itoa(p.PID) }},
				{"PPID", func(p coffer.ProcessInfo) string { return strconv.Itoa(p.PPID) }},
				{"USER", func(p coffer.ProcessInfo) string {
					if p.User != "" {
						return p.User
					}
					return strconv.Itoa(int(p.UID))
				}},
				{"CPU", func(p coffer.ProcessInfo) string { return p.CPU.Round(10 * time.Millisecond).String() }},
				{"RSS", func(p coffer.ProcessInfo) string { return units.BytesSize(float64(p.RSS)) }},
				{"COMMAND", func(p coffer.ProcessInfo) string { return strings.Join(p.Command, " ") }},
			})
		})
	}
	return c
}

func (a *app) statsCmd() *cobra.Command {
	var f format
	var noStream bool
	c := a.boxes(&cobra.Command{Use: "stats [flags] [BOX...]", Short: "Show what running boxes use of the host", Args: between(0, -1, "")}, -1)
	c.Flags().BoolVar(&noStream, "no-stream", false, "show it once")
	f.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			for {
				stats, failed := rt.Stats(c.Context(), args...)
				if isTerminal(a.out) && !noStream {
					fmt.Fprint(a.out, "\x1b[2J\x1b[H")
				}
				if err := errors.Join(failed, show(a.out, f, stats, statColumns())); err != nil {
					return err
				}
				// In a pipe one picture is what a reader can use.
				if noStream || !isTerminal(a.out) {
					return nil
				}
				select {
				case <-c.Context().Done():
					return nil
				case <-time.After(time.Second):
				}
			}
		})
	}
	return c
}

func statColumns() []column[coffer.Stats] {
	size := func(n int64) string {
		if n < 0 {
			return "-"
		}
		return units.BytesSize(float64(n))
	}
	return []column[coffer.Stats]{
		{"BOX ID", func(s coffer.Stats) string { return s.ID[:12] }},
		{"NAME", func(s coffer.Stats) string { return s.Name }},
		{"CPU TIME", func(s coffer.Stats) string { return s.CPU.Round(time.Millisecond).String() }},
		{"MEM USAGE", func(s coffer.Stats) string { return size(s.Memory) }},
		{"MEM LIMIT", func(s coffer.Stats) string {
			if s.MemoryLimit == 0 {
				return "none"
			}
			return size(s.MemoryLimit)
		}},
		{"PIDS", func(s coffer.Stats) string { return strconv.Itoa(s.PIDs) }},
	}
}

func (a *app) eventsCmd() *cobra.Command {
	var since string
	var noFollow bool
	var f format
	c := &cobra.Command{Use: "events [flags]", Short: "Show what happens to boxes", Args: noArgs()}
	c.Flags().StringVar(&since, "since", "", "begin with this time (2026-01-02T15:04:05Z, or 10m); default: now")
	c.Flags().BoolVar(&noFollow, "no-follow", false, "end with what has happened so far")
	f.add(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		from, err := moment(since)
		if err != nil {
			return err
		}
		if since == "" && !noFollow {
			from = time.Now()
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			for e, err := range rt.Events(c.Context(), from, !noFollow) {
				if err != nil {
					return err
				}
				if err := showEvent(a.out, f, e); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return c
}

func showEvent(w io.Writer, f format, e coffer.Event) error {
	if f.how != "table" {
		return show(w, f, []coffer.Event{e}, nil)
	}
	attrs := make([]string, 0, len(e.Attrs))
	for k, v := range e.Attrs {
		attrs = append(attrs, k+"="+v)
	}
	slices.Sort(attrs)
	_, err := fmt.Fprintf(w, "%s box %s %s (name=%s%s)\n", e.Time.Format(time.RFC3339Nano), e.Action, e.BoxID, e.Name,
		strings.Join(append([]string{""}, attrs...), ", "))
	return err
}

// boxPath splits BOX:PATH; ok is false for a path of the host.
func boxPath(s string) (ref, p string, ok bool) {
	ref, p, ok = strings.Cut(s, ":")
	// A path with a slash before the colon, or beginning with a dot, is the host's.
	if !ok || ref == "" || strings.ContainsAny(ref, "/") || strings.HasPrefix(ref, ".") {
		return "", s, false
	}
	if p == "" {
		p = "/"
	}
	if !path.IsAbs(p) {
		p = "/" + p
	}
	return ref, p, true
}
