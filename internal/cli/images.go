package cli

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coffer-box/coffer"
)

func (a *app) loadCmd() *cobra.Command {
	var input string
	c := &cobra.Command{Use: "load [flags] [PATH]", Short: "Load images from an OCI layout, or an archive of one or of `docker save`",
		Args: between(0, 1, ""), Long: "Load images from an OCI layout directory, an OCI archive or a docker archive (also compressed). Without a path, from standard input."}
	c.Flags().StringVarP(&input, "input", "i", "", "path to load from")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 1 {
			input = args[0]
		}
		var r io.Reader
		if input == "" || input == "-" {
			input = ""
			if isTerminal(a.in) {
				return errors.New("nothing to load: give a path, or an archive on standard input")
			}
			r = a.in
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			imgs, err := rt.LoadImage(c.Context(), input, r)
			for _, i := range imgs {
				fmt.Fprintln(a.out, "Loaded image:", imageName(i))
			}
			return err
		})
	}
	return c
}

func imageName(i coffer.Image) string {
	if len(i.Names) > 0 {
		return strings.Join(i.Names, ", ")
	}
	return i.ID
}

func (a *app) importCmd() *cobra.Command {
	var changes []string
	c := &cobra.Command{Use: "import [flags] PATH|- [NAME[:TAG]]", Short: "Make an image of a root file system, an archive or a directory",
		Args: between(1, 2, "archive or directory")}
	c.Flags().StringArrayVarP(&changes, "change", "c", nil, `set configuration as in a Dockerfile ('CMD sh', 'ENV A=b C="d e"')`)
	c.RunE = func(c *cobra.Command, args []string) error {
		var r io.Reader
		p, name := args[0], ""
		if len(args) > 1 {
			name = args[1]
		}
		if p == "-" {
			p, r = "", a.in
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			i, err := rt.ImportImage(c.Context(), p, r, name, changes)
			if err == nil {
				fmt.Fprintln(a.out, i.ID)
			}
			return err
		})
	}
	return c
}

func (a *app) imagesCmd() *cobra.Command {
	var quiet bool
	var f format
	c := &cobra.Command{Use: "images [flags]", Short: "List images", Args: noArgs(),
		Long: "List images. One that has lost files is shown as damaged in the place of its size: load it again, or remove it."}
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "show ids only")
	f.add(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			imgs, err := rt.Images(c.Context())
			if err != nil {
				return err
			}
			if quiet {
				for _, i := range imgs {
					fmt.Fprintln(a.out, shortID(i.ID))
				}
				return nil
			}
			return show(a.out, f, imgs, []column[coffer.Image]{
				{"NAME", func(i coffer.Image) string {
					if len(i.Names) == 0 {
						return "<none>"
					}
					return strings.Join(i.Names, ", ")
				}},
				{"IMAGE ID", func(i coffer.Image) string { return shortID(i.ID) }},
				{"CREATED", func(i coffer.Image) string { return ago(i.Created) }},
				{"SIZE", func(i coffer.Image) string {
					if i.Damaged != "" {
						return "damaged"
					}
					return size(i.Size)
				}},
			})
		})
	}
	return c
}

func shortID(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}

func (a *app) rmiCmd() *cobra.Command {
	return a.images(&cobra.Command{Use: "rmi IMAGE [IMAGE...]", Short: "Remove images", Args: between(1, -1, "image"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.eachImage(c.Context(), args, func(rt *coffer.Runtime, ref string) error {
				res, err := rt.RemoveImage(c.Context(), ref)
				a.removed(res)
				return err
			})
		}})
}

func (a *app) removed(r coffer.RemovedImages) {
	for _, n := range r.Untagged {
		fmt.Fprintln(a.out, "Untagged:", n)
	}
	for _, id := range r.Deleted {
		fmt.Fprintln(a.out, "Deleted:", id)
	}
}

func (a *app) pruneCmd() *cobra.Command {
	var images, force bool
	var filters []string
	c := &cobra.Command{Use: "prune [flags]", Short: "Remove boxes that do not run, and what is left over", Args: noArgs(),
		Long: "Remove boxes that do not run, what is left over of others and of pulls that were cut off, images without a name, and programs that\n" +
			"other versions of coffer have unpacked in this home and no box runs from."}
	c.Flags().BoolVarP(&images, "all", "a", false, "remove images that no box was made from, too")
	c.Flags().BoolVarP(&force, "force", "f", false, "do not ask")
	c.Flags().StringArrayVar(&filters, "filter", nil, "remove only boxes and images made before until=TIME (24h, 2026-01-31), or with label[!]=key[=value]")
	c.RunE = func(c *cobra.Command, _ []string) error {
		only, err := pruneFilter(filters)
		if err != nil {
			return err
		}
		what := "This removes every box that does not run, with its files."
		if only != nil {
			what = "This removes boxes that do not run, with their files."
		}
		if !force && isTerminal(a.in) && !a.confirm(what) {
			return nil
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			res, err := rt.Prune(c.Context(), coffer.PruneOptions{AllImages: images, Only: only})
			for _, n := range res.Boxes {
				fmt.Fprintln(a.out, "Removed box:", n)
			}
			for _, n := range res.Orphans {
				fmt.Fprintln(a.out, "Removed leftover:", n)
			}
			a.removed(res.Images)
			fmt.Fprintln(a.out, "Reclaimed:", size(res.Freed))
			return err
		})
	}
	return c
}

