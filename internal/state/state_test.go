
// The reserve is for boxes that end, and not for what a guest can have recorded at any time.
func TestEnding(t *testing.T) {
	for _, tc := range []struct {
		from, to Phase
		want     bool
	}{{Running, Running, false}, {Created, Starting, false}, {Starting, Running, true}, {Running, Stopping, true}, {Stopped, Stopped, true}, {Removing, Removing, true}} {
		if got := ending(tc.from, tc.to); got != tc.want {
			t.Errorf("%s to %s: %v", tc.from, tc.to, got)
		}
	}
}
