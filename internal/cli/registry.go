package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/coffer-box/coffer"
)

// pullFlags say how an image is pulled, of pull, run and create.
type pullFlags struct {
	platform, progress string
	plainHTTP          bool
}

func (o *pullFlags) add(f *pflag.FlagSet) {
	f.StringVar(&o.platform, "platform", "", "platform of the image, os/arch[/variant] (default this host's)")
	f.StringVar(&o.progress, "progress", "auto", "how a pull is shown on standard error: auto, bars, plain, json, none")
}

func (o *pullFlags) addPlainHTTP(f *pflag.FlagSet) {
	f.BoolVar(&o.plainHTTP, "plain-http", false, "allow a registry without TLS, which anybody on the way can read and change")
}

func (a *app) pullCmd() *cobra.Command {
	var o pullFlags
	var quiet bool
	c := a.images(&cobra.Command{Use: "pull [flags] NAME[:TAG|@DIGEST]...", Short: "Pull images from their registries", Args: between(1, -1, "image"),
		Long: "Pull images from their registries. What is there already is not fetched again; a pull that was cut off is gone on with.\n" +
			"Mirrors, certificates and registries without TLS are settings in registries.json of the home."})
	o.add(c.Flags())
	o.addPlainHTTP(c.Flags())
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "show names only")
	c.RunE = func(c *cobra.Command, args []string) error {
		if quiet {
			o.progress = "none"
		}
		return a.eachImage(c.Context(), args, func(rt *coffer.Runtime, ref string) error {
			show, err := a.progress(o.progress)
			if err != nil {
				return err
			}
			img, changed, err := rt.Pull(c.Context(), ref, coffer.PullOptions{Platform: o.platform, PlainHTTP: o.plainHTTP, Progress: show})
			if err != nil {
				return err
			}
			if !quiet {
				for _, d := range img.Digests {
					fmt.Fprintln(a.out, "Digest:", d)
				}
				if changed {
					fmt.Fprintln(a.out, "Status: pulled", size(img.Size), "for", ref)
				} else {
					fmt.Fprintln(a.out, "Status: up to date:", ref)
				}
			}
			fmt.Fprintln(a.out, imageName(img))
			return nil
		})
	}
	return c
}

func (a *app) pushCmd() *cobra.Command {
	var o pullFlags
	var quiet bool
	c := a.images(&cobra.Command{Use: "push [flags] NAME[:TAG]...", Short: "Push images to the registries of their names", Args: between(1, -1, "image")})
	o.addPlainHTTP(c.Flags())
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "show digests only")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.eachImage(c.Context(), args, func(rt *coffer.Runtime, ref string) error {
			show := func(done, total int64) {}
			if !quiet && isTerminal(a.err) {
				show = func(done, total int64) {
					fmt.Fprintf(a.err, "\r%s: pushed %s of %s\x1b[K", ref, size(done), size(total))
				}
				defer fmt.Fprint(a.err, "\r\x1b[K")
			}
			digest, err := rt.Push(c.Context(), ref, coffer.PushOptions{PlainHTTP: o.plainHTTP, Progress: show})
			switch {
			case err != nil:
			case quiet:
				fmt.Fprintln(a.out, digest)
			default:
				fmt.Fprintf(a.out, "%s: digest %s\n", ref, digest)
			}
			return err
		})
	}
	return c
}

// eachImage tries fn on every target, prints what failed, and fails if anything did.
func (a *app) eachImage(ctx context.Context, refs []string, fn func(rt *coffer.Runtime, ref string) error) error {
	return a.with(ctx, func(rt *coffer.Runtime) error {
		failed := false
		for _, ref := range refs {
			if err := fn(rt, ref); err != nil {
				if len(refs) == 1 || ctx.Err() != nil {
					return err
				}
				failed = true
				a.complain(err)
			}
		}
		if failed {
			return exitError(codeFailed)
		}
		return nil
	})
}

func (a *app) tagCmd() *cobra.Command {
	return a.images(&cobra.Command{Use: "tag IMAGE NAME[:TAG]", Short: "Give an image another name", Args: exactly(2, "image and name"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.with(c.Context(), func(rt *coffer.Runtime) error { return rt.TagImage(c.Context(), args[0], args[1]) })
		}})
}

