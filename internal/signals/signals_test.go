package signals

import "testing"

func TestParse(t *testing.T) {
	for in, want := range map[string]int{
		"9": 9, "64": 64, "TERM": 15, "SIGTERM": 15, "sigkill": 9, "RTMIN": 34, "SIGRTMIN": 34, "SIGRTMIN+3": 37, "rtmin+30": 64,
		"SIGRTMAX": 64, "RTMAX-14": 50, "SIGRTMAX-30": 34,
		"": 0, "0": 0, "65": 0, "-1": 0, "NOPE": 0, "SIGSIGTERM": 0, "RTMIN-1": 0, "RTMIN+31": 0, "RTMAX+1": 0, "RTMAX-31": 0, "RTMIN3": 0,
		"RTMIN+": 0, "RTMIN++3": 0, "RTMIN+x": 0, "SIGRTMINX": 0,
	} {
		n, err := Parse(in)
		if n != want || (err == nil) != (want != 0) {
			t.Errorf("%q is %d, %v; want %d", in, n, err, want)
		}
	}
	if Name(15) != "SIGTERM" || Name(37) != "37" {
		t.Errorf("names: %s, %s", Name(15), Name(37))
	}
}
