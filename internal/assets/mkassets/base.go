package main

import (
	"archive/tar"
	"bytes"

	"github.com/coffer-box/coffer/internal/userland"
)

// The files of the image `base` that are not programs.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n" +
		"daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
		"user:x:1000:1000:user:/home/user:/bin/sh\n" +
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
	group     = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nuser:x:1000:\nnogroup:x:65534:\n"
	hosts     = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	osRelease = "NAME=\"Coffer base\"\nID=coffer-base\nPRETTY_NAME=\"Coffer base image\"\n"
	profile   = "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
)

// baseArchive writes the root file system of the image `base` as a tar archive. All times are zero, so that the same program
// makes the same image.
func baseArchive(program []byte) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var err error
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err == nil {
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(content)
		}
	}
	for _, d := range []string{"./", "bin/", "dev/", "etc/", "home/", "mnt/", "opt/", "proc/", "run/", "srv/", "sys/", "usr/", "usr/bin/", "usr/lib/",
		"usr/local/", "usr/local/bin/", "usr/local/sbin/", "usr/sbin/", "usr/share/", "var/", "var/cache/", "var/lib/", "var/log/", "var/spool/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "home/user/", Mode: 0o755, Uid: 1000, Gid: 1000}, nil)
	add(tar.Header{Typeflag: tar.TypeDir, Name: "root/", Mode: 0o700}, nil)
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	add(tar.Header{Typeflag: tar.TypeDir, Name: "var/tmp/", Mode: 0o1777}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/coffer-base", Mode: 0o755}, program)
	for _, name := range userland.Names() {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "coffer-base", Mode: 0o777}, nil)
	}
	// Scripts name these by their full path.
	for _, name := range []string{"env", "id", "printf", "test", "find", "xargs"} {
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/bin/" + name, Linkname: "../../bin/coffer-base", Mode: 0o777}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "sbin", Linkname: "usr/sbin", Mode: 0o777}, nil)
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "var/run", Linkname: "../run", Mode: 0o777}, nil)
	for _, f := range []struct{ name, text string }{
		{"etc/group", group}, {"etc/hosts", hosts}, {"etc/hostname", "box\n"}, {"etc/os-release", osRelease}, {"etc/passwd", passwd},
		{"etc/profile", profile}, {"etc/resolv.conf", ""}, {"etc/shells", "/bin/sh\n"},
	} {
		add(tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: 0o644}, []byte(f.text))
	}
	if err == nil {
		err = w.Close()
	}
	return b.Bytes(), err
}
