// Mkassets makes the files that coffer embeds: it compiles the agent, the sentry, the program that reaches registries and the programs of
// the image `base`, writes the image's archive, and compresses each. Work whose result is there already is not done again, and the
// same sources always give the same files.
//
// It is run from the top of the source tree:
//
//	go run ./internal/assets/mkassets [-arch amd64]
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/coffer-box/coffer/internal/assets"
)

// formatVersion is part of the version of the embedded parts; raise it when what is made of them on a host changes.
const formatVersion = "coffer assets 1"

func main() {
	arch := flag.String("arch", envOr("GOARCH", runtime.GOARCH), "`architecture` of the boxes")
	out := flag.String("out", "internal/assets/data", "`directory` to write to")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *arch, *out); err != nil {
		fmt.Fprintln(os.Stderr, "mkassets:", err)
		os.Exit(1)
	}
}

func envOr(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

func run(ctx context.Context, arch, out string) error {
	if err := makeFilter(ctx, arch); err != nil {
		return err
	}
	old := readOld(filepath.Join(out, assets.FileManifest))
	m := assets.Manifest{GOARCH: arch, Files: map[string]assets.File{}}
	for _, p := range []struct{ file, pkg string }{
		{assets.FileAgent, "./cmd/coffer-agent"},
		{assets.FileSentry, "./cmd/coffer-sentry"},
		{assets.FileRegistry, "./cmd/coffer-registry"},
		{assets.FileBase, "./cmd/coffer-base"},
	} {
		start := time.Now()
		path, err := compile(ctx, arch, p.pkg)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if p.file == assets.FileBase {
			if b, err = baseArchive(b); err != nil {
				return err
			}
		}
		sum := sha256.Sum256(b)
		f := assets.File{Size: int64(len(b)), SHA256: hex.EncodeToString(sum[:])}
		m.Files[p.file] = f
		packed := filepath.Join(out, p.file+".zst")
		fi, err := os.Stat(packed)
		if err != nil || old.Files[p.file] != f {
			if err := pack(b, packed); err != nil {
				return err
			}
			if fi, err = os.Stat(packed); err != nil {
				return err
			}
		}
		fmt.Fprintf(os.Stderr, "%-14s %10d bytes, packed %9d, %s\n", p.file, f.Size, fi.Size(), time.Since(start).Round(time.Millisecond))
	}
	h := sha256.New()
	// Maps are marshalled in the order of their keys.
	j, err := json.Marshal(m)
	if err != nil {
		return err
	}
	fmt.Fprintln(h, formatVersion)
	h.Write(j)
	m.Version = hex.EncodeToString(h.Sum(nil))[:16]
	if j, err = json.MarshalIndent(m, "", "  "); err != nil {
		return err
	}
	return replace(filepath.Join(out, assets.FileManifest), append(j, '\n'))
}

// readOld returns what was made the last time; where that cannot be told, nothing was.
func readOld(path string) assets.Manifest {
	var m assets.Manifest
	if b, err := os.ReadFile(path); err == nil {
		if json.Unmarshal(b, &m) != nil {
			return assets.Manifest{}
		}
	}
	return m
}

// compile builds a program for Linux into a directory that stays, where the go command finds it up to date the next time.
func compile(ctx context.Context, arch, pkg string) (string, error) {
	path := filepath.Join("bin", "assets", "linux-"+arch, filepath.Base(pkg))
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build %s for linux/%s: %w", pkg, arch, err)
	}
	return path, nil
}

// makeFilter has the sentry's system call filter compiled, which only a program of the same architecture can do.
func makeFilter(ctx context.Context, arch string) error {
	if arch != runtime.GOARCH || runtime.GOOS != "linux" {
		fmt.Fprintf(os.Stderr, "the system call filter for %s is compiled at each start of a box, since this is %s/%s\n", arch, runtime.GOOS, runtime.GOARCH)
		return nil
	}
	path, err := compile(ctx, arch, "./internal/sentry/mkfilter")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, filepath.Join("internal", "sentry", "data"))
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("compile the system call filter: %w", err)
	}
	return nil
}

// pack compresses b into path.
func pack(b []byte, path string) error {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(8<<20), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	return errors.Join(replace(path, enc.EncodeAll(b, nil)), enc.Close())
}

// replace writes a file whole or not at all, since the next build embeds whatever is there.
func replace(path string, b []byte) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".mkassets-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails after the rename, as it should
	_, err = tmp.Write(b)
	if err := errors.Join(err, tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
