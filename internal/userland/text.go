package userland

import (
	"bufio"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func cat(c *call) error {
	o, err := c.parse("n u")
	if err != nil {
		return err
	}
	n := 0
	return c.inputs(o.rest, func(_ string, r io.Reader) error {
		if !o.has("n") {
			// What comes slowly goes on at once.
			_, err := io.Copy(flushWriter{c.out}, r)
			return err
		}
		return lines(r, func(l string) bool {
			n++
			fmt.Fprintf(c.out, "%6d\t%s\n", n, l)
			return true
		})
	})
}

// flushWriter passes on everything at once.
type flushWriter struct{ w *bufio.Writer }

func (f flushWriter) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = f.w.Flush()
	}
	return n, err
}

// count reads the number of head and tail, also in the old form -5.
func (c *call) count() (options, int64, bool, error) {
	for i, a := range c.args {
		if value := i > 0 && (c.args[i-1] == "-n" || c.args[i-1] == "-c"); !value && len(a) > 1 && a[0] == '-' && a[1] >= '0' && a[1] <= '9' {
			c.args[i] = "-n" + a[1:]
		}
	}
	o, err := c.parse("n|lines: c|bytes: q v f|follow F")
	if err != nil {
		return o, 0, false, err
	}
	v := o.val("n", "10")
	if o.has("c") {
		v = o.val("c", "")
	}
	n, err := parseSize(strings.TrimLeft(v, "+-"))
	if err != nil {
		return o, 0, false, errUsage("invalid number " + v)
	}
	return o, n, o.has("c"), nil
}

func (c *call) headings(o options, f func(r io.Reader) error) error {
	first := true
	return c.inputs(o.rest, func(name string, r io.Reader) error {
		if (len(o.rest) > 1 || o.has("v")) && !o.has("q") {
			if !first {
				c.out.WriteByte('\n')
			}
			fmt.Fprintf(c.out, "==> %s <==\n", name)
		}
		first = false
		return f(r)
	})
}

