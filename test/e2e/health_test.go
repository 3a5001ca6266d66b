package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// health waits until the checks say this of a box.
func (h *home) health(box, want string) {
	h.t.Helper()
	until(h.t, box+" is "+want, func() bool { return h.field(box, "{{with .Health}}{{.Status}}{{end}}") == want })
}

// TestHealth: a box turns healthy, unhealthy and healthy again, all who show it agree, and each run begins anew.
func TestHealth(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--health-cmd", "test ! -e /root/sick || { echo is sick; exit 3; }", "--health-interval", "100ms",
		"--health-retries", "2", "base", "sleep", "1000")
	h.run("run", "-d", "--name", "unchecked", "base", "sleep", "1000")
	h.health("b", "healthy")
	h.run("exec", "b", "touch", "/root/sick")
	h.health("b", "unhealthy")
	until(t, "every result is the same", func() bool { return h.field("b", "{{range .Health.Log}}{{.ExitCode}}{{end}}") == "33333" })
	if out := h.field("b", "{{ge .Health.FailingStreak 5}} {{with index .Health.Log 4}}{{.Output}} {{.End.After .Start}}{{end}}"); out != "true is sick\n true" {
		t.Errorf("inspect: %q", out)
	}
	until(t, "ps says so", func() bool {
		return h.run("ps", "--filter", "health=unhealthy", "--format", "{{.Name}} {{.Health}}") == "b unhealthy"
	})
	if out := h.run("ps", "--filter", "name=b"); !strings.Contains(out, " (unhealthy) ") {
		t.Errorf("ps: %s", out)
	}
	if out := h.run("ps", "--filter", "health=none", "--format", "{{.Name}}"); out != "unchecked" {
		t.Errorf("without a check: %s", out)
	}
	h.run("exec", "b", "rm", "/root/sick")
	h.health("b", "healthy")
	until(t, "events tell of it", func() bool { return h.healthEvents("b") == "healthy unhealthy healthy" })
	h.run("stop", "b")
	if out := h.field("b", "{{.Health}} {{.HealthCheck.Retries}}"); out != "<nil> 2" {
		t.Errorf("stopped: %s", out)
	}
	if out := h.run("ps", "-a", "--filter", "name=b"); strings.Contains(out, "health") {
		t.Errorf("stopped: %s", out)
	}
}

// healthEvents are the statuses that the events tell, one after the other.
func (h *home) healthEvents(box string) string {
	h.t.Helper()
	var out []string
	for line := range strings.Lines(h.run("events", "--no-follow", "--format", "json")) {
		var e struct {
			Name, Action string
			Attrs        map[string]string
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			h.t.Fatal(err)
		}
		if e.Name == box && e.Action == "health_status" {
			out = append(out, e.Attrs["status"])
		}
	}
	return strings.Join(out, " ")
}

// TestHealthOfEachRun: a box that is started again knows nothing of its former health.
func TestHealthOfEachRun(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--restart", "always", "--health-cmd", "test -e /root/well", "--health-interval", "50ms", "--health-start-interval", "50ms",
		"--health-start-period", "1h", "base", "sh", "-c", "while [ ! -e /root/end ]; do sleep 0.05; done; rm /root/end")
	for how, again := range map[string]func(){
		"by a command":  func() { h.run("restart", "-t", "0", "b") },
		"by its policy": func() { h.try("exec", "b", "touch", "/root/end") },
	} {
		h.run("exec", "b", "touch", "/root/well")
		h.health("b", "healthy")
		h.run("exec", "b", "rm", "/root/well")
		generation := h.field("b", "{{.Generation}}")
		again()
		// Failures do not count before the first success: it would be healthy or unhealthy, if it knew of that.
		until(t, "it runs again and was checked", func() bool {
			return h.field("b", "{{.Generation}}") != generation && h.field("b", "{{with .Health}}{{len .Log}}{{end}}") == "5"
		})
		if out := h.field("b", "{{.Health.Status}} {{.Health.FailingStreak}} {{(index .Health.Log 0).Start.After .Started}}"); out != "starting 0 true" {
			t.Errorf("started again %s it is %s", how, out)
		}
		if out := h.run("ps", "--format", "{{.Health}}"); out != "starting" {
			t.Errorf("started again %s it is %s in a list", how, out)
		}
	}
}

// once makes a check run soon, and then not again.
func once(check string, more ...string) []string {
	return append([]string{"--health-cmd", check, "--health-start-period", "10ms", "--health-start-interval", "100ms", "--health-interval", "1h", "--health-retries", "1"}, more...)
}

