package coffer_test

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// TestPackageDocs sees that every package says what it is for.
func TestPackageDocs(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{if or .GoFiles .CgoFiles}}{{.ImportPath}}|{{.Doc}}{{end}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if pkg, doc, _ := strings.Cut(strings.TrimSpace(line), "|"); pkg != "" && doc == "" {
			t.Errorf("%s has no documentation", pkg)
		}
	}
}

// TestLintRules sees that every package that a rule of the linter names is there: a rule for none forbids nothing.
func TestLintRules(t *testing.T) {
	conf, err := os.ReadFile(".golangci.yml")
	if err != nil {
		t.Fatal(err)
	}
	dirs := regexp.MustCompile(`\*\*/([a-z/]+)/\*\.go`).FindAllSubmatch(conf, -1)
	if len(dirs) == 0 {
		t.Fatal("no rule names a package")
	}
	for _, d := range dirs {
		if st, err := os.Stat(string(d[1])); err != nil || !st.IsDir() {
			t.Errorf("a rule of .golangci.yml is for %s, which is no package", d[1])
		}
	}
}
