#!/bin/sh
# Builds coffer with the whole-tree kill taken out, and with it the kernel's own for orphaned jails, and sees the leak tests fail with
# living processes.
set -eu
nokill="$PWD/bin/nokill/coffer" # a name by which it is its own helper
CGO_ENABLED=0 go build -tags leaktest_nokill -trimpath -o "$nokill" ./cmd/coffer
home=$(mktemp -d /tmp/cnokill-XXXXXX)
out=$(mktemp)

# End what that build leaves: by the directory of its home in command lines, and by its instance in those of jails.
clean() {
	for p in /proc/[0-9]*; do
		if { tr '\0' ' ' <"$p/cmdline"; } 2>/dev/null | grep -q "$home"; then kill -9 "${p#/proc/}" 2>/dev/null || true; fi
	done
	for inst in $(grep -oE 'coffer-[0-9a-f]{16}-' "$out" | sort -u | cut -d- -f2); do
		for p in /proc/[0-9]*; do
			if { tr '\0' ' ' <"$p/cmdline"; } 2>/dev/null | grep -Eq "^coffer-init .*coffer-($inst)-"; then kill -9 "${p#/proc/}" 2>/dev/null || true; fi
		done
		for _ in 1 2 3 4 5 6 7 8 9 10; do
			dirs=$(find /sys/fs/cgroup -depth -type d 2>/dev/null | grep -E "/coffer/coffer-($inst)-" || true)
			[ -n "$dirs" ] || break
			echo "$dirs" | xargs rmdir 2>/dev/null || sleep 0.2
		done
		rm -rf "/run/coffer-$inst" "/tmp/coffer-$(id -u)-$inst"
	done
	rm -rf "$home" "$out"
}
trap clean EXIT

COFFER_BIN="$nokill" TMPDIR="$home" go test -count=1 -run '^(TestSeedRemove|TestSeedStop|TestStoppedTree|TestLostRecord)$' ./test/e2e >"$out" 2>&1 || true
for test in TestSeedRemove TestSeedStop TestStoppedTree TestLostRecord; do
	# The lines of one test: from its own on to the next test's. Processes must have been counted, not control groups alone.
	lines=$(sed -n "/^--- FAIL: $test /,/^--- /p" "$out" | sed -n '1p;/things of the box are left/p;/process [0-9]/p')
	for want in "^--- FAIL: $test" 'things of the box are left' 'process [0-9]* .* by'; do
		echo "$lines" | grep -Eq -- "$want" || { echo "two-sided: without the kill $test says no «$want», so it proves nothing:" >&2; cat "$out" >&2; exit 1; }
	done
	echo "two-sided: without the whole-tree kill $test fails:$(echo "$lines" | grep -m1 'things of the box are left' | sed 's/^.*go:[0-9]*://'), such as$(echo "$lines" | grep -m1 -Eo ' process [0-9].*')"
done
