package agent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/wire"
)

const (
	testPasswd = "# users\nroot:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\nbad:x:zz:1:::\n12:x:2000:2000::/odd:\nhomeless:x:3:3:::\nshort:x\n"
	testGroup  = "root:x:0:root\nann:x:1001:\naudio:x:29:bob,ann\nvideo:x:44:ann\nbroken\n"
)

func TestLookupUser(t *testing.T) {
	for user, want := range map[string]identity{
		"":           {home: "/root", name: "root"},
		"0":          {home: "/root", name: "root"},
		"ann":        {uid: 1000, gid: 1001, groups: []uint32{29, 44}, home: "/home/ann", name: "ann"},
		"1000":       {uid: 1000, gid: 1001, groups: []uint32{29, 44}, home: "/home/ann", name: "ann"},
		"ann:video":  {uid: 1000, gid: 44, home: "/home/ann", name: "ann"},
		"ann:7":      {uid: 1000, gid: 7, home: "/home/ann", name: "ann"},
		"4321":       {uid: 4321, home: "/"},
		"4321:audio": {uid: 4321, gid: 29, home: "/"},
		"12":         {uid: 2000, gid: 2000, home: "/odd", name: "12"},
		"homeless":   {uid: 3, gid: 3, home: "/", name: "homeless"},
		":44":        {gid: 44, home: "/root", name: "root"},
	} {
		got, err := lookupUser(user, []byte(testPasswd), []byte(testGroup))
		if d := cmp.Diff(want, got, cmp.AllowUnexported(identity{})); d != "" || err != nil {
			t.Errorf("%q: %v %s", user, err, d)
		}
	}
	for _, user := range []string{"nobody", "ann:nogroup", "bad", "-1", "4294967295", "0:4294967295", "short"} {
		if _, err := lookupUser(user, []byte(testPasswd), []byte(testGroup)); !errors.Is(err, wire.ErrNoUser) {
			t.Errorf("%q: %v", user, err)
		}
	}
}

func TestParseStat(t *testing.T) {
	line := "42 (a) S 1 (b) R 7 8 9 0 -1 4194304 1 2 3 4 55 66 0 0 20 0 1 0 777 8888 99 18446744073709551615\n"
	got, err := parseStat(line)
	want := procStat{comm: "a) S 1 (b", state: 'R', ppid: 7, sid: 9, utime: 55, stime: 66, start: 777, vsize: 8888, rss: 99}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(procStat{})); d != "" || err != nil {
		t.Fatal(err, d)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add("1 (x) S 1 1 1")
	f.Fuzz(func(t *testing.T, line string) { parseStat(line) })
}

func FuzzLookupUser(f *testing.F) {
	f.Add("ann:video", testPasswd, testGroup)
	f.Fuzz(func(t *testing.T, user, passwd, group string) { lookupUser(user, []byte(passwd), []byte(group)) })
}

// TestWorkDir: only the main process' directory is made where it is missing.
func TestWorkDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "one")
	if _, err := workDir(dir, false); !errors.Is(err, wire.ErrBadDir) {
		t.Errorf("missing: %v", err)
	}
	if got, err := workDir(dir, true); err != nil || got != dir {
		t.Errorf("made: %q, %v", got, err)
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		t.Errorf("after it was made: %v", err)
	}
}
