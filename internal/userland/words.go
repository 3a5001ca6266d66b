package userland

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// escape reads what follows a backslash and returns the bytes that it stands for, and how many were read.
func escape(s string, zeroOctal bool) ([]byte, int) {
	if s == "" {
		return []byte{'\\'}, 0
	}
	if i := strings.IndexByte("abefnrtv\\", s[0]); i >= 0 {
		return []byte{"\a\b\x1b\f\n\r\t\v\\"[i]}, 1
	}
	digits := func(from, n, base int) ([]byte, int) {
		end := from
		for end < len(s) && end < from+n {
			if _, err := strconv.ParseUint(s[end:end+1], base, 8); err != nil {
				break
			}
			end++
		}
		v, err := strconv.ParseUint(s[from:end], base, 16)
		if err != nil {
			return nil, 0
		}
		return []byte{byte(v)}, end
	}
	switch {
	case s[0] == 'x':
		if b, n := digits(1, 2, 16); n > 1 {
			return b, n
		}
	case s[0] == '0' && zeroOctal:
		if b, n := digits(0, 4, 8); n > 0 {
			return b, n
		}
	case s[0] >= '0' && s[0] <= '7':
		return digits(0, 3, 8)
	}
	return []byte{'\\', s[0]}, 1
}

// unescape replaces all escapes; stop is true when \c ended the output.
func unescape(s string) (out string, stop bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' {
			b.WriteByte(s[i])
			continue
		}
		if strings.HasPrefix(s[i+1:], "c") {
			return b.String(), true
		}
		e, n := escape(s[i+1:], true)
		b.Write(e)
		i += n
	}
	return b.String(), false
}

func echo(c *call) error {
	args, newline, esc := c.args, true, false
	for len(args) > 0 && len(args[0]) > 1 && args[0][0] == '-' && strings.Trim(args[0][1:], "neE") == "" {
		for _, f := range args[0][1:] {
			switch f {
			case 'n':
				newline = false
			case 'e':
				esc = true
			case 'E':
				esc = false
			}
		}
		args = args[1:]
	}
	s := strings.Join(args, " ")
	if esc {
		var stop bool
		if s, stop = unescape(s); stop {
			newline = false
		}
	}
	c.out.WriteString(s)
	if newline {
		c.out.WriteByte('\n')
	}
	return nil
}

func printf(c *call) error {
	if len(c.args) == 0 {
		return errUsage("missing format")
	}
	format, args := c.args[0], c.args[1:]
	next := func() string {
		if len(args) == 0 {
			return ""
		}
		a := args[0]
		args = args[1:]
		return a
	}
	var failed error
	number := func(s string) int64 {
		if s == "" {
			return 0
		}
		if s[0] == '\'' || s[0] == '"' {
			for _, r := range s[1:] {
				return int64(r)
			}
		}
		n, err := strconv.ParseInt(s, 0, 64)
		if err != nil {
			failed = fmt.Errorf("%s: no number", s)
		}
		return n
	}
	for {
		before := len(args)
		for i := 0; i < len(format); i++ {
			switch {
			case format[i] == '\\':
				b, n := escape(format[i+1:], false)
				c.out.Write(b)
				i += n
			case format[i] != '%':
				c.out.WriteByte(format[i])
			case strings.HasPrefix(format[i+1:], "%"):
				c.out.WriteByte('%')
				i++
			default:
				j := i + 1
				verb := "%"
				for j < len(format) && strings.IndexByte("-+ #0123456789.*", format[j]) >= 0 {
					if format[j] == '*' {
						verb += strconv.FormatInt(number(next()), 10)
					} else {
						verb += format[j : j+1]
					}
					j++
				}
				if j == len(format) {
					return errUsage("incomplete format " + format[i:])
				}
				switch format[j] {
				case 's':
					fmt.Fprintf(c.out, verb+"s", next())
				case 'b':
					s, stop := unescape(next())
					fmt.Fprintf(c.out, verb+"s", s)
					if stop {
						return failed
					}
				case 'q':
					c.out.WriteString("'" + strings.ReplaceAll(next(), "'", `'\''`) + "'")
				case 'c':
					if s := next(); s != "" {
						c.out.WriteByte(s[0])
					}
				case 'd', 'i':
					fmt.Fprintf(c.out, verb+"d", number(next()))
				case 'u':
					fmt.Fprintf(c.out, verb+"d", uint64(number(next())))
				case 'o', 'x', 'X':
					fmt.Fprintf(c.out, verb+format[j:j+1], uint64(number(next())))
				case 'e', 'E', 'f', 'F', 'g', 'G':
					a := next()
					f, err := strconv.ParseFloat(a, 64)
					if err != nil && a != "" {
						failed = fmt.Errorf("%s: no number", a)
					}
					fmt.Fprintf(c.out, verb+format[j:j+1], f)
				default:
					return errUsage("unknown format " + format[i:j+1])
				}
				i = j
			}
		}
		// The format is used again until the arguments are.
		if len(args) == 0 || len(args) == before {
			return failed
		}
	}
}

// test evaluates the arguments of test and [.
func test(c *call) error {
	args := c.args
	if c.name == "[" {
		if len(args) == 0 || args[len(args)-1] != "]" {
			return errUsage("missing ]")
		}
		args = args[:len(args)-1]
	}
	t := tester{args: args}
	ok, err := t.or()
	if err == nil && len(t.args) > 0 {
		err = errUsage("unexpected " + t.args[0])
	}
	if err != nil {
		return err
	}
	if !ok {
		return errExit(1)
	}
	return nil
}

