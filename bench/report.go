package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is what one run found; it is written as JSON for programs and as Markdown for people.
type report struct {
	Date      time.Time
	Commit    string
	Machine   map[string]string
	Load      []string // of the machine, before and after: a busy one makes the numbers worthless
	Versions  map[string]string
	N         int
	Samples   []*series
	Processes map[string]float64 // of an idle box
	Failed    map[string]int     // of the boxes started at once
	Only      string             `json:",omitempty"` // the one part that was measured

	plain *strings.Replacer // takes the places of this run out of commands
}

// series is what was measured of one thing and one contender.
type series struct {
	Metric, Contender, Unit string
	Command                 string
	Values                  []float64
}

func newReport(ctx context.Context, o options, tmp string) *report {
	commit, _ := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output()
	return &report{Date: time.Now().UTC(), Commit: strings.TrimSpace(string(commit)), Machine: machine(), Load: []string{loadAverage()},
		Versions: map[string]string{}, N: o.n, Processes: map[string]float64{}, Failed: map[string]int{}, Only: o.only,
		plain: strings.NewReplacer(o.bin, "coffer", tmp, "$TMP")}
}

func machine() map[string]string {
	m := map[string]string{"go": runtime.Version(), "arch": runtime.GOARCH, "cores": fmt.Sprint(runtime.NumCPU())}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m["kernel"] = strings.TrimSpace(string(b))
	}
	for file, want := range map[string]string{"/proc/cpuinfo": "model name", "/proc/meminfo": "MemTotal", "/etc/os-release": "PRETTY_NAME"} {
		b, _ := os.ReadFile(file)
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(strings.ReplaceAll(line, "=", ":"), ":"); ok && strings.TrimSpace(k) == want {
				m[want] = strings.Trim(strings.TrimSpace(v), `"`)
				break
			}
		}
	}
	return m
}

func loadAverage() string {
	b, _ := os.ReadFile("/proc/loadavg")
	return strings.TrimSpace(string(b))
}

func (r *report) add(metric, contender, unit string, v float64, argv []string) {
	s := r.find(metric, contender)
	if s == nil {
		s = &series{Metric: metric, Contender: contender, Unit: unit, Command: r.plain.Replace(strings.Join(argv, " "))}
		r.Samples = append(r.Samples, s)
	}
	s.Values = append(s.Values, v)
}

func (r *report) find(metric, contender string) *series {
	for _, s := range r.Samples {
		if s.Metric == metric && s.Contender == contender {
			return s
		}
	}
	return nil
}

// quantile interpolates between the two nearest values.
func (s *series) quantile(q float64) float64 {
	v := slices.Sorted(slices.Values(s.Values))
	at := q * float64(len(v)-1)
	lo := int(at)
	if lo+1 >= len(v) {
		return v[lo]
	}
	return v[lo] + (at-float64(lo))*(v[lo+1]-v[lo])
}

func (s *series) median() float64 { return s.quantile(0.5) }

// target is a number to reach, of the issue that set it.
type target struct {
	what        string
	have, limit float64
	unit        string
}

func (r *report) targets() []target {
	m := func(metric, contender string) float64 {
		if s := r.find(metric, contender); s != nil {
			return s.median()
		}
		return math.NaN() // not measured
	}
	div := func(a, b float64) float64 { return a / b }
	run, exec := m("run", "coffer"), m("exec", "coffer")
	return []target{
		{"run --rm, against runsc on the same image file", div(run, m("run", "runsc (image file)")), 1.2, "×"},
		{"run --rm, against runsc on a directory", div(run, m("run", "runsc (directory)")), 1.2, "×"},
		{"run --rm, against podman+runc", div(run, m("run", "podman+runc")), 1, "×"},
		{"exec", exec, 15, "ms"},
		{"exec, against podman exec", div(exec, m("exec", "podman+runc")), 0.1, "×"},
		{"rm -f of a running box", m("rm", "coffer"), 40, "ms"},
		{"ps", m("ps", "coffer"), 15, "ms"},
		{"memory of an idle box", m("memory", "coffer"), 20, "MiB"},
		{"boxes started at once that did not come up", float64(r.Failed["coffer"]), 0, ""},
		{"pull, against podman pull", div(m("pull", "coffer"), m("pull", "podman+runc")), 0.7, "×"},
		{"pull of what has not changed", m("pull again", "coffer"), 50, "ms"},
		{"run --rm of a pulled image, against the embedded one", div(m("run of a pulled image", "coffer"), m("run of a pulled image", "coffer, image base")), 1.1, "×"},
	}
}

