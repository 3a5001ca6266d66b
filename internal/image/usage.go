package image

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
)

// Usage is what one image takes on disk, in bytes: its root file system, and what a registry or archive gave it as.
type Usage struct {
	ID     string   `json:"id"`
	Names  []string `json:"names,omitempty"`
	Size   int64    `json:"size"`   // all that it needs
	Shared int64    `json:"shared"` // of that, what other images need, too
}

// Usage tells what every image takes, in the order of [Store.List], what all of them take together, and what is in the store that
// belongs to none: parts of pulls that were cut off, for instance.
func (s *Store) Usage(ctx context.Context) (images []Usage, total, other int64, err error) {
	imgs, err := s.List(ctx)
	if err != nil {
		return nil, 0, 0, err
	}
	needs := make([]map[string]bool, len(imgs))
	users := map[string]int{} // of a place
	for i, img := range imgs {
		needs[i] = map[string]bool{}
		places, _ := s.places(&entry{ID: img.ID, Manifest: img.Manifest, Rootfs: img.RootfsID}) // of one that is damaged, what is known
		for _, p := range places {
			if !needs[i][p] {
				needs[i][p] = true
				users[p]++
			}
		}
	}
	sizes, other := map[string]int64{}, int64(0)
	for _, d := range []string{"blobs", "rootfs", "pull", "tmp"} {
		err := filepath.WalkDir(s.path(d), func(path string, e fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil || e.IsDir() {
				return nil // gone by now
			}
			fi, err := e.Info()
			if err != nil {
				return nil
			}
			place, err := filepath.Rel(s.dir, path)
			if err != nil {
				return err
			}
			switch place = filepath.ToSlash(place); {
			case users[place] > 0:
				sizes[place] = diskSize(fi)
				total += diskSize(fi)
			case d != "tmp" || links(fi) == 1: // a load's links are of what is counted where it is
				other += diskSize(fi)
			}
			return nil
		})
		if err != nil && !os.IsNotExist(err) {
			return nil, 0, 0, err
		}
	}
	for i, img := range imgs {
		u := Usage{ID: img.ID, Names: img.Names}
		for p := range needs[i] {
			u.Size += sizes[p]
			if users[p] > 1 {
				u.Shared += sizes[p]
			}
		}
		images = append(images, u)
	}
	return images, total, other, nil
}
