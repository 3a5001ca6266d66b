package userland

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// account is one line of /etc/passwd.
type account struct {
	name     string
	uid, gid int
	home     string
}

// table reads a file such as /etc/passwd, in fields. A missing one has no lines.
func table(path string) [][]string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var rows [][]string
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		rows = append(rows, strings.Split(sc.Text(), ":"))
	}
	return rows
}

func lookupUser(name string) (account, error) {
	n, numErr := strconv.Atoi(name)
	for _, r := range table("/etc/passwd") {
		if len(r) < 6 {
			continue
		}
		uid, err1 := strconv.Atoi(r[2])
		gid, err2 := strconv.Atoi(r[3])
		if err1 == nil && err2 == nil && (r[0] == name || numErr == nil && uid == n) {
			return account{r[0], uid, gid, r[5]}, nil
		}
	}
	if numErr == nil {
		return account{name: name, uid: n, gid: n}, nil
	}
	return account{}, fmt.Errorf("no such user: %s", name)
}

func lookupGroup(name string) (int, error) {
	for _, r := range table("/etc/group") {
		if len(r) >= 3 && r[0] == name {
			return strconv.Atoi(r[2])
		}
	}
	if n, err := strconv.Atoi(name); err == nil {
		return n, nil
	}
	return 0, fmt.Errorf("no such group: %s", name)
}

// ids turns numbers into names, reading the tables once.
type ids struct{ users, groups map[string]string }

func newIDs() ids {
	load := func(path string) map[string]string {
		m := map[string]string{}
		for _, r := range table(path) {
			if len(r) >= 3 {
				if _, ok := m[r[2]]; !ok {
					m[r[2]] = r[0]
				}
			}
		}
		return m
	}
	return ids{load("/etc/passwd"), load("/etc/group")}
}

func (x ids) user(n uint32) string  { return named(x.users, n) }
func (x ids) group(n uint32) string { return named(x.groups, n) }

func named(m map[string]string, n uint32) string {
	s := strconv.FormatUint(uint64(n), 10)
	if name, ok := m[s]; ok {
		return name
	}
	return s
}

func id(c *call) error {
	o, err := c.parse("u|user g|group G|groups n|name r|real")
	if err != nil {
		return err
	}
	names := newIDs()
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	var groups []uint32
	if len(o.rest) > 0 {
		u, err := lookupUser(o.rest[0])
		if err != nil {
			return err
		}
		uid, gid = uint32(u.uid), uint32(u.gid)
		for _, r := range table("/etc/group") {
			if len(r) >= 4 && slices.Contains(strings.Split(r[3], ","), u.name) {
				if n, err := strconv.Atoi(r[2]); err == nil {
					groups = append(groups, uint32(n))
				}
			}
		}
	} else {
		list, err := os.Getgroups()
		if err != nil {
			return err
		}
		for _, g := range list {
			groups = append(groups, uint32(g))
		}
	}
	if !slices.Contains(groups, gid) {
		groups = append([]uint32{gid}, groups...)
	}
	show := func(n uint32, name func(uint32) string) string {
		if o.has("n") {
			return name(n)
		}
		return strconv.FormatUint(uint64(n), 10)
	}
	switch {
	case o.has("u"):
		fmt.Fprintln(c.out, show(uid, names.user))
	case o.has("g"):
		fmt.Fprintln(c.out, show(gid, names.group))
	case o.has("G"):
		var all []string
		for _, g := range groups {
			all = append(all, show(g, names.group))
		}
		fmt.Fprintln(c.out, strings.Join(all, " "))
	default:
		both := func(n uint32, m map[string]string) string {
			s := strconv.FormatUint(uint64(n), 10)
			if name, ok := m[s]; ok {
				s += "(" + name + ")"
			}
			return s
		}
		var all []string
		for _, g := range groups {
			all = append(all, both(g, names.groups))
		}
		fmt.Fprintf(c.out, "uid=%s gid=%s groups=%s\n", both(uid, names.users), both(gid, names.groups), strings.Join(all, ","))
	}
	return nil
}

func whoami(c *call) error {
	fmt.Fprintln(c.out, newIDs().user(uint32(os.Geteuid())))
	return nil
}