func (r *report) write(dir string, w io.Writer) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, r.Date.Format("2006-01-02"))
	if r.Only != "" {
		name += "-" + r.Only
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(name+".json", append(b, '\n'), 0o644); err != nil {
		return err
	}
	md := r.markdown()
	if err := os.WriteFile(name+".md", []byte(md), 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\nwritten to %s.md and %s.json\n", md, name, name)
	return err
}

func (r *report) markdown() string {
	var b strings.Builder
	p := func(f string, args ...any) { fmt.Fprintf(&b, f, args...) }
	p("# Measured on %s\n\n", r.Date.Format("2006-01-02 15:04 MST"))
	p("Commit %s. Medians of %d (files: see n), taken in turns on one root file system; the first round is thrown away.\n\n", r.Commit, r.N)
	for _, k := range sortedKeys(r.Machine) {
		p("- %s: %s\n", k, r.Machine[k])
	}
	p("- load average before: %s; after: %s\n", r.Load[0], r.Load[len(r.Load)-1])
	for _, k := range sortedKeys(r.Versions) {
		p("- %s: %s\n", k, r.Versions[k])
	}
	p("\n## Targets\n\n| what | measured | at most | |\n|---|---|---|---|\n")
	for _, t := range r.targets() {
		if r.Only != "" && math.IsNaN(t.have) || r.Only != "" && t.have == 0 {
			continue
		}
		verdict := "reached"
		switch {
		case math.IsNaN(t.have):
			verdict = "**not measured**"
		case t.have > t.limit:
			verdict = "**missed**"
		}
		p("| %s | %.3g %s | %.3g %s | %s |\n", t.what, t.have, t.unit, t.limit, t.unit, verdict)
	}
	titles := []struct{ metric, title string }{{"run", "`run --rm … true`, from start to end"}, {"exec", "`exec … true` in a running box"},
		{"rm", "`rm -f` of a running box"}, {"ps", "`ps -a` of many boxes, some running"}, {"memory", "memory of an idle box, all its processes, PSS"},
		{"burst", "many started at once, until the last is up"}, {"pull", "`pull` of an image of which nothing is there, from a registry on loopback"},
		{"pull again", "`pull` of an image that is there"}, {"run of a pulled image", "`run --rm … true` of that image, and of the embedded one"}}
	for _, t := range titles {
		if r.find(t.metric, "coffer") == nil {
			continue
		}
		p("\n## %s\n\n", t.title)
		r.table(&b, t.metric)
	}
	if len(r.Processes) > 0 {
		p("\nProcesses of an idle box:")
		for _, k := range sortedKeys(r.Processes) {
			p(" %s %.1f;", k, r.Processes[k])
		}
		p("\n")
	}
	if len(r.Failed) > 0 {
		p("\nStarted at once and not up: %v\n", r.Failed)
	}
	r.fileTable(&b)
	p("\n## Commands\n\n")
	seen := map[string]bool{}
	for _, s := range r.Samples {
		kind, _, _ := strings.Cut(s.Metric, "/")
		if line := fmt.Sprintf("- %s, %s: `%s`\n", kind, s.Contender, s.Command); !seen[line] {
			seen[line] = true
			p("%s", line)
		}
	}
	return b.String()
}

func (r *report) table(b *strings.Builder, metric string) {
	fmt.Fprintf(b, "| | median | lower quartile | upper quartile | least | most | n | against coffer |\n|---|---|---|---|---|---|---|---|\n")
	own := r.find(metric, "coffer")
	for _, s := range r.Samples {
		if s.Metric != metric {
			continue
		}
		ratio := ""
		if own != nil && own.median() > 0 {
			ratio = fmt.Sprintf("%.2f ×", s.median()/own.median())
		}
		fmt.Fprintf(b, "| %s | %.1f %s | %.1f | %.1f | %.1f | %.1f | %d | %s |\n", s.Contender, s.median(), s.Unit, s.quantile(0.25), s.quantile(0.75),
			s.quantile(0), s.quantile(1), len(s.Values), ratio)
	}
}

// fileTable has a row for each place and a column for each kind of work.
func (r *report) fileTable(b *strings.Builder) {
	var steps, places []string
	n := 0
	for _, s := range r.Samples {
		if step, ok := strings.CutPrefix(s.Metric, "files/"); ok {
			n = len(s.Values)
			steps, places = append(steps, step), append(places, s.Contender)
		}
	}
	if n == 0 {
		return
	}
	slices.Sort(steps)
	steps = slices.Compact(steps)
	seen := map[string]bool{}
	fmt.Fprintf(b, "\n## Files, by where they live (ms, median of %d; bench/work says what each is)\n\n| | %s |\n|---|%s\n", n, strings.Join(steps, " | "),
		strings.Repeat("---|", len(steps)))
	for _, place := range places {
		if seen[place] {
			continue
		}
		seen[place] = true
		fmt.Fprintf(b, "| %s |", place)
		for _, step := range steps {
			fmt.Fprintf(b, " %.1f |", r.find("files/"+step, place).median())
		}
		fmt.Fprintln(b)
	}
}

func sortedKeys[V any, M ~map[string]V](m M) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, cmp.Compare[string])
	return keys
}
