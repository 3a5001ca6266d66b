//go:build !leaktest_nokill

package supervise

// killTree is false only in the build that shows the leak tests failing.
const killTree = true

func killShimOnly(*reaper) error { return nil }
