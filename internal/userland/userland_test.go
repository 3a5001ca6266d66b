package userland

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	if _, ok := commands()[filepath.Base(os.Args[0])]; ok {
		os.Exit(Main(os.Args)) // called by the name of a command
	}
	// Every command of the tests is this program: one that was started under a wrong name must not become the tests once more.
	if !slices.ContainsFunc(os.Args[1:], func(a string) bool { return strings.HasPrefix(a, "-test.") }) {
		fmt.Fprintf(os.Stderr, "%s is neither a command nor called by go test\n", os.Args[0])
		os.Exit(97)
	}
	os.Exit(m.Run())
}

// runScript runs a script with nothing but this package's commands on the path.
func runScript(t *testing.T, script, stdin string) (out, errOut string, code int) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range Names() {
		if err := os.Symlink(exe, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "sh"), "-c", script, "name", "first", "second")
	cmd.Args[0] = "sh"
	cmd.Dir = t.TempDir()
	// The race detector's runtime would have every command wait a second at its end.
	cmd.Env = []string{"PATH=" + bin, "HOME=/", "TZ=UTC", "GORACE=atexit_sleep_ms=0"}
	cmd.Stdin = strings.NewReader(stdin)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return o.String(), e.String(), exitCode(cmd.ProcessState)
}

type commandTest struct {
	script, stdin, out string
	code               int
}

