package userland

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// finder evaluates the expression of find, which is read anew for each file: it is short, and files are many only for a machine.
type finder struct {
	c              *call
	expr           []string
	pos            int
	acts           bool // the expression does something by itself
	minDepth       int
	maxDepth       int
	now            time.Time
	prune          bool
	batch          map[int][]string // files gathered for -exec … +
	failed, dryRun bool
	quit, oneFS    bool
	dev            uint64 // of the root
}

func find(c *call) error {
	var roots []string
	args := c.args
	for len(args) > 0 && args[0] != "" && args[0][0] != '-' && args[0] != "(" && args[0] != "!" {
		roots, args = append(roots, args[0]), args[1:]
	}
	if len(roots) == 0 {
		roots = []string{"."}
	}
	f := &finder{c: c, expr: args, maxDepth: -1, now: time.Now(), batch: map[int][]string{}}
	// Read once without a file, to find mistakes and what it does.
	f.dryRun = true
	if _, err := f.eval("", nil); err != nil {
		return err
	}
	f.dryRun = false
	for _, root := range roots {
		if !f.quit {
			f.walk(root, 0)
		}
	}
	for at, files := range f.batch {
		end := at
		for f.expr[end] != "+" {
			end++
		}
		if !f.run(append(append([]string{}, f.expr[at:end-1]...), files...)) {
			f.failed = true
		}
	}
	if f.failed {
		return errExit(1)
	}
	return nil
}

func (f *finder) walk(path string, depth int) {
	fi, err := os.Lstat(path)
	if err != nil {
		f.c.warn(err)
		f.failed = true
		return
	}
	if dev := uint64(fi.Sys().(*syscall.Stat_t).Dev); depth == 0 {
		f.dev = dev
	} else if f.oneFS && dev != f.dev {
		return
	}
	f.prune = false
	depthFirst := false
	for _, e := range f.expr {
		depthFirst = depthFirst || e == "-depth" || e == "-delete"
	}
	visit := func() {
		if depth < f.minDepth {
			return
		}
		ok, err := f.eval(path, fi)
		if err != nil {
			f.c.warn(err)
			f.failed = true
		}
		if ok && !f.acts {
			fmt.Fprintln(f.c.out, path)
		}
	}
	if !depthFirst {
		visit()
	}
	if fi.IsDir() && !f.prune && (f.maxDepth < 0 || depth < f.maxDepth) {
		entries, err := os.ReadDir(path)
		if err != nil {
			f.c.warn(err)
			f.failed = true
		}
		for _, e := range entries {
			if f.quit {
				return
			}
			f.walk(strings.TrimSuffix(path, "/")+"/"+e.Name(), depth+1)
		}
	}
	if depthFirst && !f.quit {
		visit()
	}
}

func (f *finder) eval(path string, fi fs.FileInfo) (bool, error) {
	f.pos = 0
	if len(f.expr) == 0 {
		return true, nil
	}
	ok, err := f.or(path, fi, true)
	if err == nil && f.pos < len(f.expr) {
		err = errUsage("unexpected " + f.expr[f.pos])
	}
	return ok, err
}

func (f *finder) peek() string {
	if f.pos < len(f.expr) {
		return f.expr[f.pos]
	}
	return ""
}

// or, and and not read on even where live is false and nothing may be done any more.
func (f *finder) or(path string, fi fs.FileInfo, live bool) (bool, error) {
	ok, err := f.and(path, fi, live)
	for err == nil && (f.peek() == "-o" || f.peek() == "-or") {
		f.pos++
		var b bool
		b, err = f.and(path, fi, live && !ok)
		ok = ok || b
	}
	return ok, err
}

func (f *finder) and(path string, fi fs.FileInfo, live bool) (bool, error) {
	ok, err := f.not(path, fi, live)
	for err == nil && f.pos < len(f.expr) && f.peek() != "-o" && f.peek() != "-or" && f.peek() != ")" {
		if f.peek() == "-a" || f.peek() == "-and" {
			f.pos++
		}
		var b bool
		b, err = f.not(path, fi, live && ok)
		ok = ok && b
	}
	return ok, err
}

func (f *finder) not(path string, fi fs.FileInfo, live bool) (bool, error) {
	switch f.peek() {
	case "!", "-not":
		f.pos++
		ok, err := f.not(path, fi, live)
		return !ok, err
	case "(":
		f.pos++
		ok, err := f.or(path, fi, live)
		if err == nil && f.peek() != ")" {
			err = errUsage("missing )")
		}
		f.pos++
		return ok, err
	}
	return f.primary(path, fi, live && !f.dryRun)
}

func (f *finder) arg() (string, error) {
	if f.pos >= len(f.expr) {
		return "", errUsage(f.expr[len(f.expr)-1] + " needs a value")
	}
	f.pos++
	return f.expr[f.pos-1], nil
}

