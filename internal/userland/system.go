package userland

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func uname(c *call) error {
	o, err := c.parse("a|all s n r v m o p i")
	if err != nil {
		return err
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	machine := unix.ByteSliceToString(u.Machine[:])
	var out []string
	for _, f := range []struct{ flag, value string }{
		{"s", unix.ByteSliceToString(u.Sysname[:])}, {"n", unix.ByteSliceToString(u.Nodename[:])},
		{"r", unix.ByteSliceToString(u.Release[:])}, {"v", unix.ByteSliceToString(u.Version[:])}, {"m", machine}, {"o", "GNU/Linux"},
	} {
		if o.has(f.flag) || o.has("a") || len(o.vals) == 0 && f.flag == "s" || f.flag == "m" && (o.has("p") || o.has("i")) {
			out = append(out, f.value)
		}
	}
	fmt.Fprintln(c.out, strings.Join(out, " "))
	return nil
}

func dmesg(c *call) error {
	if _, err := c.parse("T c r H"); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(3 /* read all */, buf)
	if err != nil {
		return fmt.Errorf("read the kernel's messages: %w", err)
	}
	for l := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\n"), "\n") {
		if strings.HasPrefix(l, "<") {
			_, l, _ = strings.Cut(l, ">")
		}
		c.out.WriteString(l + "\n")
	}
	return nil
}

func hostname(c *call) error {
	o, err := c.parse("s f")
	if err != nil {
		return err
	}
	if len(o.rest) > 0 {
		return unix.Sethostname([]byte(o.rest[0]))
	}
	h, err := os.Hostname()
	if err != nil {
		return err
	}
	if o.has("s") {
		h, _, _ = strings.Cut(h, ".")
	}
	fmt.Fprintln(c.out, h)
	return nil
}

func nproc(c *call) error {
	fmt.Fprintln(c.out, runtime.NumCPU())
	return nil
}

func uptime(c *call) error {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(b), " ")
	sec, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, " %s up %s\n", time.Now().Format("15:04:05"), (time.Duration(sec) * time.Second).String())
	return nil
}

func free(c *call) error {
	o, err := c.parse("h m k g b")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return err
	}
	defer f.Close()
	kb := map[string]int64{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		name, rest, _ := strings.Cut(sc.Text(), ":")
		if w := strings.Fields(rest); len(w) > 0 {
			kb[name], _ = strconv.ParseInt(w[0], 10, 64)
		}
	}
	show := func(n int64) string {
		switch {
		case o.has("h"):
			return human(n * 1024)
		case o.has("m"):
			return strconv.FormatInt(n/1024, 10)
		case o.has("g"):
			return strconv.FormatInt(n>>20, 10)
		case o.has("b"):
			return strconv.FormatInt(n*1024, 10)
		}
		return strconv.FormatInt(n, 10)
	}
	avail, ok := kb["MemAvailable"]
	if !ok {
		avail = kb["MemFree"] + kb["Cached"]
	}
	fmt.Fprintf(c.out, "%-6s %12s %12s %12s %12s\n", "", "total", "used", "free", "available")
	fmt.Fprintf(c.out, "%-6s %12s %12s %12s %12s\n", "Mem:", show(kb["MemTotal"]), show(kb["MemTotal"]-avail), show(kb["MemFree"]), show(avail))
	fmt.Fprintf(c.out, "%-6s %12s %12s %12s\n", "Swap:", show(kb["SwapTotal"]), show(kb["SwapTotal"]-kb["SwapFree"]), show(kb["SwapFree"]))
	return nil
}

func pwd(c *call) error {
	if _, err := c.parse("L P"); err != nil {
		return err
	}
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, dir)
	return nil
}

func syncCmd(c *call) error {
	if len(c.args) == 0 {
		unix.Sync()
		return nil
	}
	return c.each(c.args, func(name string) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	})
}

func which(c *call) error {
	o, err := c.parse("a")
	if err != nil {
		return err
	}
	return c.each(o.rest, func(name string) error {
		found := false
		for dir := range strings.SplitSeq(os.Getenv("PATH"), ":") {
			p := dir + "/" + name
			if strings.Contains(name, "/") {
				p = name
			}
			if fi, err := os.Stat(p); err == nil && !fi.IsDir() && fi.Mode()&0o111 != 0 {
				fmt.Fprintln(c.out, p)
				if found = true; !o.has("a") || p == name {
					break
				}
			}
		}
		if !found {
			return errExit(1)
		}
		return nil
	})
}