func head(c *call) error {
	o, n, isBytes, err := c.count()
	if err != nil {
		return err
	}
	butLast := strings.HasPrefix(o.val("n", ""), "-") || strings.HasPrefix(o.val("c", ""), "-")
	return c.headings(o, func(r io.Reader) error {
		switch {
		case butLast && isBytes:
			b, err := io.ReadAll(r)
			c.out.Write(b[:max(0, int64(len(b))-n)])
			return err
		case butLast:
			var held []string
			return fullLines(r, func(l string) bool {
				if held = append(held, l); int64(len(held)) > n {
					c.out.WriteString(held[0])
					held = held[1:]
				}
				return true
			})
		}
		if isBytes {
			_, err := io.CopyN(c.out, r, n)
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if n <= 0 {
			return nil
		}
		left := n
		return fullLines(r, func(l string) bool {
			c.out.WriteString(l)
			left--
			return left > 0
		})
	})
}

func tail(c *call) error {
	o, n, isBytes, err := c.count()
	if err != nil {
		return err
	}
	fromStart := strings.HasPrefix(o.val("n", ""), "+") || strings.HasPrefix(o.val("c", ""), "+")
	return c.headings(o, func(r io.Reader) error {
		switch {
		case isBytes:
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			if fromStart {
				b = b[min(int64(len(b)), max(0, n-1)):]
			} else {
				b = b[max(0, int64(len(b))-n):]
			}
			c.out.Write(b)
		case fromStart:
			i := int64(0)
			if err := fullLines(r, func(l string) bool {
				if i++; i >= n {
					c.out.WriteString(l)
				}
				return true
			}); err != nil {
				return err
			}
		default:
			var last []string
			if err := fullLines(r, func(l string) bool {
				if last = append(last, l); int64(len(last)) > 2*n+1024 {
					last = append([]string(nil), last[int64(len(last))-n:]...)
				}
				return true
			}); err != nil {
				return err
			}
			for _, l := range last[max(0, int64(len(last))-n):] {
				c.out.WriteString(l)
			}
		}
		if !o.has("f") && !o.has("F") {
			return nil
		}
		for {
			if _, err := io.Copy(flushWriter{c.out}, r); err != nil {
				return err
			}
			if err := c.out.Flush(); err != nil {
				return err
			}
			time.Sleep(250 * time.Millisecond)
		}
	})
}

func wc(c *call) error {
	o, err := c.parse("l|lines w|words c|bytes m|chars")
	if err != nil {
		return err
	}
	all := len(o.vals) == 0
	var total [4]int64
	show := func(n [4]int64, name string) {
		var f []string
		for i, k := range []string{"l", "w", "m", "c"} {
			if o.has(k) || all && k != "m" {
				f = append(f, strconv.FormatInt(n[i], 10))
			}
		}
		if name != "-" {
			f = append(f, name)
		}
		c.out.WriteString(strings.Join(f, " ") + "\n")
	}
	err = c.inputs(o.rest, func(name string, r io.Reader) error {
		var n [4]int64
		inWord := false
		buf := make([]byte, 64<<10)
		for {
			k, err := r.Read(buf)
			n[3] += int64(k)
			for _, b := range buf[:k] {
				if b == '\n' {
					n[0]++
				}
				if b&0xc0 != 0x80 {
					n[2]++
				}
				space := b == ' ' || b >= '\t' && b <= '\r'
				if !space && !inWord {
					n[1]++
				}
				inWord = !space
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
		}
		for i := range n {
			total[i] += n[i]
		}
		show(n, name)
		return nil
	})
	if len(o.rest) > 1 {
		show(total, "total")
	}
	return err
}

func uniq(c *call) error {
	o, err := c.parse("c|count d|repeated u|unique i")
	if err != nil {
		return err
	}
	n, prev := 0, ""
	flush := func() {
		if n == 0 || o.has("d") && n < 2 || o.has("u") && n > 1 {
			return
		}
		if o.has("c") {
			fmt.Fprintf(c.out, "%7d ", n)
		}
		c.out.WriteString(prev + "\n")
	}
	err = c.inputs(o.rest, func(_ string, r io.Reader) error {
		return lines(r, func(l string) bool {
			if n > 0 && (l == prev || o.has("i") && strings.EqualFold(l, prev)) {
				n++
				return true
			}
			flush()
			n, prev = 1, l
			return true
		})
	})
	flush()
	return err
}

func tee(c *call) error {
	o, err := c.parse("a|append i|ignore-interrupts")
	if err != nil {
		return err
	}
	if o.has("i") {
		signal.Ignore(syscall.SIGINT)
	}
	ws := []io.Writer{flushWriter{c.out}}
	mode := os.O_TRUNC
	if o.has("a") {
		mode = os.O_APPEND
	}
	err = c.each(o.rest, func(name string) error {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|mode, 0o666)
		if err == nil {
			ws = append(ws, f)
		}
		return err
	})
	if _, cerr := io.Copy(io.MultiWriter(ws...), c.in); err == nil {
		err = cerr
	}
	return err
}

func yes(c *call) error {
	word := "y"
	if len(c.args) > 0 {
		word = strings.Join(c.args, " ")
	}
	for {
		if _, err := c.out.WriteString(word + "\n"); err != nil {
			return err
		}
	}
}

func seq(c *call) error {
	sep, width, args := "\n", false, c.args
	for len(args) > 0 && (args[0] == "-w" || strings.HasPrefix(args[0], "-s")) {
		switch {
		case args[0] == "-w":
			width, args = true, args[1:]
		case args[0] != "-s":
			sep, args = args[0][2:], args[1:]
		case len(args) > 1:
			sep, args = args[1], args[2:]
		default:
			return errUsage("option -s needs a value")
		}
	}
	n := []float64{}
	digits := 0
	for _, a := range args {
		f, err := strconv.ParseFloat(a, 64)
		if err != nil {
			return errUsage("invalid number " + a)
		}
		if _, frac, ok := strings.Cut(a, "."); ok {
			digits = max(digits, len(frac))
		}
		n = append(n, f)
	}
	first, step, last := 1.0, 1.0, 0.0
	switch len(n) {
	case 1:
		last = n[0]
	case 2:
		first, last = n[0], n[1]
	case 3:
		first, step, last = n[0], n[1], n[2]
	default:
		return errUsage("give one to three numbers")
	}
	if step == 0 {
		return errUsage("the step cannot be 0")
	}
	pad := 0
	if width {
		pad = max(len(strconv.FormatFloat(first, 'f', digits, 64)), len(strconv.FormatFloat(last, 'f', digits, 64)))
	}
	wrote := false
	for i := 0; ; i++ {
		v := first + float64(i)*step
		if step > 0 && v > last+1e-9 || step < 0 && v < last-1e-9 {
			break
		}
		if wrote {
			c.out.WriteString(sep)
		}
		if _, err := fmt.Fprintf(c.out, "%0*.*f", pad, digits, v); err != nil {
			return err
		}
		wrote = true
	}
	if wrote {
		c.out.WriteString("\n")
	}
	return nil
}

func sum(c *call) error {
	o, err := c.parse("c|check b t")
	if err != nil {
		return err
	}
	digest := func(r io.Reader) (string, error) {
		var h hash.Hash
		switch c.name {
		case "md5sum":
			h = md5.New()
		case "sha1sum":
			h = sha1.New()
		case "sha512sum":
			h = sha512.New()
		default:
			h = sha256.New()
		}
		_, err := io.Copy(h, r)
		return hex.EncodeToString(h.Sum(nil)), err
	}
	if !o.has("c") {
		return c.inputs(o.rest, func(name string, r io.Reader) error {
			d, err := digest(r)
			if err == nil {
				fmt.Fprintf(c.out, "%s  %s\n", d, name)
			}
			return err
		})
	}
	list, err := c.allLines(o.rest)
	if err != nil {
		return err
	}
	return c.each(list, func(l string) error {
		want, name, ok := strings.Cut(l, " ")
		name = strings.TrimLeft(name, " *")
		if !ok {
			return fmt.Errorf("no line of sums: %q", l)
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		d, err := digest(f)
		if err != nil {
			return err
		}
		if d != want {
			fmt.Fprintf(c.out, "%s: FAILED\n", name)
			return errExit(1)
		}
		fmt.Fprintf(c.out, "%s: OK\n", name)
		return nil
	})
}

func base64Cmd(c *call) error {
	o, err := c.parse("d|decode w|wrap:")
	if err != nil {
		return err
	}
	wrap, err := strconv.Atoi(o.val("w", "76"))
	if err != nil {
		return errUsage("invalid width")
	}
	return c.inputs(o.rest, func(_ string, r io.Reader) error {
		b, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if o.has("d") {
			d, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(b)), ""))
			c.out.Write(d)
			return err
		}
		s := base64.StdEncoding.EncodeToString(b)
		for wrap > 0 && len(s) > wrap {
			c.out.WriteString(s[:wrap] + "\n")
			s = s[wrap:]
		}
		c.out.WriteString(s)
		if wrap > 0 {
			c.out.WriteByte('\n')
		}
		return nil
	})
}

