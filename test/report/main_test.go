package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const passing = `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: needs root\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"--- SKIP: TestA (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestA","Elapsed":0}
{"Action":"pass","Package":"p","Test":"TestB","Elapsed":0}
{"Action":"pass","Package":"p","Elapsed":1.5}
`
	var out strings.Builder
	if !report(strings.NewReader(passing), &out) {
		t.Error("passing tests are reported as failed")
	}
	if want := "pass p 1.5s\nSKIP TestA: a_test.go:1: needs root\n1 passed, 0 failed, 1 skipped\n"; out.String() != want {
		t.Errorf("got %q, want %q", out.String(), want)
	}
	for name, failing := range map[string]string{
		"test":    `{"Action":"output","Package":"p","Test":"TestC","Output":"why\n"}` + "\n" + `{"Action":"fail","Package":"p","Test":"TestC"}`,
		"package": `{"Action":"output","Package":"p","Output":"why\n"}` + "\n" + `{"Action":"fail","Package":"p"}`,
		"nothing": "why\n",
		"build":   `{"Action":"build-output","ImportPath":"p","Output":"why\n"}` + "\n" + `{"Action":"build-fail","ImportPath":"p"}`,
	} {
		out.Reset()
		if report(strings.NewReader(failing), &out) || !strings.Contains(out.String(), "why\n") {
			t.Errorf("%s: %q", name, out.String())
		}
	}
}