// mountFlags are the options that are not the file system's own; a false one takes its bit away.
func mountFlags() map[string]struct {
	bit uintptr
	set bool
} {
	type f = struct {
		bit uintptr
		set bool
	}
	return map[string]f{
		"ro": {unix.MS_RDONLY, true}, "rw": {unix.MS_RDONLY, false}, "nosuid": {unix.MS_NOSUID, true}, "suid": {unix.MS_NOSUID, false},
		"nodev": {unix.MS_NODEV, true}, "dev": {unix.MS_NODEV, false}, "noexec": {unix.MS_NOEXEC, true}, "exec": {unix.MS_NOEXEC, false},
		"sync": {unix.MS_SYNCHRONOUS, true}, "remount": {unix.MS_REMOUNT, true}, "bind": {unix.MS_BIND, true},
		"rbind": {unix.MS_BIND | unix.MS_REC, true}, "noatime": {unix.MS_NOATIME, true}, "relatime": {unix.MS_RELATIME, true},
		"nodiratime": {unix.MS_NODIRATIME, true}, "private": {unix.MS_PRIVATE, true}, "rprivate": {unix.MS_PRIVATE | unix.MS_REC, true},
		"shared": {unix.MS_SHARED, true}, "rshared": {unix.MS_SHARED | unix.MS_REC, true}, "slave": {unix.MS_SLAVE, true},
		"rslave": {unix.MS_SLAVE | unix.MS_REC, true}, "defaults": {0, true},
	}
}

func mount(c *call) error {
	o, err := c.parse("t|types: o|options: r|read-only w v n bind rbind move make-private make-rprivate make-shared make-slave")
	if err != nil {
		return err
	}
	if len(o.rest) == 0 {
		all, err := mounts()
		if err != nil {
			return err
		}
		for _, m := range all {
			if t := o.val("t", ""); t == "" || t == m[2] {
				fmt.Fprintf(c.out, "%s on %s type %s (%s)\n", m[0], m[1], m[2], m[3])
			}
		}
		return nil
	}
	var flags uintptr
	var data []string
	known := mountFlags()
	for _, opt := range strings.Split(strings.Join(o.vals["o"], ","), ",") {
		if f, ok := known[opt]; ok && f.set {
			flags |= f.bit
		} else if ok {
			flags &^= f.bit
		} else if opt != "" {
			data = append(data, opt)
		}
	}
	for name, bit := range map[string]uintptr{"bind": unix.MS_BIND, "rbind": unix.MS_BIND | unix.MS_REC, "move": unix.MS_MOVE, "r": unix.MS_RDONLY,
		"make-private": unix.MS_PRIVATE, "make-rprivate": unix.MS_PRIVATE | unix.MS_REC, "make-shared": unix.MS_SHARED, "make-slave": unix.MS_SLAVE} {
		if o.has(name) {
			flags |= bit
		}
	}
	src, dst := "none", o.rest[0]
	if len(o.rest) > 1 {
		src, dst = o.rest[0], o.rest[1]
	}
	err = unix.Mount(src, dst, o.val("t", ""), flags, strings.Join(data, ","))
	if err == nil && flags&unix.MS_BIND != 0 && flags&unix.MS_RDONLY != 0 && flags&unix.MS_REMOUNT == 0 {
		// A bind mount takes its other flags only from a second call.
		err = unix.Mount("none", dst, "", flags|unix.MS_REMOUNT, "")
	}
	if err != nil {
		return &fs.PathError{Path: dst, Err: err}
	}
	return nil
}

func umount(c *call) error {
	o, err := c.parse("l|lazy f|force n")
	if err != nil {
		return err
	}
	if err := o.need(1); err != nil {
		return err
	}
	flags := 0
	if o.has("l") {
		flags |= unix.MNT_DETACH
	}
	if o.has("f") {
		flags |= unix.MNT_FORCE
	}
	return c.each(o.rest, func(name string) error {
		if err := unix.Unmount(name, flags); err != nil {
			return &fs.PathError{Path: name, Err: err}
		}
		return nil
	})
}