func TestCommands(t *testing.T) {
	runTests(t, map[string]commandTest{
		"arguments":       {script: `echo "$1-$2-$#"`, out: "first-second-2\n"},
		"status":          {script: "false", code: 1},
		"exit":            {script: "exit 7", code: 7},
		"exit of last":    {script: "true; false", code: 1},
		"errexit":         {script: "set -e; false; echo no", code: 1},
		"not found":       {script: "nosuch", code: 127},
		"not executable":  {script: "touch x; ./x", code: 126},
		"killed":          {script: "sh -c 'kill -9 $$'; echo $?", out: "137\n"},
		"exec":            {script: "exec sh -c 'exit 3'; echo no", code: 3},
		"exec elsewhere":  {script: "exec echo hi >f; echo no", out: ""},
		"exec in a pipe":  {script: "exec echo hi | cat; echo on", out: "hi\non\n"},
		"exec in $()":     {script: "exec echo $(exec echo in)", out: "in\n"},
		"exec in job":     {script: "(sleep 0.05; exec echo job) & wait; exec echo own", out: "job\nown\n"},
		"exit trap":       {script: "trap 'echo bye' EXIT; exit 4", out: "bye\n", code: 4},
		"background":      {script: "sleep 0.01 & wait; echo done", out: "done\n"},
		"stdin script":    {script: "sh", stdin: "read x\nvalue\necho got $x\nexit 5\n", out: "got value\n", code: 5},
		"stdin for child": {script: "sh", stdin: "head -n1 >/dev/null; echo on\nrest\n", out: "on\n"},
		"here document":   {script: "cat <<E\na $1\nE\n", out: "a first\n"},
		"pipeline":        {script: "seq 10 | grep -v 5 | tail -n 3 | sort -rn | tr '\\n' ' '", out: "10 9 8 "},
		"seq":             {script: "seq -w 8 10; seq 1 0.5 2; seq 3 -1 1 | wc -l", out: "08\n09\n10\n1.0\n1.5\n2.0\n3\n"},
		"cut":             {script: "echo a:b:c | cut -d: -f2-; echo hello | cut -c1,3-4", out: "b:c\nhll\n"},
		"sort":            {script: "printf 'b 2\\na 10\\nb 2\\n' | sort -u; printf 'a 10\\nb 9\\n' | sort -k2 -n", out: "a 10\nb 2\nb 9\na 10\n"},
		"uniq":            {script: "printf 'a\\na\\nb\\n' | uniq -c", out: "      2 a\n      1 b\n"},
		"tr":              {script: "echo aabbc | tr -s a-b; echo hi | tr '[:lower:]' '[:upper:]'; echo a1b2 | tr -cd 0-9", out: "abc\nHI\n12"},
		"sed":             {script: "printf '1\\n2\\n3\\n' | sed -n '2,$p'; echo aXbX | sed 's/X/-/2;s/\\(a\\)/<\\1&>/'; printf 'a\\nb\\n' | sed '/a/d'", out: "2\n3\n<aa>Xb-\nb\n"},
		"sed in place":    {script: "echo one >f; sed -i s/one/two/ f; cat f", out: "two\n"},
		"grep":            {script: "printf 'ab\\nAC\\nb\\n' >f; grep -in a f; grep -c b f; grep -q z f || echo none; grep -E '^(b|ab)$' f; grep -o '[a-z]*b' f", out: "1:ab\n2:AC\n2\nnone\nab\nb\nab\nb\n"},
		"grep context":    {script: "seq 9 | grep -B1 -A1 5", out: "4\n5\n6\n"},
		"head and tail":   {script: "seq 5 | head -2; seq 5 | tail -n +4; printf abcdef | head -c 3; printf abcdef | tail -c 2", out: "1\n2\n4\n5\nabcef"},
		"wc":              {script: "printf 'a b\\nc\\n' | wc; printf 'x\\n' >f; wc -l f", out: "2 3 6\n1 f\n"},
		"printf":          {script: "printf '%s=%d\\n' a 1 b 2; printf '%05.1f|%-3s|%x\\n' 2.5 a 255", out: "a=1\nb=2\n002.5|a  |ff\n"},
		"test":            {script: "test -n a -a 1 -lt 2 && [ ! -e none ] && test a != b && echo yes; env test -d . && echo dir; env [ 1 -gt 2 ] || echo no", out: "yes\ndir\nno\n"},
		"env":             {script: "env -i A=1 B=2 env | sort; env A=3 printenv A; env nosuch; echo $?", out: "A=1\nB=2\n3\n127\n"},
		"files":           {script: "mkdir -p a/b; echo x >a/b/c; cp -r a z; mv z y; cat y/b/c; ln -s c y/b/l; readlink y/b/l; rm -r y; ls; rmdir a 2>/dev/null || echo full", out: "x\nc\na\nfull\n"},
		"cp into itself":  {script: "mkdir a; cp -r a a/b", code: 1},
		"rm refuses":      {script: "rm -rf / ; echo $?; mkdir d; rm d; echo $?; rm -f none; echo $?", out: "1\n1\n0\n"},
		"modes":           {script: "touch f; chmod 640 f; stat -c %a f; chmod u+xs,g-r,o=r f; stat -c '%a %A' f; mkdir -m 1777 d; stat -c %a d", out: "640\n4704 -rws---r--\n1777\n"},
		"find":            {script: "mkdir -p d/e; touch d/a.go d/e/b.go d/c; find d -name '*.go' | sort; find d -type d | sort; find d -name c -exec echo got {} \\; ; find d -name '*.go' -delete; find d -type f", out: "d/a.go\nd/e/b.go\nd\nd/e\ngot d/c\nd/c\n"},
		"find mistakes":   {script: "find . -nosuch", code: 2},
		"xargs":           {script: "echo a b c | xargs -n2 echo -; printf 'x y\\nz\\n' | xargs -I@ echo [@]; echo | xargs -r echo no", out: "- a b\n- c\n[x y]\n[z]\n"},
		"tar":             {script: "mkdir -p d/e; echo x >d/e/f; ln -s f d/e/l; ln d/e/f d/h; chmod 750 d/e; tar czf t.gz d; mkdir o; tar xzf t.gz -C o; cat o/d/h; readlink o/d/e/l; stat -c %a%h o/d/e/f o/d/e | tr '\\n' ' '; tar tf t.gz | wc -l", out: "x\nf\n6442 7502 5\n"},
		"tar in a pipe":   {script: "mkdir d o; echo x >d/f; tar cf - -C d . | tar xf - -C o; cat o/f", out: "x\n"},
		"gzip":            {script: "echo hi >f; gzip f; ls; zcat f.gz; gunzip f.gz; cat f", out: "f.gz\nhi\nhi\n"},
		"sums":            {script: "printf abc | sha256sum | cut -c1-8; printf abc >f; md5sum f >s; md5sum -c s; printf abcd >f; md5sum -c s", out: "ba7816bf\nf: OK\nf: FAILED\n", code: 1},
		"base64":          {script: "printf hello | base64; echo aGk= | base64 -d", out: "aGVsbG8=\nhi"},
		"dd":              {script: "printf abcdef | dd bs=1 skip=2 count=3 status=none; dd if=/dev/zero of=f bs=1k count=4 status=none; stat -c %s f; dd if=/dev/zero of=f bs=1k count=0 seek=9 status=none; stat -c %s f; printf xy | dd of=f bs=1 seek=1 conv=notrunc status=none; stat -c %s f", out: "cde4096\n9216\n9216\n"},
		"timeout":         {script: "timeout 0.05 sleep 10; echo $?; timeout 10 true; echo $?", out: "124\n0\n"},
		"names":           {script: "basename /a/b.c .c; dirname /a/b; dirname b; dirname /", out: "b\n/a\n.\n/\n"},
		"date":            {script: "date -u -d @86400 '+%Y-%m-%d %H:%M:%S %j %s'", out: "1970-01-02 00:00:00 002 86400\n"},
		"tee":             {script: "echo a | tee f | cat; cat f", out: "a\na\n"},
		"cmp":             {script: "echo a >f; echo b >g; cmp -s f g; echo $?; cmp f f; echo $?", out: "1\n0\n"},
		"sleep":           {script: "timeout 0.2 sleep infinity; echo $?; timeout 0.2 sleep 1 inf; echo $?", out: "124\n124\n"},
		"unknown option":  {script: "ls --nosuch", code: 2},
		"touch":           {script: "touch -d @0 f; stat -c %Y f; touch -c none; ls", out: "0\nf\n"},
		"fifo":            {script: "mkfifo p; echo through >p & cat p; wait", out: "through\n"},
	})
}