func (a *app) commitCmd() *cobra.Command {
	var o coffer.CommitOptions
	c := a.boxes(&cobra.Command{Use: "commit [flags] BOX [NAME[:TAG]]", Short: "Make an image of a box", Args: between(1, 2, "box"),
		Long: "Make an image of a box: its image, with what the box has written as one more layer. Volumes are no part of it. The configuration is\n" +
			"that of the image, with the changes given. Of a box that runs each file is taken as it is; stop it for what belongs together."}, 1)
	c.Flags().StringArrayVarP(&o.Changes, "change", "c", nil, `set configuration as in a Dockerfile ('CMD sh', 'ENV A=b C="d e"')`)
	c.Flags().StringVarP(&o.Author, "author", "a", "", "author of the image")
	c.Flags().StringVarP(&o.Message, "message", "m", "", "what the layer is about")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 2 {
			o.Name = args[1]
		}
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			img, err := b.Commit(c.Context(), o)
			if err == nil {
				fmt.Fprintln(a.out, img.ID)
			}
			return err
		})
	}
	return c
}

func (a *app) saveCmd() *cobra.Command {
	var output string
	c := a.images(&cobra.Command{Use: "save [flags] IMAGE...", Short: "Save images as an archive", Args: between(1, -1, "image"),
		Long: "Save images as a tar archive: an OCI layout that `docker load` takes, too. Without -o it is written to standard output."})
	c.Flags().StringVarP(&output, "output", "o", "", "file to write")
	c.RunE = func(c *cobra.Command, args []string) error {
		if output == "" && isTerminal(a.out) {
			return errors.New("an archive is not for a terminal: use -o, or redirect standard output")
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			if output == "" {
				return rt.SaveImages(c.Context(), a.out, args...)
			}
			return writeWhole(output, func(w io.Writer) error { return rt.SaveImages(c.Context(), w, args...) })
		})
	}
	return c
}

// writeWhole makes a file that is there only when all of it is; one that is there before stays until then. What is no plain file, such
// as a pipe, is written to as it is.
func writeWhole(path string, fn func(io.Writer) error) (err error) {
	if fi, err := os.Stat(path); err == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(fn(f), f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	if err = errors.Join(fn(f), f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func (a *app) loginCmd() *cobra.Command {
	var user, password string
	var stdin, plainHTTP bool
	c := &cobra.Command{Use: "login [flags] [REGISTRY]", Short: "Log in to a registry", Args: between(0, 1, ""),
		Long: "Log in to a registry (default Docker Hub). The credentials are tried, and kept in Docker's configuration or its credential helper\n" +
			"where there is one, else in auth.json of the home, which only you can read."}
	f := c.Flags()
	f.StringVarP(&user, "username", "u", "", "user name")
	f.StringVarP(&password, "password", "p", "", "password; others may see it among the processes: better --password-stdin")
	f.BoolVar(&stdin, "password-stdin", false, "read the password from standard input")
	f.BoolVar(&plainHTTP, "plain-http", false, "allow a registry without TLS, which anybody on the way can read and change")
	c.RunE = func(c *cobra.Command, args []string) error {
		host := ""
		if len(args) > 0 {
			host = args[0]
		}
		if stdin && password != "" {
			return errors.New("--password and --password-stdin exclude each other")
		}
		var err error
		if user == "" {
			if stdin {
				return errors.New("--password-stdin needs --username")
			}
			if user, err = a.ask(c.Context(), "Username: "); err != nil {
				return err
			}
		}
		switch {
		case stdin:
			password, err = readSecret(a.in)
		case password == "":
			password, err = a.askSecret(c.Context(), "Password: ")
		}
		if err != nil {
			return err
		}
		if user == "" || password == "" {
			return errors.New("user name and password must not be empty")
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			file, err := rt.Login(c.Context(), host, user, password, plainHTTP)
			if err != nil {
				return fmt.Errorf("login: %w", err)
			}
			fmt.Fprintln(a.out, "Login succeeded; credentials are kept by", file)
			return nil
		})
	}
	return c
}

func (a *app) logoutCmd() *cobra.Command {
	return &cobra.Command{Use: "logout [REGISTRY]", Short: "Forget the credentials for a registry", Args: between(0, 1, ""),
		RunE: func(c *cobra.Command, args []string) error {
			host := ""
			if len(args) > 0 {
				host = args[0]
			}
			return a.with(c.Context(), func(rt *coffer.Runtime) error {
				found, err := rt.Logout(c.Context(), host)
				if err == nil && !found {
					fmt.Fprintln(a.out, "There were no credentials to forget")
				} else if err == nil {
					fmt.Fprintln(a.out, "Credentials are forgotten")
				}
				return err
			})
		}}
}

// ask reads a line at a terminal.
func (a *app) ask(ctx context.Context, what string) (string, error) {
	return a.prompt(ctx, what, "--username and --password-stdin", func() (string, error) {
		line, err := bufio.NewReader(a.in).ReadString('\n')
		return strings.TrimSpace(line), err
	})
}

// askSecret is ask for what must not be shown.
func (a *app) askSecret(ctx context.Context, what string) (string, error) {
	defer fmt.Fprintln(a.err)
	return a.prompt(ctx, what, "--password-stdin", func() (string, error) {
		b, err := term.ReadPassword(int(a.in.Fd()))
		return string(b), err
	})
}

// prompt reads what somebody types, until ctx ends; the terminal is then as it was.
func (a *app) prompt(ctx context.Context, what, instead string, read func() (string, error)) (string, error) {
	if !isTerminal(a.in) {
		return "", fmt.Errorf("standard input is not a terminal: give %s", instead)
	}
	before, err := term.GetState(int(a.in.Fd()))
	if err != nil {
		return "", err
	}
	fmt.Fprint(a.err, what)
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		text, err := read()
		got <- answer{text, err}
	}()
	select {
	case r := <-got:
		return r.text, r.err
	case <-ctx.Done():
		_ = term.Restore(int(a.in.Fd()), before)
		return "", errInterrupted
	}
}

// readSecret reads all there is, without the end of the line.
func readSecret(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, 1<<20))
	return strings.TrimRight(string(b), "\r\n"), err
}