// TestHungCheck: a check that does not end is killed with all that it has started, and what it floods its output with is kept nowhere.
func TestHungCheck(t *testing.T) {
	h := newHome(t)
	check := "trap '' TERM HUP; (trap '' TERM HUP; while :; do sleep 1000; done) & cat /dev/zero & cat /dev/zero >&2"
	h.run(append(append([]string{"run", "-d", "--name", "b"}, once(check, "--health-timeout", "2s")...), "base", "sleep", "1000")...)
	before := h.shimMemory("b")
	h.health("b", "unhealthy")
	if out := h.field("b", "{{with index .Health.Log 0}}{{.ExitCode}} {{lt (len .Output) 10000}} {{slice .Output 0 35}}{{end}}"); out != "-1 true killed, for it had not ended after" {
		t.Errorf("its result: %q", out)
	}
	if out := h.run("top", "--format", `{{join .Command " "}}`, "b"); out != "sleep 1000" {
		t.Errorf("what runs after the check was killed:\n%s", out)
	}
	if more := h.shimMemory("b") - before; more > 32<<10 {
		t.Errorf("the supervisor has grown by %d KiB", more)
	}
}

// shimMemory is what a box's supervisor has in memory, in KiB.
func (h *home) shimMemory(box string) int {
	h.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%s/status", h.field(box, "{{.ShimPID}}")))
	if err != nil {
		h.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	n, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

// TestCheckAndEnd: a check that does not end keeps no box from ending, and one that is to stop is not checked any more.
func TestCheckAndEnd(t *testing.T) {
	h := newHome(t)
	hung := once("echo $$ > /root/check; sleep 1000", "--health-timeout", "1h")
	checked := func(box string) {
		t.Helper()
		until(t, "a check runs", func() bool { _, code := h.try("exec", box, "test", "-s", "/root/check"); return code == 0 })
	}
	h.run(append(append([]string{"run", "-d", "--name", "ends"}, hung...), "base", "sh", "-c", "while [ ! -e /root/end ]; do sleep 0.05; done; exit 3")...)
	checked("ends")
	h.try("exec", "ends", "touch", "/root/end") // the end may be faster than its answer
	if out := h.run("wait", "ends"); out != "3" {
		t.Errorf("it ended with %s", out)
	}
	// This one ends when the check has: it is ended first.
	h.run(append(append([]string{"run", "-d", "--name", "stops", "--stop-timeout", "100"}, hung...), "base", "sh", "-c",
		"trap 'while kill -0 $(cat /root/check) 2>/dev/null; do sleep 0.05; done; exit 4' TERM; while :; do sleep 0.05; done")...)
	checked("stops")
	begun := time.Now()
	h.run("stop", "stops")
	if out := h.field("stops", "{{.ExitCode}}"); out != "4" {
		t.Errorf("after %v it was stopped with %s", time.Since(begun), out)
	}
	// And no other is begun.
	h.run("run", "-d", "--name", "busy", "--health-cmd", "echo >> /root/checks", "--health-interval", "10ms", "base", "sh", "-c",
		"trap 'wc -l < /root/checks; sleep 1; wc -l < /root/checks; exit' TERM; while :; do sleep 0.05; done")
	h.health("busy", "healthy")
	h.run("stop", "busy")
	var first, second int
	if _, err := fmt.Sscan(h.run("logs", "busy"), &first, &second); err != nil || first == 0 || second > first+1 {
		t.Errorf("checks before and after the stop: %d, %d, %v", first, second, err)
	}
	for _, box := range []string{"ends", "stops", "busy"} {
		if out := h.healthEvents(box); strings.Contains(out, "unhealthy") {
			t.Errorf("%s: its end counts: %s", box, out)
		}
	}
	h.noneLeft("after stop")
}

// TestHealthOfAStoppedAgent: a box that stops its own agent, with which no check can be run any more, does not go on to look healthy.
func TestHealthOfAStoppedAgent(t *testing.T) {
	h := newHome(t)
	h.run("run", "-d", "--name", "b", "--health-cmd", "true", "--health-interval", "100ms", "--health-timeout", "100ms", "--health-retries", "1", "base",
		"sh", "-c", "while [ ! -e /root/stop ]; do sleep 0.05; done; kill -STOP 1; sleep 1000")
	h.health("b", "healthy")
	touch := h.started("exec", "b", "sh", "-c", "echo on; touch /root/stop") // it may get no answer
	h.health("b", "unhealthy")
	h.run("rm", "-f", "b")
	_ = touch.Wait()
	h.noneLeft("after rm -f")
}