func runTests(t *testing.T, tests map[string]commandTest) {
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			out, errOut, code := runScript(t, tc.script, tc.stdin)
			if out != tc.out || code != tc.code {
				t.Errorf("got %q, code %d; want %q, code %d\n%s", out, code, tc.out, tc.code, errOut)
			}
		})
	}
}

func TestShell(t *testing.T) {
	runTests(t, map[string]commandTest{
		"name":                    {script: `echo $0 "${0##*m}"; eval 'echo $0'; f() { echo $0; }; f; (echo $0); printf 'echo "$0"\n' >s; sh ./s; . ./s; sh -c 'echo $0'; echo 'echo $0' | sh`, out: "name e\nname\nname\nname\n./s\nname\nsh\nsh\n"},
		"trap":                    {script: "trap 'echo got; exit 3' TERM; kill -TERM $$; echo no", out: "got\n", code: 3},
		"trap goes on":            {script: "trap 'echo got $x' USR1; x=1; kill -USR1 $$; echo on; false; kill -s USR1 $$; echo $?", out: "got 1\non\ngot 1\n0\n"},
		"trap from outside":       {script: "trap 'echo got; exit 3' TERM; (kill $$) & while :; do sleep 0.01; done", out: "got\n", code: 3},
		"trap several":            {script: "trap 'echo bye' EXIT INT; kill -INT $$; trap - INT; trap", out: "bye\ntrap -- \"echo bye\" EXIT\nbye\n"},
		"trap by number":          {script: "trap 'echo 15' 15; trap; kill $$; trap - 15; kill $$; echo no", out: "trap -- 'echo 15' TERM\n15\n", code: 143},
		"trap ignores":            {script: "trap '' TERM; kill $$; sh -c 'kill $$; echo child'; (kill $$; echo sub); trap - TERM; sh -c 'kill $$'; echo $?", out: "child\nsub\n143\n"},
		"trap ignores in program": {script: "trap '' TERM USR1; sleep 0.2 & kill $!; kill -USR1 $!; wait $!; echo $?", out: "0\n"},
		"trap in wait":            {script: "trap 'echo got' TERM; sleep 10 & p=$!; (kill $$) & wait $p; echo $?; kill %1; wait %1; echo $?", out: "got\n143\n143\n"},
		"trap in a function":      {script: "f() { trap 'echo got' USR1; }; f; kill -USR1 $$; echo on", out: "got\non\n"},
		"trap in a subshell":      {script: "trap 'echo no' USR1; (trap 'echo sub' USR1; sh -c 'kill -USR1 $PPID'; echo in) ; echo on", out: "sub\nin\non\n"},
		"trap mistakes":           {script: "trap x NOSUCH", code: 1},
		"umask":                   {script: "umask 027; umask; umask -S; >f; mkdir d; stat -c %a f d; umask g+w; umask; (umask 0; >g; umask); umask; stat -c %a g; x=$(umask); echo $x", out: "0027\nu=rwx,g=rx,o=\n640\n750\n0007\n0000\n0007\n666\n0007\n"},
		"ulimit":                  {script: "ulimit -n 64; ulimit -n; ulimit -Sn 32; ulimit -n; ulimit -Hn; ulimit -a | grep -c .; (ulimit -n 16; ulimit -n); ulimit -n; ulimit -n no 2>/dev/null || echo refused; ulimit -c 0; ulimit -c", out: "64\n32\n64\n10\n16\n32\nrefused\n0\n"},
		"job":                     {script: "sleep 10 & kill $!; wait $!; echo $?", out: "143\n"},
		"job that fails":          {script: "(exit 3) & wait $!; echo $?; f() { return 4; }; f & wait $!; echo $?; wait 1; echo $?; wait; echo $?", out: "3\n4\n127\n0\n"},
		"job's surroundings": {script: "x=\"it's\"; a=(1 2); y=3; f() { echo $x-${a[1]}-$y-$1-$2; }; export y; set -u; cd /; { pwd; f $1 $2; } >/dev/stdout & p=$$; wait; [ $p = $$ ] && echo same",
			out: "/\nit's-2-3-first-second\nsame\n"},
		"job's pid":          {script: "sh -c 'echo $$ >f' & wait; [ $(cat f) = $! ] && echo same", out: "same\n"},
		"jobs":               {script: "jobs; sleep 5 & jobs; jobs -p | wc -l; kill %1; wait; jobs; : & wait -n; echo $?", out: "[1] Running\tsleep 5\n1\n0\n"},
		"job ignores ^C":     {script: "{ >f; sleep 0.1; } & until [ -e f ]; do :; done; kill -INT $!; wait $!; echo $?", out: "0\n"},
		"job outlives":       {script: "mkfifo p q r; sh -c '(read x <p; echo late; >r) & read x <q && echo too &'; echo first; echo >p; read x <r; echo >q", out: "first\nlate\ntoo\n"},
		"job in $()":         {script: "x=$(echo a & wait; echo b); echo $x; (echo c | cat &)", out: "a b\nc\n"},
		"job with document":  {script: "cat <<E & wait\n$1 'q'\nE\n", out: "first 'q'\n"},
		"job and errexit":    {script: "set -e; false & wait; (false; echo no) & wait $! || echo $?", out: "1\n"},
		"environment":        {script: "unset HOME; A=1; export B=2; sh -c 'echo $HOME-$A-$B'; sh -c env | grep -c __sh", out: "--2\n0\n", code: 1},
		"exec order":         {script: "sh -c 'exec sh -c \"echo out; echo err >&2\" 2>&1 >f'; cat f", out: "err\nout\n"},
		"pipefail in a job":  {script: "set -o pipefail; (false | true) & wait $!; echo $?", out: "1\n"},
		"command and test":   {script: "command umask 022; command -v umask; wait() { echo mine; }; wait", out: "umask\nmine\n"},
		"backslashes":        {script: `x=a\ b\'c; echo $x; echo hi >f\ g; cat f*; case a\*b in a\*b) echo star ;; esac; export y='it'\''s'; echo "$y"; z="\$a"; echo $z`, out: "a b'c\nhi\nstar\nit's\n$a\n"},
		"exec with document": {script: "exec cat <<E\n$1\nE\n", out: "first\n"},
		"read in a pipeline": {script: "echo v | while read x; do echo $x; done; echo w | { read x; echo $x$?; }", out: "v\nw0\n"},
	})
}

