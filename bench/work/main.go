// Command work is what the benchmark runs inside a sandbox to compare root file systems. It prints, as JSON, how many nanoseconds
// each kind of work took in the directory that it is given. It uses the standard library only, so that it runs anywhere.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const (
	files  = 500
	small  = 4 << 10
	big    = 64 << 20
	chunk  = 1 << 20
	syncs  = 50
	mapped = 20 // times that the image's own files are walked
)

func main() {
	if err := run(os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "work:", err)
		os.Exit(1)
	}
}

func run(dir string, out io.Writer) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	took := map[string]int64{}
	for _, step := range []struct {
		name string
		fn   func(string) error
	}{
		{"create", create}, {"stat", stat}, {"read", read}, {"remove", remove},
		{"write", write}, {"reread", reread}, {"fsync", durable}, {"walk", walk},
	} {
		start := time.Now()
		if err := step.fn(dir); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		took[step.name] = time.Since(start).Nanoseconds()
	}
	return json.NewEncoder(out).Encode(took)
}

func each(dir string, fn func(path string) error) error {
	for i := range files {
		if err := fn(filepath.Join(dir, fmt.Sprintf("f%04d", i))); err != nil {
			return err
		}
	}
	return nil
}

func create(dir string) error {
	data := make([]byte, small)
	return each(dir, func(p string) error { return os.WriteFile(p, data, 0o644) })
}

func stat(dir string) error {
	return each(dir, func(p string) error { _, err := os.Stat(p); return err })
}

func read(dir string) error {
	return each(dir, func(p string) error { _, err := os.ReadFile(p); return err })
}

func remove(dir string) error { return each(dir, os.Remove) }

func write(dir string) error {
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, chunk)
	for range big / chunk {
		if _, err := f.Write(data); err != nil {
			return err
		}
	}
	return f.Sync()
}

func reread(dir string) error {
	f, err := os.Open(filepath.Join(dir, "big"))
	if err != nil {
		return err
	}
	defer f.Close()
	// A reader of its own type, so that no copy is left to the kernel.
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, chunk))
	return err
}

// durable is what a database does for each transaction.
func durable(dir string) error {
	f, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer f.Close()
	data := make([]byte, small)
	for range syncs {
		if _, err := f.Write(data); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// walk reads the metadata of the image's own files.
func walk(string) error {
	for range mapped {
		for _, top := range []string{"/bin", "/etc"} {
			err := filepath.WalkDir(top, func(_ string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				_, err = d.Info()
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