func (f *finder) primary(path string, fi fs.FileInfo, live bool) (bool, error) {
	name, err := f.arg()
	if err != nil {
		return false, err
	}
	switch name {
	case "-xdev", "-mount":
		f.oneFS = true
		return true, nil
	case "-true", "-depth":
		return true, nil
	case "-false":
		return false, nil
	case "-print", "-print0", "-delete", "-prune", "-empty", "-quit", "-executable":
		f.acts = f.acts || name == "-print" || name == "-print0" || name == "-delete" || name == "-quit"
		if !live {
			return true, nil
		}
		return f.act(name, path, fi)
	case "-exec", "-ok":
		f.acts = true
		return f.exec(path, live, name == "-ok")
	case "-name", "-iname", "-path", "-type", "-maxdepth", "-mindepth", "-newer", "-size", "-mtime", "-mmin", "-perm", "-user", "-uid", "-gid", "-links", "-inum":
	default:
		return false, errUsage("unknown test " + name)
	}
	v, err := f.arg()
	if err != nil {
		return false, err
	}
	if name == "-maxdepth" || name == "-mindepth" {
		n, err := strconv.Atoi(v)
		if err != nil {
			return false, errUsage("invalid depth " + v)
		}
		if name == "-maxdepth" {
			f.maxDepth = n
		} else {
			f.minDepth = n
		}
		return true, nil
	}
	if !live {
		return true, nil
	}
	return f.test(name, v, path, fi)
}

func (f *finder) act(name, path string, fi fs.FileInfo) (bool, error) {
	switch name {
	case "-print":
		fmt.Fprintln(f.c.out, path)
	case "-print0":
		f.c.out.WriteString(path + "\x00")
	case "-delete":
		if path != "." {
			return true, os.Remove(path)
		}
	case "-prune":
		f.prune = true
	case "-executable":
		return unix.Access(path, unix.X_OK) == nil, nil
	case "-quit":
		f.quit = true
	case "-empty":
		if fi.IsDir() {
			entries, err := os.ReadDir(path)
			return len(entries) == 0, err
		}
		return fi.Mode().IsRegular() && fi.Size() == 0, nil
	}
	return true, nil
}

func (f *finder) test(name, v, path string, fi fs.FileInfo) (bool, error) {
	st := fi.Sys().(*syscall.Stat_t)
	switch name {
	case "-name":
		return filepath.Match(v, filepath.Base(path))
	case "-iname":
		return filepath.Match(strings.ToLower(v), strings.ToLower(filepath.Base(path)))
	case "-path":
		re, err := pattern("^"+strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(quoteMeta(v))+"$", true, false, false)
		return err == nil && re.MatchString(path), err
	case "-type":
		return strings.Contains(v, strings.Replace(modeString(st.Mode)[:1], "-", "f", 1)), nil
	case "-newer":
		other, err := os.Stat(v)
		return err == nil && fi.ModTime().After(other.ModTime()), err
	case "-user":
		u, err := lookupUser(v)
		return err == nil && uint32(u.uid) == st.Uid, err
	case "-perm":
		n, err := newMode(strings.TrimLeft(v, "-/"), 0, false)
		if err != nil {
			return false, err
		}
		m := st.Mode & 0o7777
		return v[0] == '-' && m&n == n || v[0] == '/' && m&n != 0 || m == n, nil
	}
	sign, num := byte('='), v
	if v != "" && (v[0] == '+' || v[0] == '-') {
		sign, num = v[0], v[1:]
	}
	unit := int64(512)
	if name == "-size" && num != "" {
		if u, ok := map[byte]int64{'c': 1, 'k': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'b': 512}[num[len(num)-1]]; ok {
			unit, num = u, num[:len(num)-1]
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil {
		return false, errUsage("invalid number " + v)
	}
	have := map[string]int64{"-uid": int64(st.Uid), "-gid": int64(st.Gid), "-links": int64(st.Nlink), "-inum": int64(st.Ino), "-size": (fi.Size() + unit - 1) / unit,
		"-mtime": int64(f.now.Sub(fi.ModTime()) / (24 * time.Hour)), "-mmin": int64(f.now.Sub(fi.ModTime()) / time.Minute)}[name]
	return sign == '+' && have > n || sign == '-' && have < n || sign == '=' && have == n, nil
}

// quoteMeta escapes a pattern of the shell for use in a regular expression.
func quoteMeta(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strings.ContainsRune(`\.+*?()|[]{}^$`, r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}

func (f *finder) exec(path string, live, ask bool) (bool, error) {
	at := f.pos
	for f.pos < len(f.expr) && f.expr[f.pos] != ";" && !(f.expr[f.pos] == "+" && f.expr[f.pos-1] == "{}") {
		f.pos++
	}
	if f.pos >= len(f.expr) || f.pos == at {
		return false, errUsage("-exec needs a command that ends with ; or {} +")
	}
	args := append([]string{}, f.expr[at:f.pos]...)
	f.pos++
	if f.expr[f.pos-1] == "+" && ask {
		return false, errUsage("-ok needs a command that ends with ;")
	}
	if !live {
		return true, nil
	}
	if f.expr[f.pos-1] == "+" {
		f.batch[at] = append(f.batch[at], path)
		return true, nil
	}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "{}", path)
	}
	if ask && !f.c.ask("%s", strings.Join(args, " ")) {
		return false, nil
	}
	return f.run(args), nil
}

func (f *finder) run(args []string) bool {
	_ = f.c.out.Flush() // its failure is reported at the end
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.c.warn(err)
		f.failed = true
	}
	return err == nil
}