func cmpCmd(c *call) error {
	o, err := c.parse("s|quiet|silent")
	if err != nil {
		return err
	}
	if err := o.need(2); err != nil {
		return err
	}
	var rs [2]*bufio.Reader
	for i := range rs {
		f, err := c.open(o.rest[i])
		if err != nil {
			return err
		}
		defer f.Close()
		rs[i] = bufio.NewReaderSize(f, 64<<10)
	}
	line := 1
	for n := 1; ; n++ {
		a, errA := rs[0].ReadByte()
		b, errB := rs[1].ReadByte()
		switch {
		case errA != nil && errB != nil:
			return nil
		case errA != nil || errB != nil:
			if !o.has("s") {
				name := o.rest[0]
				if errB != nil {
					name = o.rest[1]
				}
				fmt.Fprintf(c.err, "cmp: EOF on %s after byte %d\n", name, n-1)
			}
			return errExit(1)
		case a != b:
			if !o.has("s") {
				fmt.Fprintf(c.out, "%s %s differ: byte %d, line %d\n", o.rest[0], o.rest[1], n, line)
			}
			return errExit(1)
		}
		if a == '\n' {
			line++
		}
	}
}

// pattern compiles what grep and sed call a basic or extended regular expression. Basic ones differ in which operators are escaped.
func pattern(p string, extended, fold, fixed bool) (*regexp.Regexp, error) {
	if fixed {
		p = regexp.QuoteMeta(p)
	} else if !extended {
		var b strings.Builder
		for i := 0; i < len(p); i++ {
			switch {
			case p[i] == '\\' && i+1 < len(p) && strings.IndexByte("(){}|+?", p[i+1]) >= 0:
				i++
				b.WriteByte(p[i])
			case p[i] == '\\' && i+1 < len(p):
				b.WriteString(p[i : i+2])
				i++
			case strings.IndexByte("(){}|+?", p[i]) >= 0:
				b.WriteString("\\" + p[i:i+1])
			case p[i] == '*' && (i == 0 || i == 1 && p[0] == '^'):
				b.WriteString("\\*")
			default:
				b.WriteByte(p[i])
			}
		}
		p = b.String()
	}
	p = strings.NewReplacer(`\<`, `\b`, `\>`, `\b`).Replace(p)
	if fold {
		p = "(?i)" + p
	}
	re, err := regexp.Compile(p)
	if err != nil {
		return nil, errUsage(err.Error())
	}
	return re, nil
}