func TestOptions(t *testing.T) {
	runTests(t, map[string]commandTest{
		"color":           {script: "echo foo >f; grep --color foo f; grep --color=auto foo f; mkdir d; >d/x; ls --color d; ls --color=never d; ls --all=1 d || echo refused", out: "foo\nfoo\nx\nx\nrefused\n"},
		"date precision":  {script: "date -u -d @0 -I; date -u -d @0 -Iseconds; date -u -d @0 --iso-8601=minutes; date -Ino || echo refused", out: "1970-01-01\n1970-01-01T00:00:00+00:00\n1970-01-01T00:00+00:00\nrefused\n"},
		"no last newline": {script: `printf 'a\nb' | head -n 5; echo .; printf 'a\nb' | tail -n 1; echo .; printf 'a\nb' | tail -n +2; echo .; printf 'a\nb' | sed s/b/c/; echo .; printf b | sed -n 'p;p'; echo .; printf b >f; sed -i.old s/b/c/ f; wc -c f f.old | head -n 1`, out: "a\nb.\nb.\nb.\na\nc.\nb\nb.\n1 f\n"},
		"head but last":   {script: "seq 3 | head -n -1; printf abc | head -c -1", out: "1\n2\nab"},
		"find quit":       {script: "mkdir d; >d/a; >d/b; find d -type f -print -quit | wc -l; find d -type f -quit", out: "1\n"},
		"find ok":         {script: "mkdir d; >d/a; >d/b; printf 'y\\nn\\n' | find d -type f -ok echo {} \\; 2>/dev/null | wc -l", out: "1\n"},
		"find xdev":       {script: "find / -xdev -maxdepth 1 -name proc -o -maxdepth 1 -name nosuch; find / -maxdepth 1 -name proc", out: "/proc\n"},
		"timeout's group": {script: "mkfifo p q; cat p & timeout 60 sh -c '{ echo >q; sleep 60; } >p & wait' & t=$!; read x <q; kill $t; wait; echo done", out: "done\n"},
		"timeout forwards": {script: "mkfifo p; timeout 9 sh -c 'trap \"echo got; exit 5\" TERM; echo ready >p; while :; do sleep 0.01; done' & read x <p; kill $!; wait $!; echo $?",
			out: "got\n5\n"},
		"xargs by lines": {script: "printf 'a b\\nc\\n' | xargs -L1 sh -c 'echo $# $1' x; printf 'a\\nb\\nc\\n' | xargs -L2 echo; printf 'a\\0\\0b\\0' | xargs -0 sh -c 'echo $#' x; seq 4 | xargs -P2 -n1 echo | sort", out: "2 a\n1 c\na b\nc\n3\n1\n2\n3\n4\n"},
		"grep files":     {script: "echo b >p; printf 'a\\nb\\n' >x.go; echo b >x.c; mkdir s; echo b >s/y.go; grep -f p x.go; grep -rl --include='*.go' --exclude-dir=s b .; grep -s b nosuch; echo $?", out: "b\n./x.go\n2\n"},
		"rm -i":          {script: ">a; >b; printf 'n\ny\n' | rm -i a b 2>/dev/null; ls; mkdir -p d/e; >d/f; yes | rm -ri d 2>/dev/null; ls; rm -i a </dev/null 2>/dev/null; ls; rm -if a; ls; mkdir d; >d/f; rm -rv d", out: "a\na\na\nremoved 'd/f'\nremoved 'd'\n"},
		"mv -i":          {script: "echo 1 >a; echo 2 >b; echo n | mv -i a b 2>/dev/null; cat b; echo y | mv -i a b 2>/dev/null; cat b; echo 3 >c; mv -if c b; cat b; >e; mv -fi b e </dev/null 2>/dev/null; cat b", out: "2\n1\n3\n3\n"},
		"cp -i":          {script: "echo 1 >a; echo 2 >b; echo n | cp -i a b 2>/dev/null; cat b; echo y | cp -i a b 2>/dev/null; cat b; mkdir d e; echo 1 >d/f; echo 2 >e/f; cp -ri d/f e </dev/null 2>/dev/null; cat e/f; cp -i a new", out: "2\n1\n2\n"},
		"tar options":    {script: "mkdir d d/x o; echo 1 >d/f; >d/x/y; tar cf t d; mkdir o/d; echo 2 >o/d/f; tar xkf t -C o 2>/dev/null; echo $?; cat o/d/f; ls o/d; rm -r o/d; tar xf t -C o --exclude=x; ls o/d; echo d/f | tar cf u -T -; tar tf u; tar chf u d 2>/dev/null || echo refused; touch -d @0 d/f; tar cf t d; tar xmf t -C o; [ $(stat -c %Y o/d/f) -gt 0 ] && echo now", out: "2\n2\nf\nx\nf\nd/f\nrefused\nnow\n"},
		"touch -t":       {script: "touch -t 202001021504.05 f; stat -c %Y f; touch -t 7001010000 g; stat -c %Y g; touch -a -d @9 f; stat -c '%X %Y' f; touch -m -d @8 f; stat -c '%X %Y' f; touch -t 99 f || echo refused", out: "1577977445\n0\n9 1577977445\n9 8\nrefused\n"},
		"truncate":       {script: "truncate -s 4 f; truncate -s +2 f; stat -c %s f; truncate -s -5 f; stat -c %s f; truncate -c -s 1 none; ls", out: "6\n1\nf\n"},
		"dd flags":       {script: "printf abcdefgh >f; dd if=f bs=3 skip=1 iflag=skip_bytes,count_bytes count=5 status=none; echo; echo x >g; dd if=f of=g oflag=append conv=notrunc status=none; cat g; echo; dd if=f of=h bs=4 seek=1 oflag=seek_bytes count=1 status=none; stat -c %s h; dd if=f oflag=nosuch || echo refused; dd if=f conv=ucase || echo refused; dd if=f ibs=1 obs=2 || echo refused", out: "bcdef\nx\nabcdefgh\n5\nrefused\nrefused\nrefused\n"},
		"sort keys":      {script: "printf 'b 2 x\na 10 x\na 2 y\n' >f; sort -k3,3 -k2,2n f; sort -k2,2nr -k1,1 f; sort -t' ' -k1.1,1.1 -k2,2rn f; printf '10K\n9\n' | sort -n; printf '1K\n900\n' | sort -h; printf '1.10\n1.9\n1.2\n' | sort -V; sort -c f 2>/dev/null || echo disorder; sort -k0 f || echo refused", out: "b 2 x\na 10 x\na 2 y\na 10 x\na 2 y\nb 2 x\na 10 x\na 2 y\nb 2 x\n9\n10K\n900\n1K\n1.2\n1.9\n1.10\ndisorder\nrefused\n"},
		"mktemp":         {script: "[ -e $(mktemp -u) ] || echo none; [ -d $(mktemp -d -u -p .) ] || echo none; ls", out: "none\nnone\n"},
		"refused":        {script: "for c in 'stat -f .' 'df -i' 'base64 -i' 'realpath -s .' 'readlink -m .' 'hostname -i' 'mount -a' 'which -s sh' 'dirname -z a'; do $c >/dev/null 2>&1; echo $?; done | sort -u", out: "2\n"},
		"gzip options":   {script: "echo hi >f; gzip -9 -k f; gzip -t f.gz && echo sound; zcat f.gz; gzip -t f || echo not", out: "sound\nhi\nnot\n"},
	})
}

