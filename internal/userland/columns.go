package userland

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
)

// ranges reads a list such as 1,3-5,7-.
func ranges(s string) (func(int) bool, error) {
	type span struct{ lo, hi int }
	var spans []span
	for part := range strings.SplitSeq(s, ",") {
		lo, hi, isRange := strings.Cut(part, "-")
		sp := span{1, 1 << 30}
		var err error
		if lo != "" {
			if sp.lo, err = strconv.Atoi(lo); err != nil || sp.lo < 1 {
				return nil, errUsage("invalid list " + s)
			}
		}
		if !isRange {
			sp.hi = sp.lo
		} else if hi != "" {
			if sp.hi, err = strconv.Atoi(hi); err != nil {
				return nil, errUsage("invalid list " + s)
			}
		}
		spans = append(spans, sp)
	}
	return func(i int) bool {
		return slices.ContainsFunc(spans, func(sp span) bool { return i >= sp.lo && i <= sp.hi })
	}, nil
}

func cut(c *call) error {
	o, err := c.parse("d|delimiter: f|fields: c|characters: b|bytes: s|only-delimited")
	if err != nil {
		return err
	}
	list := o.val("f", o.val("c", o.val("b", "")))
	if list == "" {
		return errUsage("give a list of fields (-f) or characters (-c)")
	}
	in, err := ranges(list)
	if err != nil {
		return err
	}
	delim := o.val("d", "\t")
	return c.inputs(o.rest, func(_ string, r io.Reader) error {
		return lines(r, func(l string) bool {
			var parts []string
			sep := ""
			switch {
			case o.has("f") && !strings.Contains(l, delim):
				if !o.has("s") {
					c.out.WriteString(l + "\n")
				}
				return true
			case o.has("f"):
				parts, sep = strings.Split(l, delim), delim
			case o.has("b"):
				for i := range len(l) {
					parts = append(parts, l[i:i+1])
				}
			default:
				parts = strings.Split(l, "")
			}
			var keep []string
			for i, p := range parts {
				if in(i + 1) {
					keep = append(keep, p)
				}
			}
			c.out.WriteString(strings.Join(keep, sep) + "\n")
			return true
		})
	})
}

// trSet expands the ranges, classes and escapes of tr.
func trSet(s string) ([]byte, error) {
	classes := map[string]string{
		"[:upper:]": "A-Z", "[:lower:]": "a-z", "[:digit:]": "0-9", "[:alpha:]": "A-Za-z", "[:alnum:]": "A-Za-z0-9", "[:space:]": " \t\n\v\f\r",
		"[:blank:]": " \t", "[:punct:]": "!-/:-@[-`{-~", "[:cntrl:]": "\x00-\x1f\x7f", "[:print:]": " -~", "[:xdigit:]": "0-9A-Fa-f",
	}
	for name, set := range classes {
		s = strings.ReplaceAll(s, name, set)
	}
	var raw []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			b, n := escape(s[i+1:], false)
			raw = append(raw, b...)
			i += n
			continue
		}
		if s[i] == '-' && len(raw) > 0 && i+1 < len(s) {
			lo, hi := raw[len(raw)-1], s[i+1]
			if hi == '\\' && i+2 < len(s) {
				b, n := escape(s[i+2:], false)
				hi = b[0]
				i += n
			}
			if lo > hi {
				return nil, errUsage("range in the wrong order")
			}
			for b := int(lo) + 1; b <= int(hi); b++ {
				raw = append(raw, byte(b))
			}
			i++
			continue
		}
		raw = append(raw, s[i])
	}
	return raw, nil
}

func tr(c *call) error {
	o, err := c.parse("+d|delete s|squeeze-repeats c|C|complement")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	from, err := trSet(o.rest[0])
	if err != nil {
		return err
	}
	if o.has("c") {
		var not []byte
		for b := range 256 {
			if !bytes.Contains(from, []byte{byte(b)}) {
				not = append(not, byte(b))
			}
		}
		from = not
	}
	var to []byte
	if len(o.rest) > 1 {
		if to, err = trSet(o.rest[1]); err != nil {
			return err
		}
	} else if !o.has("d") && !o.has("s") {
		return errUsage("missing second set")
	}
	var table [256]byte
	var drop, squeeze [256]bool
	for i := range table {
		table[i] = byte(i)
	}
	for i, b := range from {
		if o.has("d") {
			drop[b] = true
		} else if len(to) > 0 {
			table[b] = to[min(i, len(to)-1)]
		}
	}
	if o.has("s") {
		set := to
		if len(set) == 0 {
			set = from
		}
		for _, b := range set {
			squeeze[b] = true
		}
	}
	buf, last := make([]byte, 32<<10), -1
	for {
		n, err := c.in.Read(buf)
		for _, b := range buf[:n] {
			if drop[b] {
				continue
			}
			b = table[b]
			if squeeze[b] && int(b) == last {
				continue
			}
			last = int(b)
			c.out.WriteByte(b)
		}
		if ferr := c.out.Flush(); ferr != nil {
			return ferr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
