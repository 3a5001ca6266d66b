package agent

import (
	"bufio"
	"bytes"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/wire"
)

// identity is who a process runs as.
type identity struct {
	uid, gid uint32
	groups   []uint32
	home     string
	name     string
}

// userDB looks users up in the box's own files. It keeps their text while the files stay as they are: an exec should not read
// them again through a file server.
type userDB struct {
	mu            sync.Mutex
	passwd, group cachedFile
}

type cachedFile struct {
	key  [4]int64
	data []byte
}

// maxUserFile bounds what a hostile image can make the agent read. Lines beyond it do not count.
const maxUserFile = 4 << 20

func (f *cachedFile) read(path string) []byte {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		*f = cachedFile{}
		return nil
	}
	key := [4]int64{int64(st.Ino), st.Size, st.Mtim.Nano(), st.Ctim.Nano()}
	if f.data != nil && f.key == key {
		return f.data
	}
	// Not blocking: the image may have put something else there in the meantime.
	fd, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer fd.Close()
	data, _ := io.ReadAll(io.LimitReader(fd, maxUserFile))
	*f = cachedFile{key, data}
	return data
}

// lookup resolves "user[:group]", names or numbers; empty is root. A number needs no entry, a name does.
func (db *userDB) lookup(user string) (identity, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	return lookupUser(user, db.passwd.read("/etc/passwd"), db.group.read("/etc/group"))
}

func lookupUser(user string, passwd, group []byte) (identity, error) {
	name, grp, hasGroup := strings.Cut(user, ":")
	if name == "" {
		name = "0"
	}
	id := identity{home: "/"}
	num, isNum := parseID(name)
	found := false
	eachLine(passwd, 7, func(f []string) bool {
		uid, ok := parseID(f[2])
		if !ok || !(f[0] == name || isNum && uid == num) {
			return true
		}
		gid, _ := parseID(f[3])
		id = identity{uid: uid, gid: gid, home: f[5], name: f[0]}
		found = true
		return false
	})
	if !found {
		if !isNum {
			return id, wire.Errorf(wire.CodeNoUser, "no user %q in the box's /etc/passwd; give a number, or add the user to the image", name)
		}
		id.uid = num
		if num == 0 {
			id.home = "/root"
		}
	}
	if id.home == "" {
		id.home = "/"
	}
	if hasGroup && grp != "" {
		gnum, isNum := parseID(grp)
		found := false
		eachLine(group, 3, func(f []string) bool {
			gid, ok := parseID(f[2])
			if ok && (f[0] == grp || isNum && gid == gnum) {
				id.gid, found = gid, true
			}
			return !found
		})
		if !found {
			if !isNum {
				return id, wire.Errorf(wire.CodeNoUser, "no group %q in the box's /etc/group; give a number, or add the group to the image", grp)
			}
			id.gid = gnum
		}
		// A group that was asked for is the only one, as with other container tools.
		return id, nil
	}
	if id.name == "" {
		return id, nil
	}
	eachLine(group, 4, func(f []string) bool {
		gid, ok := parseID(f[2])
		for m := range strings.SplitSeq(f[3], ",") {
			if ok && m == id.name && gid != id.gid && len(id.groups) < 1024 {
				id.groups = append(id.groups, gid)
				break
			}
		}
		return true
	})
	return id, nil
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	// The last number means "no change" to the kernel's calls: a process that asks for it would stay root.
	return uint32(n), err == nil && n != 1<<32-1
}

// eachLine calls f with the fields of every line that has enough of them, until it returns false.
func eachLine(data []byte, fields int, f func([]string) bool) {
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		parts := strings.Split(line, ":")
		if len(parts) < fields {
			continue
		}
		if !f(parts) {
			return
		}
	}
}

// nameOf is the name of a user number, or empty.
func (db *userDB) nameOf(uid uint32) string {
	db.mu.Lock()
	defer db.mu.Unlock()
	name := ""
	eachLine(db.passwd.read("/etc/passwd"), 7, func(f []string) bool {
		if n, ok := parseID(f[2]); ok && n == uid {
			name = f[0]
		}
		return name == ""
	})
	return name
}
