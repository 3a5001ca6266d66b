#!/bin/sh
# Runs the end-to-end tests as an ordinary user without subuids, from root. The test program is compiled first, so that the user
# needs neither Go nor a writable checkout.
set -eu
if [ "$(id -u)" != 0 ]; then
	echo "as-user: this already is an ordinary user"
	exit 0
fi
command -v setpriv >/dev/null || { echo "SKIP as-user: setpriv is not installed"; exit 0; }
uid=48231 # in no passwd file
dir=$(mktemp -d /tmp/cuser-XXXXXX)
cp bin/coffer "$dir/coffer"
mkdir "$dir/home"
cp -r test/cli/testdata "$dir/home/testdata"
chown -R "$uid:$uid" "$dir/home"
chmod 755 "$dir" "$dir/coffer"
registry=${XDG_CACHE_HOME:-$HOME/.cache}/coffer-test/docker-registry
[ ! -e "$registry" ] || install -m 755 "$registry" "$dir/docker-registry"
go build -o "$dir/report" ./test/report
CGO_ENABLED=0 go build -o "$dir/lister" ./test/lister
status=0
for suite in e2e cli; do
	go test -c -o "$dir/$suite.test" "./test/$suite"
	chmod 755 "$dir/$suite.test"
	(cd "$dir/home" && HOME="$dir/home" TMPDIR=/tmp COFFER_BIN="$dir/coffer" COFFER_TEST_REGISTRY="$dir/docker-registry" \
		COFFER_TEST_LISTER="$dir/lister" setpriv --reuid $uid --regid $uid --clear-groups \
		"$dir/$suite.test" -test.v=test2json -test.timeout 30m) 2>&1 | go tool test2json -p "test/$suite as an ordinary user" | "$dir/report" || status=1
done
rm -rf "$dir"
exit $status
