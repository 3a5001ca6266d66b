package userland

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

func grep(c *call) error {
	o, err := c.parse("i|ignore-case v|invert-match n|line-number c|count l|files-with-matches L q|quiet|silent r|R|recursive " +
		"E|extended-regexp F|fixed-strings G w|word-regexp x|line-regexp o|only-matching h|no-filename H|with-filename s e|regexp: m|max-count: " +
		"A|after-context: B|before-context: C|context: a color|colour? include: exclude: exclude-dir: f|file:")
	if err != nil {
		return err
	}
	pats := o.vals["e"]
	for _, name := range o.vals["f"] {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if text := strings.TrimSuffix(string(b), "\n"); text != "" {
			pats = append(pats, text)
		}
	}
	if o.has("s") {
		c.err = io.Discard
	}
	if len(pats) == 0 && !o.has("f") {
		if err := o.need(1); err != nil {
			return err
		}
		pats, o.rest = o.rest[:1], o.rest[1:]
	}
	var res []*regexp.Regexp
	for _, p := range pats {
		for one := range strings.SplitSeq(p, "\n") {
			re, err := pattern(one, o.has("E"), o.has("i"), o.has("F"))
			if err != nil {
				return err
			}
			switch {
			case o.has("x"):
				re, err = regexp.Compile(`^(?:` + re.String() + `)$`)
			case o.has("w"):
				re, err = regexp.Compile(`\b(?:` + re.String() + `)\b`)
			}
			if err != nil {
				return errUsage(err.Error())
			}
			res = append(res, re)
		}
	}
	g := &grepper{c: c, o: o, res: res}
	for name, p := range map[string]*int{"A": &g.after, "B": &g.before, "C": nil, "m": &g.max} {
		v := o.val(name, "")
		if v == "" {
			continue
		}
		n, err := strconv.Atoi(v)
		if err != nil {
			return errUsage("invalid number " + v)
		}
		if p == nil {
			g.after, g.before = max(g.after, n), max(g.before, n)
		} else {
			*p = n
		}
	}
	files := o.rest
	if o.has("r") {
		prefix := "./"
		if len(files) == 0 {
			files, prefix = []string{"."}, ""
		}
		var all []string
		for _, f := range files {
			err := filepath.WalkDir(f, func(p string, d fs.DirEntry, err error) error {
				if err != nil {
					c.warn(err)
					g.failed = true
					return nil
				}
				matches := func(option string) bool {
					return slices.ContainsFunc(o.vals[option], func(glob string) bool { ok, _ := filepath.Match(glob, d.Name()); return ok })
				}
				if d.IsDir() && p != f && matches("exclude-dir") {
					return fs.SkipDir
				}
				if d.Type().IsRegular() && !matches("exclude") {
					if inc := o.val("include", ""); inc != "" {
						if !matches("include") {
							return nil
						}
					}
					if f == "." {
						p = prefix + p
					}
					all = append(all, p)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
		if files = all; len(files) == 0 {
			return errExit(1)
		}
	}
	g.names = (len(files) > 1 || o.has("r") || o.has("H")) && !o.has("h")
	err = c.inputs(files, g.file)
	switch {
	case g.any && (err == nil || o.has("q")):
		return nil
	case err != nil || g.failed:
		return errExit(2)
	}
	return errExit(1)
}

type grepper struct {
	c                  *call
	o                  options
	res                []*regexp.Regexp
	after, before, max int
	names, any, failed bool
}

func (g *grepper) match(l string) bool {
	for _, re := range g.res {
		if re.MatchString(l) {
			return !g.o.has("v")
		}
	}
	return g.o.has("v")
}

func (g *grepper) file(name string, r io.Reader) error {
	if f, ok := r.(*os.File); ok {
		if fi, err := f.Stat(); err == nil && fi.IsDir() {
			return fmt.Errorf("%s: is a directory", name)
		}
	}
	if name == "-" {
		name = "(standard input)"
	}
	show := func(n int, sep, text string) {
		if g.names {
			g.c.out.WriteString(name + sep)
		}
		if g.o.has("n") {
			g.c.out.WriteString(strconv.Itoa(n) + sep)
		}
		g.c.out.WriteString(text + "\n")
	}
	quiet := g.o.has("q") || g.o.has("l") || g.o.has("L") || g.o.has("c")
	n, hits, shown, after := 0, 0, 0, 0
	var held []string
	err := lines(r, func(l string) bool {
		n++
		if !g.match(l) {
			if after > 0 && !quiet {
				after--
				show(n, "-", l)
				shown = n
			} else if g.before > 0 {
				if held = append(held, l); len(held) > g.before {
					held = held[1:]
				}
			}
			return true
		}
		hits++
		g.any = true
		if quiet {
			return g.o.has("c") && (g.max == 0 || hits < g.max)
		}
		if (g.before > 0 || g.after > 0) && shown > 0 && n-len(held) > shown+1 {
			g.c.out.WriteString("--\n")
		}
		for i, h := range held {
			show(n-len(held)+i, "-", h)
		}
		held, after, shown = held[:0], g.after, n
		if g.o.has("o") && !g.o.has("v") {
			for _, re := range g.res {
				for _, m := range re.FindAllString(l, -1) {
					if m != "" {
						show(n, ":", m)
					}
				}
			}
		} else {
			show(n, ":", l)
		}
		return g.max == 0 || hits < g.max
	})
	switch {
	case g.o.has("c"):
		if g.names {
			g.c.out.WriteString(name + ":")
		}
		fmt.Fprintln(g.c.out, hits)
	case g.o.has("l") && hits > 0 || g.o.has("L") && hits == 0:
		fmt.Fprintln(g.c.out, name)
	}
	return err
}
