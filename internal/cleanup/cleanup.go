// Package cleanup undoes the finished steps of a creation that failed half way. It is for a single goroutine and a single
// creation; it is no replacement for defer where the undoing is unconditional.
//
//	undo := cleanup.Make()
//	defer undo.Run()
//	…make a thing…
//	undo.Add(func() { …take it away again… })
//	…
//	undo.Release() // all made: keep everything
package cleanup

// Cleanup is a stack of undo steps. The zero value is empty and ready.
type Cleanup struct {
	steps []func()
}

// Make returns a stack that holds the given steps, the last to be undone first.
func Make(steps ...func()) *Cleanup {
	return &Cleanup{steps: steps}
}

// Add puts a step on top of the stack.
func (c *Cleanup) Add(step func()) {
	c.steps = append(c.steps, step)
}

// Run undoes every step, newest first, each once, even when one of them panics: a half-undone creation is worse than a
// late panic.
func (c *Cleanup) Run() {
	for len(c.steps) > 0 {
		last := len(c.steps) - 1
		step := c.steps[last]
		c.steps = c.steps[:last]
		func() {
			defer func() {
				if p := recover(); p != nil {
					c.Run()
					panic(p)
				}
			}()
			step()
		}()
	}
}

// Release forgets every step, because the creation succeeded. It returns a function that undoes them after all, for a caller
// that takes the duty over.
func (c *Cleanup) Release() func() {
	moved := &Cleanup{steps: c.steps}
	c.steps = nil
	return moved.Run
}
