package cli

import (
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/coffer-box/coffer"
)

func (a *app) systemCmd() *cobra.Command {
	c := &cobra.Command{Use: "system COMMAND", Short: "Work with the home as a whole", Args: knownCommand, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(a.dfCmd(), a.pruneCmd(), a.infoCmd(), a.eventsCmd())
	return c
}

// diskRow is one line of the summary.
type diskRow struct {
	Type        string `json:"type"`
	Total       int    `json:"total"`
	Active      int    `json:"active"`
	Size        int64  `json:"size"`        // bytes
	Reclaimable int64  `json:"reclaimable"` // bytes, at least
}

func (a *app) dfCmd() *cobra.Command {
	var verbose bool
	var f format
	c := &cobra.Command{Use: "df [flags]", Short: "Show what the home takes on disk", Args: noArgs(),
		Long: "Show what images, boxes and the rest of the home take on disk. What several images share is counted once; with -v it is shown for\n" +
			"every image and every box."}
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "show every image and every box")
	f.add(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			u, err := rt.DiskUsage(c.Context())
			if err != nil {
				return err
			}
			if verbose {
				return a.showDisk(f, u)
			}
			return show(a.out, f, diskRows(u), []column[diskRow]{
				{"TYPE", func(r diskRow) string { return r.Type }},
				{"TOTAL", func(r diskRow) string { return fmt.Sprint(r.Total) }},
				{"ACTIVE", func(r diskRow) string { return fmt.Sprint(r.Active) }},
				{"SIZE", func(r diskRow) string { return size(r.Size) }},
				{"RECLAIMABLE", func(r diskRow) string { return size(r.Reclaimable) }},
			})
		})
	}
	return c
}

func size(n int64) string { return units.HumanSize(float64(n)) }

func diskRows(u coffer.DiskUsage) []diskRow {
	images := diskRow{Type: "Images", Total: len(u.Images), Size: u.ImagesTotal}
	for _, i := range u.Images {
		if i.Boxes > 0 {
			images.Active++
		} else {
			images.Reclaimable += i.Own()
		}
	}
	boxes := diskRow{Type: "Boxes", Total: len(u.Boxes)}
	for _, b := range u.Boxes {
		boxes.Size += b.Size
		if b.Live() {
			boxes.Active++
		} else {
			boxes.Reclaimable += b.Size
		}
	}
	return []diskRow{images, boxes, {Type: "Programs", Size: u.Programs}, {Type: "Leftovers", Size: u.Leftover, Reclaimable: u.Leftover}}
}

func (a *app) showDisk(f format, u coffer.DiskUsage) error {
	if f.how != "table" {
		return show(a.out, f, []coffer.DiskUsage{u}, nil)
	}
	if err := show(a.out, f, u.Images, []column[coffer.ImageUsage]{
		{"IMAGE", func(i coffer.ImageUsage) string {
			if len(i.Names) == 0 {
				return "<none>"
			}
			return strings.Join(i.Names, ", ")
		}},
		{"IMAGE ID", func(i coffer.ImageUsage) string { return shortID(i.ID) }},
		{"SIZE", func(i coffer.ImageUsage) string { return size(i.Size) }},
		{"SHARED", func(i coffer.ImageUsage) string { return size(i.Shared) }},
		{"OWN", func(i coffer.ImageUsage) string { return size(i.Own()) }},
		{"BOXES", func(i coffer.ImageUsage) string { return fmt.Sprint(i.Boxes) }},
	}); err != nil {
		return err
	}
	fmt.Fprintln(a.out)
	if err := show(a.out, f, u.Boxes, []column[coffer.BoxUsage]{
		{"BOX", func(b coffer.BoxUsage) string { return b.Name }},
		{"BOX ID", func(b coffer.BoxUsage) string { return shortID(b.ID) }},
		{"IMAGE", func(b coffer.BoxUsage) string { return b.Image }},
		{"STATUS", func(b coffer.BoxUsage) string { return b.Status }},
		{"SIZE", func(b coffer.BoxUsage) string { return size(b.Size) }},
	}); err != nil {
		return err
	}
	fmt.Fprintf(a.out, "\nAll images: %s. Programs: %s. Leftovers: %s.\n", size(u.ImagesTotal), size(u.Programs), size(u.Leftover))
	return nil
}
