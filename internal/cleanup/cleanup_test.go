package cleanup_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/cleanup"
)

func TestRunUndoesNewestFirstAndOnce(t *testing.T) {
	var got []string
	add := func(s string) func() { return func() { got = append(got, s) } }
	c := cleanup.Make(add("a"))
	c.Add(add("b"))
	c.Add(add("c"))
	c.Run()
	c.Run()
	if diff := cmp.Diff([]string{"c", "b", "a"}, got); diff != "" {
		t.Errorf("order (-want +got):\n%s", diff)
	}
}

func TestReleaseKeepsEverything(t *testing.T) {
	n := 0
	c := cleanup.Make(func() { n++ })
	undo := c.Release()
	c.Run()
	if n != 0 {
		t.Fatal("a released step was undone")
	}
	undo()
	undo()
	if n != 1 {
		t.Fatalf("the released steps ran %d times, want 1", n)
	}
}

func TestPanicDoesNotStopTheRest(t *testing.T) {
	n := 0
	var c cleanup.Cleanup
	c.Add(func() { n++ })
	c.Add(func() { panic("step") })
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed")
			}
		}()
		c.Run()
	}()
	if n != 1 {
		t.Errorf("the older step ran %d times, want 1", n)
	}
}
