package userland

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

func (c *call) allLines(args []string) ([]string, error) {
	var all []string
	err := c.inputs(args, func(_ string, r io.Reader) error {
		return lines(r, func(l string) bool { all = append(all, l); return true })
	})
	return all, err
}

// sortKey is what lines are compared by: from one field and character to another, both from 1, and how.
type sortKey struct {
	from, fromChar, to, toChar int // to 0 is the end of the line, toChar 0 that of the field
	flags                      string
}

func parseSortKey(s string) (sortKey, error) {
	k := sortKey{fromChar: 1}
	start, end, hasEnd := strings.Cut(s, ",")
	position := func(s string, field, char *int) error {
		flags := strings.TrimLeft(s, "0123456789.")
		f, ch, hasChar := strings.Cut(strings.TrimSuffix(s, flags), ".")
		var err1, err2 error
		*field, err1 = strconv.Atoi(f)
		if hasChar {
			*char, err2 = strconv.Atoi(ch)
		}
		if err1 != nil || err2 != nil || *field < 1 || *char < 0 || strings.Trim(flags, "bfhnrV") != "" {
			return errUsage("invalid key " + s)
		}
		k.flags += flags
		return nil
	}
	err := position(start, &k.from, &k.fromChar)
	if err == nil && hasEnd {
		err = position(end, &k.to, &k.toChar)
	}
	return k, err
}

// of cuts the key out of a line.
func (k sortKey) of(line, sep string) string {
	// Where each field begins and ends; blanks before a field belong to it if no separator is given.
	var spans [][2]int
	for pos := 0; pos <= len(line); {
		end := pos
		if sep != "" {
			if i := strings.Index(line[pos:], sep); i >= 0 {
				end = pos + i
			} else {
				end = len(line)
			}
			spans = append(spans, [2]int{pos, end})
			pos = end + len(sep)
			continue
		}
		end += len(line[pos:]) - len(strings.TrimLeft(line[pos:], " \t"))
		if i := strings.IndexAny(line[end:], " \t"); i >= 0 {
			end += i
		} else {
			end = len(line)
		}
		spans = append(spans, [2]int{pos, end})
		if pos = end; end == len(line) {
			break
		}
	}
	at := func(field, char int) int {
		if field > len(spans) {
			return len(line)
		}
		start := spans[field-1][0]
		if strings.Contains(k.flags, "b") || sep == "" && strings.ContainsAny(k.flags, "nhV") {
			start += len(line[start:]) - len(strings.TrimLeft(line[start:], " \t"))
		}
		return min(start+char, len(line))
	}
	start, end := at(k.from, max(k.fromChar, 1)-1), len(line)
	switch {
	case k.to > 0 && k.toChar > 0:
		end = at(k.to, k.toChar)
	case k.to > 0 && k.to <= len(spans):
		end = spans[k.to-1][1]
	}
	return line[start:max(start, end)]
}

func compareBy(flags, x, y string) int {
	d := 0
	if strings.Contains(flags, "f") {
		x, y = strings.ToUpper(x), strings.ToUpper(y)
	}
	switch {
	case strings.Contains(flags, "n"):
		d = cmp.Compare(leadingNumber(x, false), leadingNumber(y, false))
	case strings.Contains(flags, "h"):
		d = cmp.Compare(leadingNumber(x, true), leadingNumber(y, true))
	case strings.Contains(flags, "V"):
		d = compareVersions(x, y)
	default:
		if strings.Contains(flags, "b") {
			x, y = strings.TrimLeft(x, " \t"), strings.TrimLeft(y, " \t")
		}
		d = strings.Compare(x, y)
	}
	if strings.Contains(flags, "r") {
		return -d
	}
	return d
}

// compareVersions compares runs of digits as numbers, and the rest as text.
func compareVersions(x, y string) int {
	for x != "" && y != "" {
		cut := func(s string) (text, num, rest string) {
			i := strings.IndexAny(s, "0123456789")
			if i < 0 {
				return s, "", ""
			}
			j := len(s) - len(strings.TrimLeft(s[i:], "0123456789"))
			return s[:i], strings.TrimLeft(s[i:j], "0"), s[j:]
		}
		xt, xn, xr := cut(x)
		yt, yn, yr := cut(y)
		if d := cmp.Or(strings.Compare(xt, yt), cmp.Compare(len(xn), len(yn)), strings.Compare(xn, yn)); d != 0 {
			return d
		}
		x, y = xr, yr
	}
	return cmp.Compare(len(x), len(y))
}

func sortCmd(c *call) (err error) {
	o, err := c.parse("r|reverse n|numeric-sort u|unique f|ignore-case b|ignore-leading-blanks V|version-sort h|human-numeric-sort k|key: " +
		"t|field-separator: o|output: s|stable c|check")
	if err != nil {
		return err
	}
	all, err := c.allLines(o.rest)
	if err != nil {
		return err
	}
	global := ""
	for _, f := range []string{"b", "f", "h", "n", "r", "V"} {
		if o.has(f) {
			global += f
		}
	}
	var keys []sortKey
	for _, s := range o.vals["k"] {
		k, err := parseSortKey(s)
		if err != nil {
			return err
		}
		if k.flags == "" {
			k.flags = global // what a key says for itself takes its place
		}
		keys = append(keys, k)
	}
	sep := strings.ReplaceAll(o.val("t", ""), `\t`, "\t")
	compare := func(a, b string) int {
		if len(keys) == 0 {
			return compareBy(global, a, b)
		}
		for _, k := range keys {
			if d := compareBy(k.flags, k.of(a, sep), k.of(b, sep)); d != 0 {
				return d
			}
		}
		return 0
	}
	if o.has("c") {
		for i := 1; i < len(all); i++ {
			if d := compare(all[i-1], all[i]); d > 0 || d == 0 && o.has("u") {
				return fmt.Errorf("disorder: %s", all[i])
			}
		}
		return nil
	}
	slices.SortStableFunc(all, func(a, b string) int {
		d := compare(a, b)
		if d != 0 || o.has("u") || o.has("s") {
			return d
		}
		if d = strings.Compare(a, b); o.has("r") {
			d = -d
		}
		return d
	})
	if o.has("u") {
		all = slices.CompactFunc(all, func(a, b string) bool { return compare(a, b) == 0 })
	}
	w := io.Writer(c.out)
	if name := o.val("o", ""); name != "" {
		f, cerr := os.Create(name)
		if cerr != nil {
			return cerr
		}
		bw := bufio.NewWriter(f)
		defer finish(&err, bw.Flush, f.Close)
		w = bw
	}
	for _, l := range all {
		if _, err := io.WriteString(w, l+"\n"); err != nil {
			return err
		}
	}
	return nil
}

// leadingNumber reads the number that a text begins with, with a size's unit if units count.
func leadingNumber(s string, units bool) float64 {
	s = strings.TrimSpace(s)
	end := 0
	for end < len(s) && (s[end] >= '0' && s[end] <= '9' || s[end] == '.' || end == 0 && s[end] == '-') {
		end++
	}
	n, err := strconv.ParseFloat(s[:end], 64)
	if err != nil {
		return 0
	}
	if units && end < len(s) {
		if i := strings.IndexByte("KMGTP", s[end]&^0x20); i >= 0 {
			for range i + 1 {
				n *= 1024
			}
		}
	}
	return n
}
