package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
	"text/template/parse"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// format is how a list is shown: a table, JSON (one value per line), or a template for each value.
type format struct{ how string }

const formatHelp = `"table", "json" (one value per line), a Go template for each value, or "table " and a template`

func (f *format) add(c *cobra.Command) { c.Flags().StringVar(&f.how, "format", "table", formatHelp) }

// addShort is add for commands whose -f is not taken, as Docker has it.
func (f *format) addShort(c *cobra.Command) {
	c.Flags().StringVarP(&f.how, "format", "f", "table", formatHelp)
}

// column is one column of a table.
type column[T any] struct {
	head string
	cell func(T) string
}

func show[T any](w io.Writer, f format, items []T, cols []column[T]) error {
	switch f.how {
	case "json":
		for _, it := range items {
			e := json.NewEncoder(w)
			e.SetEscapeHTML(false)
			if err := e.Encode(it); err != nil {
				return err
			}
		}
		return nil
	case "table", "":
	default:
		return showTemplate(w, f.how, items)
	}
	tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
	line := make([]string, len(cols))
	for i, c := range cols {
		line[i] = c.head
	}
	fmt.Fprintln(tw, strings.Join(line, "\t"))
	for _, it := range items {
		for i, c := range cols {
			line[i] = visible(c.cell(it))
		}
		fmt.Fprintln(tw, strings.Join(line, "\t"))
	}
	return tw.Flush()
}

// visible writes out what is not for a terminal to show: a box chooses its processes' names, and an escape sequence in one could do
// anything with what is on the screen.
func visible(s string) string {
	if !strings.ContainsFunc(s, hidden) && utf8.ValidString(s) {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], string(utf8.RuneError)):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case hidden(r):
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

func hidden(r rune) bool { return !unicode.IsPrint(r) && r != utf8.RuneError }

func showTemplate[T any](w io.Writer, text string, items []T) error {
	// A shell's quotes keep these as they are; Docker takes them for what they mean, too.
	text = strings.NewReplacer(`\t`, "\t", `\n`, "\n").Replace(text)
	text, table := strings.CutPrefix(text, "table ")
	t, err := template.New("format").Funcs(template.FuncMap{
		"json":  func(v any) (string, error) { b, err := json.Marshal(v); return string(b), err },
		"join":  strings.Join,
		"upper": strings.ToUpper, "lower": strings.ToLower,
	}).Parse(strings.TrimPrefix(text, "template="))
	if err != nil {
		return fmt.Errorf("--format: %w", err)
	}
	flush := func() error { return nil }
	if table {
		tw := tabwriter.NewWriter(w, 0, 4, 3, ' ', 0)
		fmt.Fprintln(tw, heading(t.Root))
		w, flush = tw, tw.Flush
	}
	for _, it := range items {
		if err := t.Execute(w, it); err != nil {
			return fmt.Errorf("--format: %w", err)
		}
		fmt.Fprintln(w)
	}
	return flush()
}

// heading is a template's text with the name of each field in the place of its value.
func heading(list *parse.ListNode) string {
	var b strings.Builder
	for _, n := range list.Nodes {
		switch n := n.(type) {
		case *parse.TextNode:
			b.Write(n.Text)
		case *parse.ActionNode:
			for _, cmd := range n.Pipe.Cmds {
				for _, arg := range cmd.Args {
					if f, ok := arg.(*parse.FieldNode); ok {
						b.WriteString(strings.ToUpper(strings.Join(f.Ident, " ")))
					}
				}
			}
		}
	}
	return b.String()
}

// ago says how long something is past, roughly.
func ago(t time.Time) string {
	// Images that are built the same everywhere say that they are from 1970.
	if t.Unix() <= 0 {
		return "-"
	}
	return span(time.Since(t)) + " ago"
}

func span(d time.Duration) string {
	unit := func(n int, name string) string {
		if n == 1 {
			return "1 " + name
		}
		return fmt.Sprintf("%d %ss", n, name)
	}
	switch {
	case d < time.Minute:
		return unit(max(0, int(d.Seconds())), "second")
	case d < time.Hour:
		return unit(int(d.Minutes()), "minute")
	case d < 48*time.Hour:
		return unit(int(d.Hours()), "hour")
	}
	return unit(int(d.Hours()/24), "day")
}

func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}