func tty(c *call) error {
	name, err := os.Readlink("/proc/self/fd/0")
	if _, terr := unix.IoctlGetTermios(0, unix.TCGETS); terr != nil || err != nil {
		fmt.Fprintln(c.out, "not a tty")
		return errExit(1)
	}
	fmt.Fprintln(c.out, name)
	return nil
}

func stty(c *call) error {
	t, err := unix.IoctlGetTermios(0, unix.TCGETS)
	if err != nil {
		return fmt.Errorf("standard input: %w", err)
	}
	args := c.args
	if len(args) == 0 || args[0] == "-a" {
		ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "rows %d; columns %d;\n", ws.Row, ws.Col)
		for _, f := range sttyFlags() {
			if *f.field(t)&f.bit == 0 {
				c.out.WriteByte('-')
			}
			c.out.WriteString(f.name + " ")
		}
		c.out.WriteByte('\n')
		return nil
	}
	for i := 0; i < len(args); i++ {
		switch a := args[i]; a {
		case "size":
			ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "%d %d\n", ws.Row, ws.Col)
		case "rows", "cols", "columns":
			ws, err := unix.IoctlGetWinsize(0, unix.TIOCGWINSZ)
			if err != nil {
				return err
			}
			if i++; i == len(args) {
				return errUsage(a + " needs a number")
			}
			n, err := strconv.ParseUint(args[i], 10, 16)
			if err != nil {
				return errUsage("invalid number " + args[i])
			}
			if a == "rows" {
				ws.Row = uint16(n)
			} else {
				ws.Col = uint16(n)
			}
			if err := unix.IoctlSetWinsize(0, unix.TIOCSWINSZ, ws); err != nil {
				return err
			}
		case "raw", "-cooked":
			t.Iflag &^= unix.BRKINT | unix.ICRNL | unix.INPCK | unix.ISTRIP | unix.IXON
			t.Oflag &^= unix.OPOST
			t.Lflag &^= unix.ICANON | unix.ISIG
			t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		case "sane", "cooked", "-raw":
			t.Iflag |= unix.BRKINT | unix.ICRNL | unix.IXON
			t.Oflag |= unix.OPOST | unix.ONLCR
			t.Lflag |= unix.ICANON | unix.ISIG | unix.ECHO | unix.ECHOE | unix.ECHOK | unix.IEXTEN
			t.Cc[unix.VEOF] = 4
		default:
			name, off := strings.CutPrefix(a, "-")
			found := false
			for _, f := range sttyFlags() {
				if f.name == name {
					found = true
					if *f.field(t) |= f.bit; off {
						*f.field(t) &^= f.bit
					}
				}
			}
			if !found {
				return errUsage("unknown setting " + a)
			}
		}
	}
	return unix.IoctlSetTermios(0, unix.TCSETSW, t)
}

type sttyFlag struct {
	name  string
	field func(*unix.Termios) *uint32
	bit   uint32
}

func sttyFlags() []sttyFlag {
	in := func(t *unix.Termios) *uint32 { return &t.Iflag }
	out := func(t *unix.Termios) *uint32 { return &t.Oflag }
	local := func(t *unix.Termios) *uint32 { return &t.Lflag }
	return []sttyFlag{
		{"icrnl", in, unix.ICRNL}, {"ixon", in, unix.IXON}, {"opost", out, unix.OPOST}, {"onlcr", out, unix.ONLCR}, {"isig", local, unix.ISIG},
		{"icanon", local, unix.ICANON}, {"iexten", local, unix.IEXTEN}, {"echo", local, unix.ECHO}, {"echoe", local, unix.ECHOE}, {"echok", local, unix.ECHOK},
	}
}

