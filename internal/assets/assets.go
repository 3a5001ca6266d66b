// Package assets carries what a box needs besides the coffer program itself: the agent, the gVisor sentry, the scaffold image that
// holds the agent, the program that reaches registries, and the archive of the image `base`. They are embedded, so that one file can
// be copied anywhere, and taken out once per version into the home directory, since a program must be a file to be run.
//
// The package starts nothing and knows nothing of boxes or images. Its files are made by the program in mkassets.
//
// # On disk
//
//	assets/<version>/                flock(2)ed, shared, by whoever starts programs from it
//	assets/<version>/coffer-sentry   program of the gvisor engine
//	assets/<version>/coffer-agent    first process in a box
//	assets/<version>/coffer-registry program that reaches registries
//	assets/<version>/scaffold.erofs  what a sandbox sees before the box's own root is mounted
//	assets/lock                      flock(2)ed by the process that takes a version out
//	assets/.new-*                    a version being taken out
//
// A version's directory appears whole or not at all. Other versions are left alone, until [Prune] finds that nothing runs from them.
package assets

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/klauspost/compress/zstd"

	"github.com/coffer-box/coffer/internal/disk"
	"github.com/coffer-box/coffer/internal/erofs"
)

//go:embed data
var embedded embed.FS

// ErrMissing says that this program was built without its embedded parts.
var ErrMissing = errors.New("this build has no embedded engine: run make build")

// Names of the embedded files; each stands compressed under its name with ".zst".
const (
	FileAgent    = "coffer-agent"
	FileSentry   = "coffer-sentry"
	FileRegistry = "coffer-registry"
	FileBase     = "base.tar"
	FileManifest = "manifest.json"

	fileScaffold = "scaffold.erofs"
)

// Manifest describes the embedded files. The generator writes it.
type Manifest struct {
	Version string          `json:"version"` // digest over all that follows
	GOARCH  string          `json:"goarch"`
	Files   map[string]File `json:"files"`
}

// File is one embedded file.
type File struct {
	Size   int64  `json:"size"`   // unpacked
	SHA256 string `json:"sha256"` // of the unpacked file
}

// Set is where the parts of one version are. They stay there until it is closed.
type Set struct {
	Version  string
	Sentry   string // paths
	Agent    string
	Registry string
	Scaffold string

	BaseDigest string // "sha256:…" of the archive of the image `base`
	src        fs.FS
	held       *os.File // the version's directory, with its lock
}

// Close lets go of the parts. What runs from them keeps its open files.
func (s Set) Close() error {
	if s.held == nil {
		return nil
	}
	return s.held.Close()
}

// Version returns the version of the embedded parts, and [ErrMissing] where there are none. It touches no disk.
func Version() (string, error) {
	m, err := readManifest(embedded)
	return m.Version, err
}

// Ensure returns the parts of this program's version, and takes them out into home first if need be.
func Ensure(ctx context.Context, home string) (Set, error) {
	return ensure(ctx, embedded, home)
}

// OpenBase returns the archive of the image `base`, unpacked, as a plain root file system.
func (s Set) OpenBase() (io.ReadCloser, error) {
	return openPacked(s.src, FileBase)
}

func readManifest(src fs.FS) (Manifest, error) {
	var m Manifest
	b, err := fs.ReadFile(src, "data/"+FileManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return m, ErrMissing
	}
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return m, fmt.Errorf("read the manifest of the embedded parts: %w", err)
	}
	for _, name := range []string{FileAgent, FileSentry, FileRegistry, FileBase} {
		if _, ok := m.Files[name]; !ok {
			return m, fmt.Errorf("%s is not embedded: %w", name, ErrMissing)
		}
	}
	if m.GOARCH != runtime.GOARCH {
		return m, fmt.Errorf("this coffer is for %[2]s, and the parts embedded in it are for %[1]s: build it with GOARCH=%[2]s make build", m.GOARCH, runtime.GOARCH)
	}
	return m, nil
}

func ensure(ctx context.Context, src fs.FS, home string) (Set, error) {
	m, err := readManifest(src)
	if err != nil {
		return Set{}, err
	}
	dir := filepath.Join(home, "assets", m.Version)
	set := Set{
		Version:    m.Version,
		Sentry:     filepath.Join(dir, FileSentry),
		Agent:      filepath.Join(dir, FileAgent),
		Registry:   filepath.Join(dir, FileRegistry),
		Scaffold:   filepath.Join(dir, fileScaffold),
		BaseDigest: "sha256:" + m.Files[FileBase].SHA256,
		src:        src,
	}
	for range holdTries {
		if set.hold(dir, m) {
			return set, nil
		}
		if err := set.takeOut(ctx, m, filepath.Dir(dir)); err != nil {
			return Set{}, fmt.Errorf("take out the embedded parts: %w", err)
		}
	}
	return Set{}, fmt.Errorf("take out the embedded parts: %s is removed again and again", dir)
}

// holdTries is how often a prune may be faster.
const holdTries = 10

// hold takes the lock that keeps the parts where they are, if all of them are there.
func (s *Set) hold(dir string, m Manifest) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	got, err := disk.TryShare(f)
	if got && err == nil {
		// The name may be another directory's by now.
		mine, merr := f.Stat()
		there, terr := os.Stat(dir)
		if merr == nil && terr == nil && os.SameFile(mine, there) && s.whole(m) {
			s.held = f
			return true
		}
	}
	f.Close()
	return false
}

