//go:build linux

package jail

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSwitches: every setting that forbids user namespaces is recognised, for whom it does, with the way to change it.
func TestSwitches(t *testing.T) {
	for _, c := range []struct {
		path, value string
		root, user  bool // blocking for
		fix         string
	}{
		{"user/max_user_namespaces", "0", true, true, "user.max_user_namespaces="},
		{"user/max_user_namespaces", "1000", false, false, ""},
		{"kernel/unprivileged_userns_clone", "0", false, true, "kernel.unprivileged_userns_clone=1"},
		{"kernel/unprivileged_userns_clone", "1", false, false, ""},
		{"kernel/apparmor_restrict_unprivileged_userns", "1", false, true, "kernel.apparmor_restrict_unprivileged_userns=0"},
		{"kernel/apparmor_restrict_unprivileged_userns", "0", false, false, ""},
		{"kernel/unprivileged_userns_clone", "nonsense", false, false, ""},
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, c.path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(c.value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, root := range []bool{true, false} {
			want := c.user
			if root {
				want = c.root
			}
			blocking := false
			for _, s := range switchesIn(dir, root) {
				blocking = blocking || s.Blocking
				if s.Blocking && (!strings.Contains(s.Reason, c.path+"="+c.value) || !strings.Contains(s.Fix, c.fix)) {
					t.Errorf("%s=%s: reason %q, fix %q", c.path, c.value, s.Reason, s.Fix)
				}
			}
			if blocking != want {
				t.Errorf("%s=%s, root %v: blocking is %v", c.path, c.value, root, blocking)
			}
		}
	}
}
