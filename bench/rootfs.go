package main

import (
	"archive/tar"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// busybox is the program that every contender runs, small, in C and static, so that what is measured is the runtime and not the
// start of the guest's program.
const busybox = "/bin/busybox"

// rootfs is the one root file system that every contender runs: Debian's static busybox, and the program `work`.
type rootfs struct {
	tar string // for those that import
	dir string // for those that want a directory
}

func makeRootfs(ctx context.Context, tmp, work string) (*rootfs, error) {
	if f, err := elf.Open(busybox); err != nil {
		return nil, fmt.Errorf("the root file system is made of busybox: apt-get install --no-install-recommends busybox-static: %w", err)
	} else if libs, err := f.ImportedLibraries(); err != nil || len(libs) > 0 {
		return nil, fmt.Errorf("%s is not static: apt-get install --no-install-recommends busybox-static", busybox)
	}
	r := &rootfs{tar: filepath.Join(tmp, "rootfs.tar"), dir: filepath.Join(tmp, "rootfs")}
	if err := r.write(work); err != nil {
		return nil, fmt.Errorf("make the root file system: %w", err)
	}
	if err := os.Mkdir(r.dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "tar", "-C", r.dir, "-xpf", r.tar).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("unpack the root file system: %w: %s", err, out)
	}
	return r, nil
}

func (r *rootfs) write(work string) (err error) {
	f, err := os.Create(r.tar)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	for _, d := range []string{"bin", "dev", "etc", "proc", "root", "sys", "tmp"} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755}))
	}
	for _, l := range []string{"sh", "true", "sleep"} {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + l, Linkname: "busybox"}))
	}
	for name, path := range map[string]string{"bin/busybox": busybox, "bin/work": work} {
		b, rerr := os.ReadFile(path)
		err = errors.Join(err, rerr, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755, Size: int64(len(b))}))
		if err != nil {
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return errors.Join(err, w.Close())
}