func (a *app) imageCmd() *cobra.Command {
	c := &cobra.Command{Use: "image COMMAND", Short: "Work with images", Args: knownCommand, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	named := func(sub *cobra.Command, name string) *cobra.Command {
		_, args, _ := strings.Cut(sub.Use, " ")
		sub.Use = strings.TrimSpace(name + " " + args)
		return sub
	}
	c.AddCommand(a.imageInspectCmd(), named(a.imagesCmd(), "ls"), named(a.rmiCmd(), "rm"), a.pullCmd(), a.pushCmd(), a.tagCmd(), a.saveCmd(), a.loadCmd(), a.importCmd())
	return c
}

func (a *app) imageInspectCmd() *cobra.Command {
	var f format
	c := a.images(&cobra.Command{Use: "inspect [flags] IMAGE...", Short: "Show all that is known of images", Args: between(1, -1, "image")})
	f.addShort(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		var all []coffer.Image
		err := a.eachImage(c.Context(), args, func(rt *coffer.Runtime, ref string) error {
			img, err := rt.GetImage(c.Context(), ref)
			if err == nil {
				all = append(all, img)
			}
			return err
		})
		if f.how == "table" {
			f.how = "json"
		}
		return errors.Join(show(a.out, f, all, nil), err)
	}
	return c
}

// progress is what shows the steps of a pull, whose last one ends it.
func (a *app) progress(how string) (func(coffer.PullProgress), error) {
	if how == "auto" {
		how = "plain"
		if isTerminal(a.err) {
			how = "bars"
		}
	}
	switch how {
	case "bars":
		var b *bars // made when there is something to show
		return func(p coffer.PullProgress) {
			if b == nil {
				b = newBars(a.err, 24, 80)
				if f, ok := a.err.(*os.File); ok {
					if w, h, err := term.GetSize(int(f.Fd())); err == nil {
						b.rows, b.cols = h, w
					}
				}
			}
			b.step(p)
		}, nil
	case "plain":
		l := lines{w: a.err, last: map[string]string{}}
		return l.step, nil
	case "json":
		enc := json.NewEncoder(a.err)
		return func(p coffer.PullProgress) { _ = enc.Encode(p) }, nil // the pull goes on without a reader
	case "none":
		return nil, nil
	}
	return nil, fmt.Errorf("--progress %q: use auto, bars, plain, json or none", how)
}

// lines tells of each layer once per status.
type lines struct {
	w    io.Writer
	last map[string]string
}

func (l *lines) step(p coffer.PullProgress) {
	last := l.last[p.Layer]
	switch {
	case p.Layer == "", p.Status == "waiting", p.Status == last && p.Error == "", last == "done":
		return
	case p.Status == "downloading" && last == "unpacking":
		return // it is both, in turn
	}
	l.last[p.Layer] = p.Status
	text := p.Status
	switch {
	case p.Error != "":
		text += ": " + p.Error
	case p.Status == "exists":
		text = "already there"
	case p.Status == "downloading":
		text += " " + size(p.Total)
	}
	fmt.Fprintf(l.w, "%s: %s\n", shortID(p.Layer), visible(text))
}
