# Run by mmdebstrap beside a new root file system, $1: installs packages on top of it, each time as an overlay's upper directory, and leaves
# that in $2/<layer>/upper. The mounts are in namespaces of their own, and end with them.
set -eu
root=$1 out=$2
layer() { # <layer> <lower layers, the highest first> <commands>
	mkdir -p "$out/$1/upper" "$out/$1/work" "$out/$1/merged"
	lower=
	for l in $2; do lower=$lower$out/$l/upper:; done
	unshare -m --propagation private sh -euc '
		mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work,redirect_dir=off,metacopy=off,index=off" overlay "$1/merged"
		mount -t proc proc "$1/merged/proc"
		mount --rbind /dev "$1/merged/dev"
		exec chroot "$1/merged" env DEBIAN_FRONTEND=noninteractive LC_ALL=C sh -euc "
			installs() { apt-get install -y --no-install-recommends -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \"\$@\"; apt-get clean; }
			$3"
	' - "$out/$1" "$lower$root" "$3" >"$out/$1.log" 2>&1 || { echo "layer $1:"; tail -20 "$out/$1.log"; return 1; } >&2
}
layer python '' 'installs python3 openssl' & a=$!
layer node '' 'installs nodejs' & b=$!
wait $a
wait $b
layer gcc '' 'installs gcc libc6-dev' & a=$!
layer postgres '' '
	mkdir /etc/postgresql-common
	echo create_main_cluster = false >/etc/postgresql-common/createcluster.conf
	installs postgresql-15' & b=$!
wait $a
wait $b
# What comes after packages in the recipes of images: things taken away, things replaced, a user.
layer app python '
	useradd --uid 70001 --create-home --home-dir /srv/app --shell /bin/sh app
	groupadd --gid 70500 readers
	usermod --append --groups readers,audio app
	rm -rf /usr/share/doc/* /usr/lib/python3.11/idlelib /usr/lib/python3.11/turtle.py
	rm -rf /var/lib/dpkg/info && mkdir /var/lib/dpkg/info
	ln /etc/passwd /etc/passwd.same && chmod 640 /etc/passwd.same && chmod 644 /etc/passwd'
layer data postgres '
	install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data
	rm -rf /usr/share/doc && mkdir /usr/share/doc
	rm /etc/issue.net && ln -s issue /etc/issue.net
	cat >/usr/local/bin/entry <<-"END"
		#!/bin/sh
		set -eu
		[ -s "$PGDATA/PG_VERSION" ] || initdb --auth=trust --encoding=UTF8 --locale=C.UTF-8 >/dev/null
		exec "$@"
	END
	chmod 755 /usr/local/bin/entry'
