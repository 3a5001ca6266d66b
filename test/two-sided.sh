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

COFFER_BIN="$nokill" TMPDIR="$home" go test -count=1 -run '^(TestSeedRemove|TestStoppedTree)$' ./test/e2e >"$out" 2>&1 || true
# A tree that can still run notices that its shim is gone, and leaves its control groups; one that cannot lives on.
for want in '^--- FAIL: TestSeedRemove' '^--- FAIL: TestStoppedTree' 'things of the box are left' 'process .* \(T\) by'; do
	grep -Eq -- "$want" "$out" || { echo "two-sided: without the kill there is no «$want», so the tests prove nothing:" >&2; cat "$out" >&2; exit 1; }
	grep -E -m1 -- "$want" "$out" | sed 's/^ */two-sided: seen to fail: /'
done
