package coffer

import (
	"context"
	"path/filepath"

	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/state"
)

// DiskUsage is what a home takes on disk. All sizes are in bytes, as the file system counts what is stored: holes are not.
type DiskUsage struct {
	Images      []ImageUsage `json:"images"`
	ImagesTotal int64        `json:"images_total"` // what several of them share counted once
	Boxes       []BoxUsage   `json:"boxes"`
	Programs    int64        `json:"programs"` // unpacked from coffer, of this and other versions
	Leftover    int64        `json:"leftover"` // parts of pulls that were cut off and the like; prune removes it
}

// ImageUsage is what one image takes.
type ImageUsage struct {
	image.Usage
	Boxes int `json:"boxes"` // that were made from it
}

// Own is what would be free without the image.
func (u ImageUsage) Own() int64 { return u.Size - u.Shared }

// BoxUsage is what one box takes besides its image: what it has written, its anonymous volumes and its log.
type BoxUsage struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Image  string `json:"image"`
	Status string `json:"status"`
	Size   int64  `json:"size"`
}

// Live tells if the box could not be removed without force.
func (u BoxUsage) Live() bool { return state.Phase(u.Status).Live() || u.Status == restarting }

// DiskUsage tells what the home takes on disk. While others change it, it is a look, not an account.
func (r *Runtime) DiskUsage(ctx context.Context) (DiskUsage, error) {
	var u DiskUsage
	images, total, other, err := r.images.Usage(ctx)
	if err != nil {
		return u, err
	}
	infos, err := r.List(ctx)
	if err != nil && infos == nil {
		return u, err
	}
	made := map[string]int{}
	for _, i := range infos {
		made[i.ImageID]++
		b := &Box{rt: r, id: i.ID, name: i.Name}
		u.Boxes = append(u.Boxes, BoxUsage{ID: i.ID, Name: i.Name, Image: i.Image, Status: i.Status, Size: b.DiskUse()})
	}
	for _, i := range images {
		u.Images = append(u.Images, ImageUsage{Usage: i, Boxes: made[i.ID]})
	}
	u.ImagesTotal = total
	u.Leftover = other + diskUse(r.home.Trash())
	u.Programs = diskUse(filepath.Join(r.home.Root, "assets"))
	return u, err
}