func TestEveryday(t *testing.T) {
	runTests(t, map[string]commandTest{
		"sed blocks":    {script: "seq 3 | sed -n '/2/{s/2/x/;p}'; seq 2 | sed '1{\np\nd\n}'; echo abc | sed 'y/ac/xz/'; sed '{p' </dev/null || echo refused; sed 'p}' </dev/null || echo refused", out: "x\n1\n2\nxbz\nrefused\nrefused\n"},
		"seq separator": {script: "seq -s, 3; seq -s ' ' 2", out: "1,2,3\n1 2\n"},
		"date":          {script: "date -u -d @0 '+%-d %-H %k %V'; a=$(date -d '1 day ago' +%s); b=$(date -d yesterday +%s); c=$(date +%s); [ $((c - a)) -ge 82800 ] && [ $((b - a)) -le 5 ] && echo ago", out: "1 0  0 01\nago\n"},
		"cp -u":         {script: "echo 1 >a; echo 2 >b; touch -d @0 a; cp -u a b; cat b; cp -u b a; cat a", out: "2\n2\n"},
		"find modes":    {script: ">a; >b; chmod 700 a; chmod 600 b; find . -type f -perm -u+x; find . -type f -executable; find . -perm 600", out: "./a\n./a\n./b\n"},
		"printf %q":     {script: "printf '%q\\n' \"it's\"", out: "'it'\\''s'\n"},
		"disown":        {script: ": & disown; wait; echo on", out: "on\n"},
	})
}
