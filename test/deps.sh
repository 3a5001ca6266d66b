#!/bin/sh
# Installs what the tests use beyond Go and git, when run as root on Debian, and says so. Elsewhere it names what is missing; the
# tests that need it then skip with that reason.
set -eu
missing=
command -v gcc >/dev/null || missing="$missing gcc libc6-dev"
command -v mmdebstrap >/dev/null || missing="$missing mmdebstrap"
command -v setpriv >/dev/null || missing="$missing util-linux"
PATH="$PATH:/usr/sbin:/sbin" command -v mkfs.ext4 >/dev/null || missing="$missing e2fsprogs"
[ "$(uname -m)" != x86_64 ] || command -v qemu-system-x86_64 >/dev/null || missing="$missing qemu-system-x86"
if [ -z "$missing" ]; then
	:
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	echo "installing Debian packages for the tests:$missing"
	apt-get update -qq >/dev/null
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
	echo "not installed, so some tests will skip:$missing"
fi

# Programs of Debian's are unpacked into the user's cache: installed, the registry of images would be started and stay, and umoci, whose
# unpacking of images ours is compared with, is for the tests only.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/coffer-test
for program in docker-registry umoci; do
	if ! [ -e "$cache/$program" ] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
		tmp=$(mktemp -d)
		if echo "downloading Debian's $program for the tests" && (cd "$tmp" && apt-get download -qq "$program" 2>/dev/null) &&
			dpkg-deb -x "$tmp"/*.deb "$tmp/root"; then
			mkdir -p "$cache"
			mv "$tmp/root/usr/bin/$program" "$cache/$program"
		else
			echo "no $program: some tests will skip"
		fi
		rm -rf "$tmp"
	fi
done

# The kernel of the tests' virtual machines, with the modules of its disk, is unpacked into the user's cache; it is not installed.
kernel=$cache/kernel
if [ "$(uname -m)" = x86_64 ] && ! [ -e "$kernel" ] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
	pkg=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -1)
	tmp=$(mktemp -d)
	if [ -n "$pkg" ] && echo "downloading Debian's $pkg for the tests' virtual machines" && (cd "$tmp" && apt-get download -qq "$pkg" 2>/dev/null) &&
		dpkg-deb -x "$tmp"/*.deb "$tmp/root"; then
		mkdir "$tmp/kernel"
		cp "$tmp"/root/boot/vmlinuz-* "$tmp/kernel/vmlinuz"
		for m in virtio/virtio_ring virtio/virtio virtio/virtio_mmio block/virtio_blk; do
			cp "$tmp"/root/lib/modules/*/kernel/drivers/$m.ko "$tmp/kernel/"
		done
		mkdir -p "$(dirname "$kernel")"
		# In one step, so that nobody ever finds half of it.
		mv -T "$tmp/kernel" "$kernel" 2>/dev/null || [ -e "$kernel" ]
	else
		echo "no kernel for the tests' virtual machines: they will skip"
	fi
	rm -rf "$tmp"
fi