func dd(c *call) error {
	p := map[string]string{"bs": "512", "count": "", "skip": "0", "seek": "0", "if": "", "of": "", "conv": "", "status": "", "iflag": "", "oflag": "", "ibs": "", "obs": ""}
	for _, a := range c.args {
		k, v, ok := strings.Cut(a, "=")
		if _, known := p[k]; !ok || !known {
			return errUsage("unknown operand " + a)
		}
		p[k] = v
	}
	var n [4]int64
	if p["ibs"] != p["obs"] {
		return errUsage("ibs and obs that differ are not known; give bs")
	}
	if p["ibs"] != "" {
		p["bs"] = p["ibs"]
	}
	flag := map[string]bool{}
	for k, known := range map[string]string{"conv": "notrunc sync fsync fdatasync nocreat excl", "iflag": "fullblock count_bytes skip_bytes direct sync dsync nonblock noatime",
		"oflag": "append seek_bytes direct sync dsync nonblock", "status": "none noxfer progress"} {
		for f := range strings.SplitSeq(p[k], ",") {
			if f != "" && !slices.Contains(strings.Fields(known), f) {
				return errUsage("unknown " + k + "=" + f)
			}
			flag[k+" "+f] = true
		}
	}
	open := func(k string) (mode int) {
		for f, bit := range map[string]int{"append": os.O_APPEND, "direct": unix.O_DIRECT, "sync": unix.O_SYNC, "dsync": unix.O_DSYNC, "nonblock": unix.O_NONBLOCK, "noatime": unix.O_NOATIME} {
			if flag[k+" "+f] {
				mode |= bit
			}
		}
		return mode
	}
	for i, k := range []string{"bs", "count", "skip", "seek"} {
		if p[k] == "" {
			n[i] = -1
			continue
		}
		v, err := parseSize(p[k])
		if err != nil {
			return err
		}
		n[i] = v
	}
	bs, count, skip, seek := n[0], n[1], n[2], n[3]
	if bs < 1 || bs > 1<<30 {
		return errUsage("invalid block size")
	}
	// From here on these are bytes.
	if !flag["iflag skip_bytes"] {
		skip *= bs
	}
	if !flag["oflag seek_bytes"] {
		seek *= bs
	}
	if count >= 0 && !flag["iflag count_bytes"] {
		count *= bs
	}
	in, out := os.Stdin, os.Stdout
	var err error
	if p["if"] != "" {
		if in, err = os.OpenFile(p["if"], os.O_RDONLY|open("iflag"), 0); err != nil {
			return err
		}
		defer in.Close()
	}
	if p["of"] != "" {
		mode := os.O_WRONLY | os.O_CREATE | open("oflag")
		if flag["conv nocreat"] {
			mode &^= os.O_CREATE
		}
		if flag["conv excl"] {
			mode |= os.O_EXCL
		}
		if out, err = os.OpenFile(p["of"], mode, 0o666); err != nil {
			return err
		}
		defer out.Close()
		if st, err := out.Stat(); err == nil && st.Mode().IsRegular() && !flag["conv notrunc"] {
			if err := out.Truncate(seek); err != nil {
				return err
			}
		}
	}
	if skip > 0 {
		if _, err := in.Seek(skip, io.SeekCurrent); err != nil {
			if _, err := io.CopyN(io.Discard, in, skip); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
	}
	if seek > 0 {
		if _, err := out.Seek(seek, io.SeekStart); err != nil {
			return err
		}
	}
	buf := make([]byte, bs)
	var full, part, total int64
	start := time.Now()
	for left := count; count < 0 || left > 0; {
		block := buf
		if flag["iflag count_bytes"] && left < bs {
			block = buf[:max(left, 0)]
			if count < 0 {
				block = buf
			}
		}
		var k int
		if flag["iflag fullblock"] {
			k, err = io.ReadFull(in, block)
		} else {
			k, err = in.Read(block)
		}
		// A short block is one of count, too, unless bytes are counted.
		if left -= bs; flag["iflag count_bytes"] {
			left += bs - int64(k)
		}
		if k > 0 {
			if int64(k) == bs {
				full++
			} else {
				part++
			}
			block := buf[:k]
			if flag["conv sync"] && int64(k) < bs {
				clear(buf[k:])
				block = buf
			}
			if _, err := out.Write(block); err != nil {
				return err
			}
			total += int64(len(block))
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if flag["conv fsync"] || flag["conv fdatasync"] {
		if err := out.Sync(); err != nil {
			return err
		}
	}
	if p["status"] != "none" {
		fmt.Fprintf(c.err, "%d+%d records in\n%d+%d records out\n", full, part, full, part)
		if p["status"] != "noxfer" {
			sec := max(time.Since(start).Seconds(), 1e-9)
			fmt.Fprintf(c.err, "%d bytes (%s) copied, %.6g s, %s/s\n", total, human(total), sec, human(int64(float64(total)/sec)))
		}
	}
	return nil
}
