// Package userland is the programs of the image `base`: a shell and the everyday commands, in one binary that acts by the name it
// is called under. It aims at what people and scripts type, not at every option of GNU's; an option that is not there is refused,
// never ignored.
//
// The whole of it starts for each `true`, so nothing here may work before it is asked: the table of commands is made when it is
// looked at, and heavy imports stay out.
package userland

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// call is one run of a command.
type call struct {
	name string
	args []string // without the name
	in   io.Reader
	out  *bufio.Writer
	err  io.Writer

	raw *os.File // where out writes, for those who ask what it is
}

// errExit ends a command with a status and no message.
type errExit int

func (e errExit) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// errUsage ends a command with status 2.
type errUsage string

func (e errUsage) Error() string { return string(e) }

// Main runs the command that args[0] names and returns its exit code.
func Main(args []string) int {
	name := strings.TrimPrefix(filepath.Base(args[0]), "-")
	if name == "coffer-base" && len(args) > 1 {
		args = args[1:]
		name = filepath.Base(args[0])
	}
	run, ok := commands()[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "%s: no such command; there are: %s\n", name, strings.Join(Names(), " "))
		return 127
	}
	c := &call{name: name, args: args[1:], in: os.Stdin, out: bufio.NewWriterSize(os.Stdout, 32<<10), err: os.Stderr, raw: os.Stdout}
	ignoreInherited()
	return c.end(run(c))
}

// end says how a command went, and returns its exit code.
func (c *call) end(err error) int {
	if ferr := c.out.Flush(); err == nil {
		err = ferr
	}
	var exit errExit
	var usage errUsage
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return int(exit)
	case errors.As(err, &usage):
		c.warn(err)
		return 2
	case errors.Is(err, syscall.EPIPE):
		return 1
	}
	c.warn(err)
	return 1
}

// Names lists the commands, sorted.
func Names() []string { return slices.Sorted(maps.Keys(commands())) }

func commands() map[string]func(*call) error {
	return map[string]func(*call) error{
		"[": test, "base64": base64Cmd, "basename": basename, "cat": cat, "chgrp": chown, "chmod": chmod, "chown": chown, "cmp": cmpCmd,
		"cp": cp, "cut": cut, "date": date, "dd": dd, "df": df, "dirname": dirname, "dmesg": dmesg, "du": du, "echo": echo, "env": env,
		"false": func(*call) error { return errExit(1) }, "find": find, "free": free, "grep": grep, "gunzip": gzipCmd, "gzip": gzipCmd,
		"head": head, "hostname": hostname, "id": id, "kill": kill, "ln": ln, "ls": ls, "md5sum": sum, "mkdir": mkdir, "mkfifo": mkfifo,
		"mknod": mknod, "mktemp": mktemp, "mount": mount, "mv": mv, "nohup": nohup, "nproc": nproc, "printenv": printenv,
		"printf": printf, "ps": ps, "pwd": pwd, "readlink": readlink, "realpath": realpath, "rm": rm, "rmdir": rmdir, "sed": sed, "seq": seq,
		"sh": sh, "sha1sum": sum, "sha256sum": sum, "sha512sum": sum, "sleep": sleep, "sort": sortCmd, "stat": stat, "stty": stty,
		"sync": syncCmd, "tail": tail, "tar": tarCmd, "tee": tee, "test": test, "timeout": timeout, "touch": touch, "tr": tr,
		"true": func(*call) error { return nil }, "truncate": truncate, "tty": tty, "umount": umount, "uname": uname, "uniq": uniq,
		"uptime": uptime, "wc": wc, "which": which, "whoami": whoami, "xargs": xargs, "yes": yes, "zcat": gzipCmd,
	}
}

// warn prints one line about something that went wrong.
func (c *call) warn(err error) {
	_ = c.out.Flush() // its failure is reported at the end
	fmt.Fprintf(c.err, "%s: %s\n", c.name, describe(err))
}

// finish ends what was written: a full disk is noticed no earlier. The first error counts.
func finish(err *error, steps ...func() error) {
	for _, step := range steps {
		if e := step(); *err == nil {
			*err = e
		}
	}
}

// describe says what failed in the words of other systems: the name, then the reason.
func describe(err error) string {
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		return pe.Path + ": " + pe.Err.Error()
	case errors.As(err, &le):
		return le.New + ": " + le.Err.Error()
	}
	return err.Error()
}

// each runs f for every argument, goes on after failures, and fails at the end if one did.
func (c *call) each(args []string, f func(string) error) error {
	failed := false
	for _, a := range args {
		if err := f(a); err != nil {
			var exit errExit
			if !errors.As(err, &exit) {
				c.warn(err)
			}
			failed = true
		}
	}
	if failed {
		return errExit(1)
	}
	return nil
}

