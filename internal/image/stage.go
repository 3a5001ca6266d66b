package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/coffer-box/coffer/internal/disk"
)

// stage is one load's own directory. Files in it are named by where they will go, with "_" for "/".
type stage struct {
	s    *Store
	dir  string
	lock *os.File

	mu   sync.Mutex        // layers may be fetched while others are unpacked
	made map[string]string // place in the store → file in the stage
}

// newStage makes a directory for one load, and sweeps those of loads that died.
func (s *Store) newStage(ctx context.Context) (*stage, error) {
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	// Under the store's lock nobody sees a stage between its making and its locking.
	defer unlock()
	s.sweep()
	dir, err := os.MkdirTemp(s.path("tmp"), "load-")
	if err != nil {
		return nil, fmt.Errorf("begin load: %w", err)
	}
	st := &stage{s: s, dir: dir, made: map[string]string{}}
	st.lock, err = os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		_, err = disk.TryLock(st.lock) // nobody else has it: whoever sweeps holds the store's lock
	}
	if err != nil {
		st.close()
		return nil, fmt.Errorf("begin load: %w", err)
	}
	return st, nil
}

// sweep removes what dead loads and writers of the index left, and tells how many bytes that were. The caller holds the store's lock.
func (s *Store) sweep() (freed int64) {
	loads, _ := os.ReadDir(s.path("tmp"))
	for _, e := range loads {
		dir := s.path("tmp", e.Name())
		if f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR, 0); err == nil {
			dead, err := disk.TryLock(f)
			f.Close()
			if !dead || err != nil {
				continue // at work
			}
		}
		s.log.Debug("sweep an unfinished load", "dir", dir)
		freed += s.discard(dir)
	}
	// Nobody else writes an index now.
	files, _ := os.ReadDir(s.dir)
	for _, e := range files {
		if strings.HasPrefix(e.Name(), ".index.json-") {
			freed += s.discard(s.path(e.Name()))
		}
	}
	return freed
}

// discard removes a file or directory that nobody needs. What has another name, in the store, is not counted.
func (s *Store) discard(path string) (freed int64) {
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if fi, err := d.Info(); err == nil && links(fi) == 1 {
				freed += diskSize(fi)
			}
		}
		return nil
	})
	if err := os.RemoveAll(path); err != nil {
		s.log.Warn("what is left of a load cannot be removed", "path", path, "error", err)
		return 0
	}
	return freed
}

// close removes the stage and whatever was not committed.
func (st *stage) close() {
	if err := os.RemoveAll(st.dir); err != nil {
		st.s.log.Warn("a load's directory cannot be removed", "dir", st.dir, "error", err)
	}
	if st.lock != nil {
		st.lock.Close()
	}
}

// temp makes a file that is no part of the result yet.
func (st *stage) temp() (*os.File, error) {
	return os.CreateTemp(st.dir, "part-")
}

// keep syncs and closes f and gives it a place in the store.
func (st *stage) keep(f *os.File, place string) error {
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return st.adopt(f.Name(), place)
}

func (st *stage) adopt(file, place string) error {
	return st.put(place, func(to string) error { return os.Rename(file, to) })
}

// link is adopt for a file that keeps its name.
func (st *stage) link(file, place string) error {
	return st.put(place, func(to string) error {
		err := os.Link(file, to)
		if errors.Is(err, fs.ErrExist) {
			err = errors.Join(os.Remove(to), os.Link(file, to))
		}
		return err
	})
}

// forget lets go of all that was shared or made.
func (st *stage) forget() {
	for place, file := range st.made {
		_ = os.Remove(file)
		delete(st.made, place)
	}
}

func (st *stage) put(place string, move func(to string) error) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	to := filepath.Join(st.dir, strings.ReplaceAll(place, "/", "_"))
	if err := move(to); err != nil {
		return err
	}
	st.made[place] = to
	return nil
}

// keepBytes gives small contents a place in the store.
func (st *stage) keepBytes(b []byte, place string) error {
	f, err := st.temp()
	if err != nil {
		return err
	}
	if _, err := f.Write(b); err != nil {
		f.Close()
		return err
	}
	return st.keep(f, place)
}

// share takes a file that the store has, and says if it has it.
func (st *stage) share(place string) bool {
	st.mu.Lock()
	_, ok := st.made[place]
	st.mu.Unlock()
	return ok || st.link(st.s.path(place), place) == nil
}

// shareRootfs takes a root file system that the store has whole. A removal may take it away between the one file and the other, and
// who died while they were moved to their places has left but some.
func (st *stage) shareRootfs(id string) bool {
	if !st.share(extraPlace(id)) {
		return false
	}
	head, err := st.readHead(id)
	if err != nil {
		return false
	}
	for _, place := range head.places(id) {
		if !st.share(place) {
			return false
		}
	}
	return true
}

// readHead reads that of a root file system which this load has made or shares, or else the store's.
func (st *stage) readHead(id string) (rootfsHead, error) {
	if path := st.place(extraPlace(id)); path != "" {
		return readHead(path)
	}
	return st.s.readHead(id)
}

// place returns where the stage has what will be at a place in the store.
func (st *stage) place(place string) string {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.made[place]
}

// commit moves everything to its place and records the images, as one step for all who look. It returns them as they are then.
func (st *stage) commit(ctx context.Context, entries []entry) ([]Image, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	unlock, err := st.s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	idx, err := st.s.readIndex()
	if err != nil {
		return nil, err
	}
	for place, file := range st.made {
		// Where both are links to one file rename does nothing, which is as good.
		if err := os.Rename(file, st.s.path(place)); err != nil {
			return nil, fmt.Errorf("store image: %w", err)
		}
	}
	for _, d := range []string{"blobs/sha256", "rootfs"} {
		if err := disk.SyncDir(st.s.path(d)); err != nil {
			return nil, fmt.Errorf("store image: %w", err)
		}
	}
	for _, e := range entries {
		idx.put(e)
	}
	if err := st.s.writeIndex(idx); err != nil {
		return nil, err
	}
	var imgs []Image
	seen := map[string]bool{}
	for _, e := range entries {
		if seen[e.ID] {
			continue
		}
		seen[e.ID] = true
		img, err := st.s.image(idx.byID(e.ID))
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", ShortID(e.ID), err)
		}
		imgs = append(imgs, img)
	}
	return imgs, nil
}

// blobPlace and the others name places in the store.
func blobPlace(digest string) string { return "blobs/sha256/" + strings.TrimPrefix(digest, "sha256:") }
func rootfsPlace(id string) string   { return "rootfs/" + id + ".erofs" }
func extraPlace(id string) string    { return "rootfs/" + id + ".extra" }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
