package userland

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// dateFormats are the forms that a date may be given in.
func parseTime(s string) (time.Time, error) {
	if n, ok := strings.CutPrefix(s, "@"); ok {
		f, err := strconv.ParseFloat(n, 64)
		if err != nil {
			return time.Time{}, errUsage("invalid date " + s)
		}
		sec := int64(f)
		return time.Unix(sec, int64((f-float64(sec))*1e9)), nil
	}
	if s == "now" {
		return time.Now(), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02 15:04:05 -0700", "2006-01-02 15:04:05", "2006-01-02T15:04:05", "2006-01-02 15:04", "2006-01-02", time.RFC1123Z, time.UnixDate} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	if t, ok := relativeTime(time.Now(), s); ok {
		return t, nil
	}
	return time.Time{}, errUsage("invalid date " + s)
}

// relativeTime reads times such as "yesterday", "2 days ago" and "+1 hour".
func relativeTime(now time.Time, s string) (time.Time, bool) {
	switch s {
	case "today":
		return now, true
	case "yesterday":
		return now.AddDate(0, 0, -1), true
	case "tomorrow":
		return now.AddDate(0, 0, 1), true
	}
	f := strings.Fields(s)
	sign := 1
	if len(f) == 3 && f[2] == "ago" {
		sign, f = -1, f[:2]
	}
	if len(f) != 2 {
		return now, false
	}
	n, err := strconv.Atoi(f[0])
	if err != nil {
		return now, false
	}
	n *= sign
	switch strings.TrimSuffix(f[1], "s") {
	case "sec", "second":
		return now.Add(time.Duration(n) * time.Second), true
	case "min", "minute":
		return now.Add(time.Duration(n) * time.Minute), true
	case "hour":
		return now.Add(time.Duration(n) * time.Hour), true
	case "day":
		return now.AddDate(0, 0, n), true
	case "week":
		return now.AddDate(0, 0, 7*n), true
	case "month":
		return now.AddDate(0, n, 0), true
	case "year":
		return now.AddDate(n, 0, 0), true
	}
	return now, false
}

func date(c *call) error {
	o, err := c.parse("u|utc|universal d|date: R|rfc-email I|iso-8601? r|reference: s|set:")
	if err != nil {
		return err
	}
	t := time.Now()
	if d := o.val("d", ""); d != "" {
		if t, err = parseTime(d); err != nil {
			return err
		}
	}
	if r := o.val("r", ""); r != "" {
		fi, err := os.Stat(r)
		if err != nil {
			return err
		}
		t = fi.ModTime()
	}
	if o.has("u") {
		t = t.UTC()
	}
	if s := o.val("s", ""); s != "" {
		when, err := parseTime(s)
		if err != nil {
			return err
		}
		tv := unix.NsecToTimeval(when.UnixNano())
		return unix.Settimeofday(&tv)
	}
	switch {
	case o.has("R"):
		fmt.Fprintln(c.out, t.Format(time.RFC1123Z))
	case o.has("I"):
		layout, ok := map[string]string{"": "2006-01-02", "date": "2006-01-02", "hours": "2006-01-02T15-07:00", "minutes": "2006-01-02T15:04-07:00",
			"seconds": "2006-01-02T15:04:05-07:00", "ns": "2006-01-02T15:04:05,000000000-07:00"}[o.val("I", "")]
		if !ok {
			return errUsage("invalid precision " + o.val("I", ""))
		}
		fmt.Fprintln(c.out, t.Format(layout))
	case len(o.rest) > 0 && strings.HasPrefix(o.rest[0], "+"):
		s, err := strftime(t, o.rest[0][1:])
		if err != nil {
			return err
		}
		fmt.Fprintln(c.out, s)
	case len(o.rest) > 0:
		return errUsage("give a format that begins with +")
	default:
		fmt.Fprintln(c.out, t.Format("Mon Jan _2 15:04:05 MST 2006"))
	}
	return nil
}

func strftime(t time.Time, f string) (string, error) {
	layouts := map[byte]string{
		'Y': "2006", 'm': "01", 'd': "02", 'H': "15", 'M': "04", 'S': "05", 'y': "06", 'e': "_2", 'I': "03", 'p': "PM", 'a': "Mon", 'A': "Monday",
		'b': "Jan", 'h': "Jan", 'B': "January", 'Z': "MST", 'z': "-0700", 'F': "2006-01-02", 'T': "15:04:05", 'D': "01/02/06", 'R': "15:04",
		'c': "Mon Jan _2 15:04:05 2006", 'x': "01/02/06", 'X': "15:04:05", 'N': "000000000",
	}
	var b strings.Builder
	for i := 0; i < len(f); i++ {
		if f[i] != '%' || i+1 == len(f) {
			b.WriteByte(f[i])
			continue
		}
		i++
		if f[i] == '-' && i+1 < len(f) { // without what fills up
			i++
			v, err := strftime(t, "%"+f[i:i+1])
			if err != nil {
				return "", err
			}
			if v = strings.TrimLeft(v, "0 "); v == "" {
				v = "0"
			}
			b.WriteString(v)
			continue
		}
		switch f[i] {
		case '%':
			b.WriteByte('%')
		case 'k':
			fmt.Fprintf(&b, "%2d", t.Hour())
		case 'V':
			_, week := t.ISOWeek()
			fmt.Fprintf(&b, "%02d", week)
		case 'n':
			b.WriteByte('\n')
		case 't':
			b.WriteByte('\t')
		case 's':
			b.WriteString(strconv.FormatInt(t.Unix(), 10))
		case 'N':
			fmt.Fprintf(&b, "%09d", t.Nanosecond())
		case 'j':
			fmt.Fprintf(&b, "%03d", t.YearDay())
		case 'u':
			b.WriteString(strconv.Itoa((int(t.Weekday())+6)%7 + 1))
		case 'w':
			b.WriteString(strconv.Itoa(int(t.Weekday())))
		default:
			l, ok := layouts[f[i]]
			if !ok {
				return "", errUsage(fmt.Sprintf("unknown field %%%c", f[i]))
			}
			b.WriteString(t.Format(l))
		}
	}
	return b.String(), nil
}