// open opens a file to read; "-" is the standard input.
func (c *call) open(name string) (io.ReadCloser, error) {
	if name == "-" {
		return io.NopCloser(c.in), nil
	}
	return os.Open(name)
}

// inputs runs f for each named file, or for the standard input if none is named.
func (c *call) inputs(args []string, f func(name string, r io.Reader) error) error {
	if len(args) == 0 {
		args = []string{"-"}
	}
	return c.each(args, func(name string) error {
		r, err := c.open(name)
		if err != nil {
			return err
		}
		defer r.Close()
		return f(name, r)
	})
}

// lines runs f for each line, without its newline; f returns false to end early.
func lines(r io.Reader, f func(line string) bool) error {
	return fullLines(r, func(line string) bool { return f(strings.TrimSuffix(line, "\n")) })
}

// fullLines runs f for each line with its newline, which the last one may not have.
func fullLines(r io.Reader, f func(line string) bool) error {
	br := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := br.ReadString('\n')
		if line != "" && !f(line) {
			return nil
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// options are parsed flags.
type options struct {
	vals  map[string][]string
	order []string // the flags as they came
	rest  []string
}

// last returns which of some flags, each of which takes back the others, came last.
func (o options) last(names ...string) string {
	for _, f := range slices.Backward(o.order) {
		if slices.Contains(names, f) {
			return f
		}
	}
	return ""
}

func (o options) has(name string) bool { return len(o.vals[name]) > 0 }

// val returns the last value given, or the default.
func (o options) val(name, def string) string {
	if v := o.vals[name]; len(v) > 0 {
		return v[len(v)-1]
	}
	return def
}

// parse reads flags as getopt does. The spec is a list of names separated by blanks: "a" is a flag, "n:" takes a value, "i?" may have one,
// as -iVALUE or --long=VALUE but never in the next word, "r|R|recursive" is one flag under several names, kept under the first. A spec that begins with "+" ends the flags at the first other argument.
func (c *call) parse(spec string) (options, error) {
	o := options{vals: map[string][]string{}}
	inOrder := strings.HasPrefix(spec, "+")
	type flag struct {
		name            string
		value, optional bool
	}
	known := map[string]flag{}
	for _, f := range strings.Fields(strings.TrimPrefix(spec, "+")) {
		names, value := strings.CutSuffix(f, ":")
		names, optional := strings.CutSuffix(names, "?")
		all := strings.Split(names, "|")
		for _, n := range all {
			known[n] = flag{all[0], value, optional}
		}
	}
	add := func(name, v string) {
		o.vals[name] = append(o.vals[name], v)
		o.order = append(o.order, name)
	}
	args := c.args
	for len(args) > 0 {
		a := args[0]
		switch {
		case a == "--":
			o.rest = append(o.rest, args[1:]...)
			return o, nil
		case strings.HasPrefix(a, "--"):
			args = args[1:]
			name, v, given := strings.Cut(a[2:], "=")
			f, ok := known[name]
			if !ok || len(name) == 1 {
				return o, errUsage("unknown option " + a)
			}
			if given && !f.value && !f.optional {
				return o, errUsage("option --" + name + " takes no value")
			}
			if f.value && !given {
				if len(args) == 0 {
					return o, errUsage("option " + a + " needs a value")
				}
				v, args = args[0], args[1:]
			}
			add(f.name, v)
		case len(a) > 1 && a[0] == '-':
			args = args[1:]
			for i := 1; i < len(a); i++ {
				f, ok := known[a[i:i+1]]
				if !ok {
					return o, errUsage(fmt.Sprintf("unknown option -%c", a[i]))
				}
				if !f.value && !f.optional {
					add(f.name, "")
					continue
				}
				v := a[i+1:]
				if v == "" && f.value {
					if len(args) == 0 {
						return o, errUsage(fmt.Sprintf("option -%c needs a value", a[i]))
					}
					v, args = args[0], args[1:]
				}
				add(f.name, v)
				break
			}
		case inOrder:
			o.rest = append(o.rest, args...)
			return o, nil
		default:
			o.rest = append(o.rest, a)
			args = args[1:]
		}
	}
	return o, nil
}

// need says how many operands there must be.
func (o options) need(n int) error {
	if len(o.rest) < n {
		return errUsage("missing operand")
	}
	return nil
}

// ask puts a question and tells whether the answer begins with y. No answer is no.
func (c *call) ask(format string, args ...any) bool {
	_ = c.out.Flush() // its failure is reported at the end
	fmt.Fprintf(c.err, c.name+": "+format+"? ", args...)
	var line []byte
	for {
		var b [1]byte
		n, err := c.in.Read(b[:])
		if n > 0 && b[0] != '\n' {
			line = append(line, b[0])
		} else if n > 0 || err != nil {
			return len(line) > 0 && (line[0] == 'y' || line[0] == 'Y')
		}
	}
}