// Prune removes the versions, but this program's own, that nothing is started from, and returns their names and the bytes they
// took. A sentry that runs keeps its open files and would not miss them; its shim, which may start another one, holds their lock. A
// program without embedded parts has no version of its own, and removes none.
func Prune(ctx context.Context, home string) (versions []string, freed int64, err error) {
	return prune(ctx, embedded, home)
}

func prune(ctx context.Context, src fs.FS, home string) (versions []string, freed int64, err error) {
	m, err := readManifest(src)
	if err != nil {
		return nil, 0, nil
	}
	parent := filepath.Join(home, "assets")
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	// Nobody takes a version out meanwhile.
	unlock, err := disk.Lock(ctx, filepath.Join(parent, "lock"))
	if err != nil {
		return nil, 0, err
	}
	defer unlock()
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil, 0, err
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || e.Name() == m.Version {
			continue
		}
		size, err := remove(filepath.Join(parent, e.Name()))
		freed += size
		errs = append(errs, err)
		if size > 0 {
			versions = append(versions, e.Name())
		}
	}
	return versions, freed, errors.Join(errs...)
}

// remove removes a directory of files that nobody holds, and returns its size.
func remove(dir string) (int64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if free, err := disk.TryLock(f); err != nil || !free {
		return 0, err
	}
	var size int64
	if err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			var fi fs.FileInfo
			fi, err = d.Info()
			if err == nil {
				size += fi.Size()
			}
		}
		return err
	}); err != nil {
		return 0, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return 0, err
	}
	return size, nil
}

// whole says if all files are there, with the right sizes. Their contents were checked when they were written, and the directory
// got its name only then.
func (s Set) whole(m Manifest) bool {
	for path, size := range map[string]int64{
		s.Sentry:   m.Files[FileSentry].Size,
		s.Agent:    m.Files[FileAgent].Size,
		s.Registry: m.Files[FileRegistry].Size,
		s.Scaffold: -1,
	} {
		fi, err := os.Stat(path)
		if err != nil || size >= 0 && fi.Size() != size || fi.Size() == 0 {
			return false
		}
	}
	return true
}

// takeOut makes the version's directory. One process does it, others wait and find it done.
func (s Set) takeOut(ctx context.Context, m Manifest, parent string) error {
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return err
	}
	unlock, err := disk.Lock(ctx, filepath.Join(parent, "lock"))
	if err != nil {
		return fmt.Errorf("wait for another process that takes them out: %w", err)
	}
	defer unlock()
	if s.whole(m) {
		return nil
	}
	// Only the holder of the lock makes these, so whatever there is belongs to nobody.
	if left, err := filepath.Glob(filepath.Join(parent, ".new-*")); err == nil {
		for _, dir := range left {
			os.RemoveAll(dir)
		}
	}
	tmp, err := os.MkdirTemp(parent, ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	// The jail's user, who is nobody on this host, must be able to run what is here.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	for _, name := range []string{FileSentry, FileAgent, FileRegistry} {
		if err := unpackTo(ctx, s.src, name, m.Files[name], filepath.Join(tmp, name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := writeScaffold(ctx, filepath.Join(tmp, FileAgent), filepath.Join(tmp, fileScaffold)); err != nil {
		return fmt.Errorf("%s: %w", fileScaffold, err)
	}
	if err := disk.SyncDir(tmp); err != nil {
		return err
	}
	dir := filepath.Dir(s.Sentry)
	if _, err := os.Lstat(dir); err == nil {
		// Something is missing in it. What runs from there keeps its open files.
		if err := os.Rename(dir, filepath.Join(tmp, "damaged")); err != nil {
			return err
		}
		keep := tmp + "-whole"
		if err := os.Mkdir(keep, 0o755); err != nil {
			return err
		}
		defer os.RemoveAll(keep)
		for _, name := range []string{FileSentry, FileAgent, FileRegistry, fileScaffold} {
			if err := os.Rename(filepath.Join(tmp, name), filepath.Join(keep, name)); err != nil {
				return err
			}
		}
		tmp = keep
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return disk.SyncDir(parent)
}

// scaffoldDirs are where the agent mounts things before the box's own root is there.
var scaffoldDirs = []string{"lower", "state", "newroot", "vol", "proc", "sys", "dev", "tmp"}

// writeScaffold makes the image that a sandbox starts in: the agent and places to mount on.
func writeScaffold(ctx context.Context, agent, path string) error {
	in, err := os.Open(agent)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	defer out.Close()
	w := erofs.NewWriter(out)
	data, err := w.Append(ctx, in, fi.Size())
	if err != nil {
		return err
	}
	root := newDir()
	for _, name := range scaffoldDirs {
		root.Children[name] = newDir()
	}
	root.Children["dev"].Children["pts"] = newDir()
	root.Children["tmp"].Mode |= 0o1777
	root.Children["agent"] = &erofs.Node{Mode: erofs.TypeRegular | 0o555, Data: data}
	if err := w.Finish(ctx, root, [16]byte{}); err != nil {
		return err
	}
	return out.Sync()
}

func newDir() *erofs.Node {
	return &erofs.Node{Mode: erofs.TypeDir | 0o755, Children: map[string]*erofs.Node{}}
}

// packedFile is an embedded file being unpacked.
type packedFile struct {
	*zstd.Decoder
	f fs.File
}

func (p packedFile) Close() error {
	p.Decoder.Close()
	return p.f.Close()
}

func openPacked(src fs.FS, name string) (io.ReadCloser, error) {
	f, err := src.Open("data/" + name + ".zst")
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrMissing, err)
	}
	z, err := zstd.NewReader(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return packedFile{z, f}, nil
}
