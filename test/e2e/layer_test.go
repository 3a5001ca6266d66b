package e2e

import "testing"

// TestRenameToOwnLink: what any user of a box may do to two names of one file does not end the box.
func TestRenameToOwnLink(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "base", "sleep", "1000")
	h.run("exec", "b", "sh", "-c", "cd /root && mkdir d && echo hello >a && ln a b && ln a d/c")
	for _, to := range []string{"b", "d/c"} {
		// Some programs rename, as here, some remove the old name; neither may lose the file.
		h.try("exec", "b", "mv", "/root/a", "/root/"+to)
		if got := h.run("exec", "b", "cat", "/root/a", "/root/"+to); got != "hello\nhello" {
			t.Errorf("after mv a %s: %q", to, got)
		}
	}
	if got := h.run("exec", "b", "sh", "-c", "cd /root && mv a e && rm b d/c && cat e && ls"); got != "hello\nd\ne" {
		t.Errorf("at the end: %q", got)
	}
	h.run("rm", "-f", "b")
}
