package image

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestNewConfig(t *testing.T) {
	env := func(e ...string) v1.Config { return v1.Config{Env: e} }
	labels := func(kv ...string) v1.Config {
		m := map[string]string{}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return v1.Config{Labels: m}
	}
	for _, tc := range []struct {
		changes string // lines
		want    v1.Config
		health  *Healthcheck
		err     string
	}{
		{changes: "ENV A=1", want: env("A=1")},
		{changes: "ENV A=1 B=2", want: env("A=1", "B=2")},
		{changes: `ENV A="x y" B='z "w"'  C=a\ b D="q\"\$\n"`, want: env("A=x y", `B=z "w"`, "C=a b", `D=q"$\n`)},
		{changes: `ENV A=x"y z"w`, want: env("A=xy zw")},
		{changes: "ENV A=1\nENV B=2\nENV A=3", want: env("B=2", "A=3")},
		{changes: "ENV A one  two", want: env("A=one  two")},
		{changes: `ENV A "one two"`, want: env("A=one two")},
		{changes: "env\tA=1\t B=2 ", want: env("A=1", "B=2")},
		{changes: "ENV A=", want: env("A=")},
		{changes: "ENV A=b=c", want: env("A=b=c")},
		{changes: `ENV A=\`, want: env(`A=\`)},
		{changes: "ENV A=1 B", err: `"B" has no value`},
		{changes: "ENV A", err: `"A" has no value`},
		{changes: "ENV =x", err: "empty"},
		{changes: `ENV A="x`, err: "no end"},
		{changes: `ENV A=it's`, err: "no end"},
		{changes: `LABEL a=1 "b c"="d e"`, want: labels("a", "1", "b c", "d e")},
		{changes: "LABEL a some words", want: labels("a", "some words")},
		{changes: `CMD ["a","b c"]`, want: v1.Config{Cmd: []string{"a", "b c"}}},
		{changes: "CMD [ -f /x ] && y", want: v1.Config{Cmd: []string{"/bin/sh", "-c", "[ -f /x ] && y"}}},
		{changes: "CMD\techo  hi", want: v1.Config{Cmd: []string{"/bin/sh", "-c", "echo  hi"}}},
		{changes: "CMD [1]", err: "strings"},
		{changes: `ENTRYPOINT ["/x"]`, want: v1.Config{Entrypoint: []string{"/x"}}},
		{changes: `VOLUME ["/a b","/c"]`, want: v1.Config{Volumes: map[string]struct{}{"/a b": {}, "/c": {}}}},
		{changes: "VOLUME /a  /b", want: v1.Config{Volumes: map[string]struct{}{"/a": {}, "/b": {}}}},
		{changes: "EXPOSE 80 443/tcp", want: v1.Config{ExposedPorts: map[string]struct{}{"80/tcp": {}, "443/tcp": {}}}},
		{changes: "USER a:b\nWORKDIR /a b\nSTOPSIGNAL 9", want: v1.Config{User: "a:b", WorkingDir: "/a b", StopSignal: "9"}},
		{changes: "HEALTHCHECK NONE", health: &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"NONE"}}}},
		{changes: `HEALTHCHECK CMD ["a","b c"]`, health: &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD", "a", "b c"}}}},
		{
			changes: "healthcheck --interval=1m30s --timeout=5s\t--start-period=2s --start-interval=1ms --retries=4 cmd curl  -f x || exit 1",
			health: &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD-SHELL", "curl  -f x || exit 1"}, Interval: 90 * time.Second,
				Timeout: 5 * time.Second, StartPeriod: 2 * time.Second, Retries: 4}, StartInterval: time.Millisecond},
		},
		{changes: "HEALTHCHECK --interval=0 --retries=0 CMD x", health: &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"CMD-SHELL", "x"}}}},
		{changes: "HEALTHCHECK CMD x\nHEALTHCHECK NONE", health: &Healthcheck{HealthConfig: v1.HealthConfig{Test: []string{"NONE"}}}},
		{changes: "HEALTHCHECK NONE x", err: "nothing more"},
		{changes: "HEALTHCHECK CMD", err: "command is missing"},
		{changes: "HEALTHCHECK CMD []", err: "command is missing"},
		{changes: "HEALTHCHECK --interval=5s", err: "use HEALTHCHECK [OPTIONS] CMD"},
		{changes: "HEALTHCHECK x", err: `"x" is not understood`},
		{changes: "HEALTHCHECK --interval=1us CMD x", err: "at least 1ms"},
		{changes: "HEALTHCHECK --timeout=-5s CMD x", err: "at least 1ms"},
		{changes: "HEALTHCHECK --start-period=5 CMD x", err: "a duration such as 30s"},
		{changes: "HEALTHCHECK --retries=-1 CMD x", err: "not negative"},
		{changes: "HEALTHCHECK --retries CMD x", err: "not negative"},
		{changes: "HEALTHCHECK --colour=red CMD x", err: "unknown option"},
		{changes: "RUN x", err: "not understood"},
		{changes: "CMD", err: "not understood"},
		{changes: "", err: "not understood"},
	} {
		got, err := NewConfig(strings.Split(tc.changes, "\n"))
		if (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%q: error %v, want %q", tc.changes, err, tc.err)
		}
		if diff := cmp.Diff(Config{Config: tc.want, Healthcheck: tc.health}, got); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tc.changes, diff)
		}
	}
}

func FuzzChange(f *testing.F) {
	f.Add(`ENV A="x y" B='z' C=\`)
	f.Add(`HEALTHCHECK --interval=5s --retries=2 CMD ["a"]`)
	f.Fuzz(func(t *testing.T, line string) {
		c, err := NewConfig([]string{line})
		if err != nil {
			return
		}
		for _, kv := range c.Env {
			if name, _, ok := strings.Cut(kv, "="); !ok || name == "" {
				t.Errorf("%q gives %q", line, c.Env)
			}
		}
		if h := c.Healthcheck; h != nil && (len(h.Test) == 0 || h.Retries < 0 || min(h.Interval, h.Timeout, h.StartPeriod, h.StartInterval) < 0) {
			t.Errorf("%q gives %+v", line, h)
		}
	})
}
