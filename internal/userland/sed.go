package userland

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
)

// sedAddr is where a command applies: a line, the last line, or lines that match.
type sedAddr struct {
	line int
	last bool
	re   *regexp.Regexp
}

func (a *sedAddr) match(n int, last bool, text string) bool {
	return a.re != nil && a.re.MatchString(text) || a.last && last || a.line > 0 && a.line == n
}

type sedCmd struct {
	from, to       *sedAddr
	not, in        bool
	name           byte
	re             *regexp.Regexp
	text           string // replacement, or the text of a, i and c
	global, print_ bool
	nth            int
	block          []*sedCmd // what { holds
	table          map[rune]rune
}

// sed knows the commands s, y, d, p, q, a, i, c, = and { }.
func sed(c *call) error {
	o, err := c.parse("n|quiet|silent e|expression: i|in-place? E|regexp-extended r f|file: s")
	if err != nil {
		return err
	}
	scripts := o.vals["e"]
	for _, name := range o.vals["f"] {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		scripts = append(scripts, string(b))
	}
	if len(scripts) == 0 {
		if err := o.need(1); err != nil {
			return err
		}
		scripts, o.rest = o.rest[:1], o.rest[1:]
	}
	p := sedParser{s: strings.Join(scripts, "\n"), extended: o.has("E") || o.has("r")}
	cmds, err := p.parse()
	if err == nil && p.s != "" {
		err = errUsage("unexpected }")
	}
	if err != nil {
		return err
	}
	if !o.has("i") {
		n := 0
		return c.inputs(o.rest, func(_ string, r io.Reader) error { return sedRun(c.out, r, cmds, o.has("n"), &n) })
	}
	return c.each(o.rest, func(name string) error {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		n := 0
		if err := sedRun(&out, bytes.NewReader(b), cmds, o.has("n"), &n); err != nil {
			return err
		}
		if suffix := o.val("i", ""); suffix != "" {
			if err := os.WriteFile(name+suffix, b, 0o644); err != nil {
				return err
			}
		}
		return os.WriteFile(name, out.Bytes(), 0o644)
	})
}

// sedRun edits one input. A last line without a newline is written without one.
func sedRun(w io.Writer, r io.Reader, cmds []*sedCmd, quiet bool, n *int) error {
	var held *string
	quit := false
	do := func(line string, last bool) {
		*n++
		text, whole := strings.CutSuffix(line, "\n")
		missing := false
		emit := func(s string) {
			if missing {
				fmt.Fprintln(w)
			}
			fmt.Fprint(w, s)
			if missing = !whole; whole {
				fmt.Fprintln(w)
			}
		}
		after, deleted := "", false
		var run func(cmds []*sedCmd) (on bool)
		run = func(cmds []*sedCmd) bool {
			for _, cm := range cmds {
				if !cm.selects(*n, last, text) {
					continue
				}
				switch cm.name {
				case '{':
					if !run(cm.block) {
						return false
					}
				case 'y':
					text = strings.Map(func(r rune) rune {
						if to, ok := cm.table[r]; ok {
							return to
						}
						return r
					}, text)
				case 's':
					var done bool
					if text, done = cm.substitute(text); done && cm.print_ {
						emit(text)
					}
				case 'd':
					deleted = true
				case 'c':
					fmt.Fprintln(w, cm.text)
					deleted = true
				case 'p':
					emit(text)
				case 'q':
					quit = true
				case 'a':
					after += cm.text + "\n"
				case 'i':
					fmt.Fprintln(w, cm.text)
				case '=':
					fmt.Fprintln(w, *n)
				}
				if deleted || quit {
					return false
				}
			}
			return true
		}
		run(cmds)
		if !deleted && !quiet {
			emit(text)
		}
		if after != "" && missing {
			fmt.Fprintln(w)
		}
		fmt.Fprint(w, after)
	}
	err := fullLines(r, func(l string) bool {
		if held != nil {
			do(*held, false)
		}
		held = &l
		return !quit
	})
	if held != nil && !quit {
		do(*held, true)
	}
	return err
}

func (cm *sedCmd) selects(n int, last bool, text string) bool {
	ok := true
	switch {
	case cm.from != nil && cm.to != nil:
		if ok = cm.in; ok {
			cm.in = !cm.to.match(n, last, text) && (cm.to.line == 0 || n < cm.to.line)
		} else if ok = cm.from.match(n, last, text); ok {
			cm.in = cm.to.line == 0 || cm.to.line > n
		}
	case cm.from != nil:
		ok = cm.from.match(n, last, text)
	}
	return ok != cm.not
}

