// Command report reads what `go test -json` prints and tells it to people: a line for each package, everything of what failed, and every
// skipped test with its reason, which `go test` hides in packages that pass. It exits with 1 if anything failed.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is one line of the stream; see `go doc test2json`.
type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64
}

func main() {
	if !report(os.Stdin, os.Stdout) {
		os.Exit(1)
	}
}

func report(in io.Reader, out io.Writer) bool {
	said := map[string][]string{} // by package and test
	counts := map[string]int{}
	var skipped []string
	ok, packages := true, 0
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 64<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Fprintln(out, sc.Text()) // the go command's own words
			continue
		}
		key := e.Package + e.ImportPath + " " + e.Test
		switch e.Action {
		case "output", "build-output":
			said[key] = append(said[key], e.Output)
		case "build-fail":
			ok = false
			fmt.Fprint(out, strings.Join(said[key], ""))
		case "pass", "fail", "skip":
			if e.Test == "" {
				if e.Action == "fail" {
					ok = false
					fmt.Fprint(out, strings.Join(said[key], ""))
				}
				if e.Action != "skip" { // it has no tests
					packages++
					fmt.Fprintf(out, "%s %s %.1fs\n", e.Action, e.Package, e.Elapsed)
				}
				continue
			}
			counts[e.Action]++
			switch e.Action {
			case "fail":
				ok = false
				fmt.Fprint(out, strings.Join(said[key], ""))
			case "skip":
				skipped = append(skipped, "SKIP "+e.Test+": "+reason(said[key]))
			}
			delete(said, key)
		}
	}
	if err := sc.Err(); err != nil {
		fmt.Fprintln(out, "report:", err)
		ok = false
	}
	if packages == 0 {
		fmt.Fprintln(out, "report: no package was tested")
		ok = false
	}
	for _, s := range slices.Compact(skipped) {
		fmt.Fprintln(out, s)
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", counts["pass"], counts["fail"], counts["skip"])
	return ok
}

// reason is what a skipped test said, without the lines of the test runner.
func reason(lines []string) string {
	var out []string
	for _, l := range lines {
		if l = strings.TrimSpace(l); !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(l, "--- ") {
			out = append(out, l)
		}
	}
	return strings.Join(out, " ")
}