// pruneFilter reads what a prune is limited to; nil: to nothing.
func pruneFilter(filters []string) (func(labels map[string]string, created time.Time) bool, error) {
	var tests []func(map[string]string, time.Time) bool
	for _, s := range filters {
		k, v, _ := strings.Cut(s, "=")
		not := k == "label!"
		switch k {
		case "until":
			t, err := moment(v)
			if err != nil {
				return nil, fmt.Errorf("filter %q: %w", s, err)
			}
			tests = append(tests, func(_ map[string]string, created time.Time) bool { return created.Before(t) })
		case "label", "label!":
			lk, lv, valued := strings.Cut(v, "=")
			tests = append(tests, func(labels map[string]string, _ time.Time) bool {
				have, ok := labels[lk]
				return (ok && (!valued || have == lv)) != not
			})
		default:
			return nil, fmt.Errorf("unknown filter %q: use until or label", k)
		}
	}
	if len(tests) == 0 {
		return nil, nil
	}
	return func(labels map[string]string, created time.Time) bool {
		return !slices.ContainsFunc(tests, func(t func(map[string]string, time.Time) bool) bool { return !t(labels, created) })
	}, nil
}

// confirm asks a question that only "y" or "yes" affirms.
func (a *app) confirm(what string) bool {
	fmt.Fprint(a.err, what, " Go on? [y/N] ")
	line, _ := bufio.NewReader(a.in).ReadString('\n')
	return slices.Contains([]string{"y", "yes"}, strings.ToLower(strings.TrimSpace(line)))
}

func (a *app) infoCmd() *cobra.Command {
	var f format
	c := &cobra.Command{Use: "info [flags]", Short: "Show what this host and home are like", Args: noArgs()}
	f.addShort(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			i, err := rt.HostInfo(c.Context())
			if err != nil {
				return err
			}
			if f.how != "table" {
				return show(a.out, f, []coffer.HostInfo{i}, nil)
			}
			fmt.Fprintf(a.out, "Home:       %s\nInstance:   %s\nBoxes:      %d (%d running)\nImages:     %d\nKernel:     %s\nCgroups:    %s\nEngine:     %s\n",
				i.Home, i.Instance, i.Boxes, i.Running, i.Images, i.Kernel, i.Cgroups, i.Engine)
			for _, e := range i.Engines {
				state := "usable: " + e.Kernel
				if !e.Usable {
					state = "not usable: " + e.Reason + "; " + e.Install
				}
				fmt.Fprintf(a.out, "  %-9s %s\n", e.Name, state)
			}
			return nil
		})
	}
	return c
}

func (a *app) doctorCmd() *cobra.Command {
	var fix bool
	var f format
	c := &cobra.Command{Use: "doctor [flags]", Short: "Check the host and this home, and say what to do", Args: noArgs(),
		Long: "Check the host and this home, and say what to do. The exit code is 1 if something is wrong."}
	f.add(c)
	c.Flags().BoolVar(&fix, "fix", false, "move a damaged database aside and end what is left over")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg := coffer.Config{Home: a.home}
		findings, err := coffer.Doctor(c.Context(), cfg, fix)
		if err != nil {
			return err
		}
		if f.how != "table" {
			err = show(a.out, f, findings, nil)
		} else {
			a.showFindings(findings)
		}
		if slices.ContainsFunc(findings, func(f coffer.Finding) bool { return f.Problem }) {
			err = errors.Join(err, exitError(1))
		}
		return err
	}
	return c
}

func (a *app) showFindings(findings []coffer.Finding) {
	for _, f := range findings {
		mark := "ok  "
		if f.Problem {
			mark = "BAD "
		}
		fmt.Fprintf(a.out, "%s %s: %s\n", mark, f.Topic, f.Detail)
		if f.Fix != "" {
			fmt.Fprintf(a.out, "     → %s\n", f.Fix)
		}
	}
}

// build is what the version command shows.
type build struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func (a *app) versionCmd() *cobra.Command {
	var f format
	c := &cobra.Command{Use: "version [flags]", Short: "Show the version", Args: noArgs()}
	f.addShort(c)
	c.RunE = func(*cobra.Command, []string) error {
		b := build{Version: coffer.Version(), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
		if f.how != "table" {
			return show(a.out, f, []build{b}, nil)
		}
		_, err := fmt.Fprintf(a.out, "coffer %s (%s, %s/%s)\n", b.Version, b.Go, b.OS, b.Arch)
		return err
	}
	return c
}