func (cm *sedCmd) substitute(text string) (string, bool) {
	var b strings.Builder
	pos, count, done := 0, 0, false
	for _, m := range cm.re.FindAllStringSubmatchIndex(text, -1) {
		if count++; count < cm.nth {
			continue
		}
		b.WriteString(text[pos:m[0]])
		for i := 0; i < len(cm.text); i++ {
			group := -1
			switch {
			case cm.text[i] == '&':
				group = 0
			case cm.text[i] == '\\' && i+1 < len(cm.text):
				i++
				switch d := cm.text[i]; {
				case d >= '0' && d <= '9':
					group = int(d - '0')
				case d == 'n':
					b.WriteByte('\n')
				case d == 't':
					b.WriteByte('\t')
				default:
					b.WriteByte(d)
				}
			default:
				b.WriteByte(cm.text[i])
			}
			if group >= 0 && 2*group+1 < len(m) && m[2*group] >= 0 {
				b.WriteString(text[m[2*group]:m[2*group+1]])
			}
		}
		pos, done = m[1], true
		if !cm.global {
			break
		}
	}
	b.WriteString(text[pos:])
	return b.String(), done
}

type sedParser struct {
	s        string
	extended bool
}

func (p *sedParser) parse() ([]*sedCmd, error) {
	var cmds []*sedCmd
	for {
		p.s = strings.TrimLeft(p.s, " \t\n;")
		if p.s == "" || p.s[0] == '}' {
			return cmds, nil
		}
		cm := &sedCmd{nth: 1}
		var err error
		if cm.from, err = p.addr(); err != nil {
			return nil, err
		}
		if cm.from != nil && strings.HasPrefix(p.s, ",") {
			p.s = p.s[1:]
			if cm.to, err = p.addr(); err != nil || cm.to == nil {
				return nil, errUsage("missing second address")
			}
		}
		p.s = strings.TrimLeft(p.s, " ")
		for strings.HasPrefix(p.s, "!") {
			cm.not, p.s = true, p.s[1:]
		}
		if p.s == "" {
			return nil, errUsage("missing command")
		}
		cm.name, p.s = p.s[0], p.s[1:]
		switch cm.name {
		case 's':
			err = p.subst(cm)
		case 'd', 'p', 'q', '=':
		case '{':
			if cm.block, err = p.parse(); err == nil && p.s == "" {
				err = errUsage("missing }")
			} else if err == nil {
				p.s = p.s[1:]
			}
		case 'y':
			err = p.translate(cm)
		case 'a', 'i', 'c':
			text, rest, _ := strings.Cut(strings.TrimLeft(strings.TrimPrefix(strings.TrimLeft(p.s, " "), "\\"), " \n"), "\n")
			cm.text, p.s = text, rest
		default:
			err = errUsage(fmt.Sprintf("unknown command %q", cm.name))
		}
		if err != nil {
			return nil, err
		}
		cmds = append(cmds, cm)
	}
}

func (p *sedParser) addr() (*sedAddr, error) {
	if p.s == "" {
		return nil, nil
	}
	switch digits := len(p.s) - len(strings.TrimLeft(p.s, "0123456789")); {
	case digits > 0:
		n, err := strconv.Atoi(p.s[:digits])
		p.s = p.s[digits:]
		return &sedAddr{line: n}, err
	case p.s[0] == '$':
		p.s = p.s[1:]
		return &sedAddr{last: true}, nil
	case p.s[0] == '/':
		p.s = p.s[1:]
		text, err := p.until('/')
		if err != nil {
			return nil, err
		}
		re, err := pattern(text, p.extended, false, false)
		return &sedAddr{re: re}, err
	}
	return nil, nil
}

// until cuts at the delimiter; one behind a backslash stands for itself.
func (p *sedParser) until(delim byte) (string, error) {
	var b strings.Builder
	for i := 0; i < len(p.s); i++ {
		switch {
		case p.s[i] == '\\' && i+1 < len(p.s):
			i++
			if p.s[i] != delim {
				b.WriteByte('\\')
			}
			b.WriteByte(p.s[i])
		case p.s[i] == delim:
			p.s = p.s[i+1:]
			return b.String(), nil
		default:
			b.WriteByte(p.s[i])
		}
	}
	return "", errUsage("unterminated " + string(delim))
}

func (p *sedParser) subst(cm *sedCmd) error {
	if p.s == "" {
		return errUsage("incomplete s command")
	}
	delim := p.s[0]
	p.s = p.s[1:]
	re, err := p.until(delim)
	if err != nil {
		return err
	}
	if cm.text, err = p.until(delim); err != nil {
		return err
	}
	fold := false
	for p.s != "" && strings.IndexByte("gpiI0123456789", p.s[0]) >= 0 {
		switch f := p.s[0]; f {
		case 'g':
			cm.global = true
		case 'p':
			cm.print_ = true
		case 'i', 'I':
			fold = true
		default:
			cm.nth = int(f - '0')
		}
		p.s = p.s[1:]
	}
	cm.re, err = pattern(re, p.extended, fold, false)
	return err
}

func (p *sedParser) translate(cm *sedCmd) error {
	if p.s == "" {
		return errUsage("incomplete y command")
	}
	delim := p.s[0]
	p.s = p.s[1:]
	from, err := p.until(delim)
	if err != nil {
		return err
	}
	to, err := p.until(delim)
	if err != nil {
		return err
	}
	a, b := []rune(from), []rune(to)
	if len(a) != len(b) {
		return errUsage("y needs two texts of one length")
	}
	cm.table = map[rune]rune{}
	for i := range a {
		cm.table[a[i]] = b[i]
	}
	return nil
}