type tester struct{ args []string }

func (t *tester) peek(s string) bool { return len(t.args) > 0 && t.args[0] == s }

func (t *tester) or() (bool, error) {
	ok, err := t.and()
	for err == nil && t.peek("-o") {
		t.args = t.args[1:]
		var b bool
		b, err = t.and()
		ok = ok || b
	}
	return ok, err
}

func (t *tester) and() (bool, error) {
	ok, err := t.not()
	for err == nil && t.peek("-a") {
		t.args = t.args[1:]
		var b bool
		b, err = t.not()
		ok = ok && b
	}
	return ok, err
}

func (t *tester) not() (bool, error) {
	if t.peek("!") && len(t.args) > 1 {
		t.args = t.args[1:]
		ok, err := t.not()
		return !ok, err
	}
	return t.primary()
}

func (t *tester) primary() (bool, error) {
	a := t.args
	if len(a) == 0 {
		return false, nil
	}
	if len(a) >= 3 {
		if f, ok := binaryTests()[a[1]]; ok {
			t.args = a[3:]
			return f(a[0], a[2])
		}
	}
	if a[0] == "(" {
		t.args = a[1:]
		ok, err := t.or()
		if err == nil && !t.peek(")") {
			err = errUsage("missing )")
		}
		if err == nil {
			t.args = t.args[1:]
		}
		return ok, err
	}
	if len(a) >= 2 && len(a[0]) == 2 && a[0][0] == '-' {
		t.args = a[2:]
		return unaryTest(a[0][1], a[1])
	}
	t.args = a[1:]
	return a[0] != "", nil
}

func binaryTests() map[string]func(a, b string) (bool, error) {
	num := func(f func(a, b int64) bool) func(a, b string) (bool, error) {
		return func(a, b string) (bool, error) {
			x, err1 := strconv.ParseInt(strings.TrimSpace(a), 10, 64)
			y, err2 := strconv.ParseInt(strings.TrimSpace(b), 10, 64)
			if errors.Join(err1, err2) != nil {
				return false, errUsage(fmt.Sprintf("%q and %q are not both numbers", a, b))
			}
			return f(x, y), nil
		}
	}
	newer := func(a, b string) bool {
		x, err := os.Stat(a)
		if err != nil {
			return false
		}
		y, err := os.Stat(b)
		return err != nil || x.ModTime().After(y.ModTime())
	}
	return map[string]func(a, b string) (bool, error){
		"=":   func(a, b string) (bool, error) { return a == b, nil },
		"==":  func(a, b string) (bool, error) { return a == b, nil },
		"!=":  func(a, b string) (bool, error) { return a != b, nil },
		"-eq": num(func(a, b int64) bool { return a == b }), "-ne": num(func(a, b int64) bool { return a != b }),
		"-lt": num(func(a, b int64) bool { return a < b }), "-le": num(func(a, b int64) bool { return a <= b }),
		"-gt": num(func(a, b int64) bool { return a > b }), "-ge": num(func(a, b int64) bool { return a >= b }),
		"-nt": func(a, b string) (bool, error) { return newer(a, b), nil },
		"-ot": func(a, b string) (bool, error) { return newer(b, a), nil },
		"-ef": func(a, b string) (bool, error) {
			x, err1 := os.Stat(a)
			y, err2 := os.Stat(b)
			return err1 == nil && err2 == nil && os.SameFile(x, y), nil
		},
	}
}

func unaryTest(op byte, a string) (bool, error) {
	switch op {
	case 'z':
		return a == "", nil
	case 'n':
		return a != "", nil
	case 't':
		fd, err := strconv.Atoi(a)
		if err != nil {
			return false, errUsage("invalid descriptor " + a)
		}
		_, err = unix.IoctlGetTermios(fd, unix.TCGETS)
		return err == nil, nil
	case 'r', 'w', 'x':
		return unix.Access(a, map[byte]uint32{'r': unix.R_OK, 'w': unix.W_OK, 'x': unix.X_OK}[op]) == nil, nil
	}
	look := os.Stat
	if op == 'h' || op == 'L' {
		look = os.Lstat
	}
	fi, err := look(a)
	var mode, uid, gid uint32
	if err == nil {
		st := fi.Sys().(*syscall.Stat_t)
		mode, uid, gid = st.Mode, st.Uid, st.Gid
	}
	types := map[byte]uint32{'f': unix.S_IFREG, 'd': unix.S_IFDIR, 'h': unix.S_IFLNK, 'L': unix.S_IFLNK, 'p': unix.S_IFIFO, 'S': unix.S_IFSOCK, 'b': unix.S_IFBLK, 'c': unix.S_IFCHR}
	bits := map[byte]uint32{'u': 0o4000, 'g': 0o2000, 'k': 0o1000}
	switch {
	case op == 'e':
		return err == nil, nil
	case op == 's':
		return err == nil && fi.Size() > 0, nil
	case op == 'O':
		return err == nil && int(uid) == os.Geteuid(), nil
	case op == 'G':
		return err == nil && int(gid) == os.Getegid(), nil
	case types[op] != 0:
		return err == nil && mode&unix.S_IFMT == types[op], nil
	case bits[op] != 0:
		return mode&bits[op] != 0, nil
	}
	return false, errUsage(fmt.Sprintf("unknown test -%c", op))
}
