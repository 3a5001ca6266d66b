package cgroup

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMounts(t *testing.T) {
	const info = `22 1 0:20 / /proc rw - proc proc rw
30 22 0:27 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 30 0:31 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
40 30 0:37 / /sys/fs/a\040b rw,relatime - cgroup2 cgroup2 rw
garbage
`
	got, err := parseMounts(strings.NewReader(info))
	if err != nil {
		t.Fatal(err)
	}
	want := []mount{
		{dir: "/sys/fs/cgroup/memory", ctrls: []string{"rw", "memory"}},
		{dir: "/sys/fs/cgroup/cpu,cpuacct", ctrls: []string{"rw", "cpu", "cpuacct"}},
		{dir: "/sys/fs/a b", v2: true},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(mount{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseOwn(t *testing.T) {
	got := parseOwn("4:memory:/a:b\n1:cpu,cpuacct:/c\n9:name=systemd:/\n0::/d\nx\n")
	want := map[string]string{"memory": "/a:b", "cpu": "/c", "cpuacct": "/c", "name=systemd": "/", "": "/d"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func FuzzParseMounts(f *testing.F) {
	f.Add("34 30 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
	f.Add("40 30 0:37 / /a\\040b rw - cgroup2 cgroup2 rw")
	f.Fuzz(func(t *testing.T, s string) {
		ms, _ := parseMounts(strings.NewReader(s))
		for _, m := range ms {
			if m.v2 == (m.ctrls != nil) {
				t.Errorf("%+v is of both versions, or of none", m)
			}
		}
	})
}

func FuzzParseOwn(f *testing.F) {
	f.Add("4:memory:/a:b\n0::/d\n")
	f.Fuzz(func(t *testing.T, s string) { parseOwn(s); field(s, "populated") })
}

func FuzzRecord(f *testing.F) {
	f.Add("/sys/fs/cgroup/unified/coffer/coffer-a", "memory", "/sys/fs/cgroup/memory/coffer/coffer-a")
	f.Fuzz(func(t *testing.T, unified, c, v1 string) {
		r := Record{Unified: unified, V1: map[string]string{c: v1}}
		if r.check() != nil {
			return
		}
		for _, p := range []string{unified, v1} {
			if p != "" && !strings.Contains(p, "/"+parent+"/") {
				t.Errorf("check() lets %q through", p)
			}
		}
	})
}
