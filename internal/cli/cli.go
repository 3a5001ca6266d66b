// Package cli is the coffer command line: Docker's words and flags over the public library. It holds no logic of its own about
// boxes, and is the only place where the program prints.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/coffer-box/coffer"
)

// Exit codes that are not a command's own.
const (
	codeFailed      = 125 // coffer itself could not do it
	codeInterrupted = 130
)

const exitCodes = `Exit codes:
  0        success
  124      run, exec: the command was ended after its timeout
  125      coffer itself failed; for commands with several targets, one of them failed
  126      run, exec: the command cannot be executed
  127      run, exec: the command was not found
  128+n    run, exec: the command was killed by signal n
  other    run, exec, start -a, attach: the command's own`

// app is what every command needs: streams, the home and how to open it.
type app struct {
	in       *os.File
	out, err io.Writer
	home     string
	debug    bool
}

// exitError carries an exit code and nothing to print.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Main runs the command line and returns the exit code.
func Main(args []string) int {
	// A suspended or closed reader must not kill a command half way; writes then fail like any other.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The second one ends the program at once, whatever that is busy with, unless a command has taken the signals for its box.
	context.AfterFunc(ctx, stop)
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr}
	root := a.root()
	root.SetArgs(args)
	return a.report(root.ExecuteContext(ctx))
}

// report is the one map from error to exit code.
func (a *app) report(err error) int {
	var exit exitError
	var start *coffer.StartError
	var ran *coffer.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		// What failed on the way to it has been told; what came with it has not.
		a.complainOfOthers(err)
		return int(exit)
	case errors.As(err, &ran):
		if ran.TimedOut {
			fmt.Fprintln(a.err, "coffer: the command was ended after its timeout")
			return 124
		}
		return ran.Code
	}
	a.complain(err)
	switch {
	case errors.As(err, &start):
		return start.ExitCode()
	case errors.Is(err, coffer.ErrCommandNotFound):
		return 127
	case errors.Is(err, coffer.ErrNotExecutable), errors.Is(err, coffer.ErrBadDir):
		return 126
	case errors.Is(err, context.Canceled):
		return codeInterrupted
	}
	return codeFailed
}

func (a *app) root() *cobra.Command {
	c := &cobra.Command{
		Use: "coffer", Short: "Run any OCI image as a box: an isolated workspace with a kernel of its own",
		Long:         "Run any OCI image as a box: a stateful, isolated workspace with a kernel of its own.\nWhen stop or rm return, nothing of the box is left.\n\n" + exitCodes,
		SilenceUsage: true, SilenceErrors: true, Version: coffer.Version(), Args: knownCommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.SuggestionsMinimumDistance = 2
	c.SetVersionTemplate("coffer {{.Version}}\n")
	c.PersistentFlags().StringVar(&a.home, "home", "", "state directory (default $COFFER_HOME, else /var/lib/coffer for root, else ~/.local/share/coffer)")
	c.PersistentFlags().BoolVar(&a.debug, "debug", false, "say on standard error what is done")
	c.SetOut(a.out)
	c.SetErr(a.err)
	c.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fmt.Errorf("%w: see '%s --help'", err, c.CommandPath())
	})
	c.AddCommand(a.runCmd(), a.createCmd(), a.startCmd(), a.stopCmd(), a.restartCmd(), a.killCmd(), a.rmCmd(), a.psCmd(), a.execCmd(),
		a.attachCmd(), a.logsCmd(), a.inspectCmd(), a.waitCmd(), a.topCmd(), a.statsCmd(), a.renameCmd(), a.cpCmd(), a.loadCmd(),
		a.importCmd(), a.imagesCmd(), a.imageCmd(), a.rmiCmd(), a.pullCmd(), a.pushCmd(), a.tagCmd(), a.saveCmd(), a.commitCmd(), a.loginCmd(), a.logoutCmd(), a.pruneCmd(), a.infoCmd(), a.doctorCmd(), a.eventsCmd(), a.systemCmd(), a.versionCmd())
	for _, sub := range c.Commands() {
		sub.DisableFlagsInUseLine = true
		check := sub.Args
		sub.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return fmt.Errorf("%w: usage: %s", err, c.UseLine())
			}
			return nil
		}
	}
	return c
}

func knownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := "see 'coffer --help'"
	if like := c.SuggestionsFor(args[0]); len(like) > 0 {
		hint = "did you mean " + strings.Join(like, " or ") + "? " + hint
	}
	return fmt.Errorf("unknown command %q: %s", args[0], hint)
}

// between counts the arguments of a command that calls them what; most < 0 means any number.
func between(least, most int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return fmt.Errorf("no %s given", what)
		case most >= 0 && len(args) > most:
			return fmt.Errorf("%q is one argument too many", args[most])
		}
		return nil
	}
}

func exactly(n int, what string) cobra.PositionalArgs { return between(n, n, what) }

func noArgs() cobra.PositionalArgs { return between(0, 0, "") }

// boxes makes a command complete the names of boxes, as many as it takes.
func (a *app) boxes(c *cobra.Command, most int) *cobra.Command {
	c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var names []string
		if most >= 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		_ = a.with(c.Context(), func(rt *coffer.Runtime) error {
			infos, err := rt.List(c.Context())
			for _, i := range infos {
				if !slices.Contains(args, i.Name) {
					names = append(names, i.Name)
				}
			}
			return err
		})
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	return c
}

// images is the same for images; after the first argument come files or nothing that is known.
func (a *app) images(c *cobra.Command) *cobra.Command {
	c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		names := []string{coffer.BaseImage}
		_ = a.with(c.Context(), func(rt *coffer.Runtime) error {
			imgs, err := rt.Images(c.Context())
			for _, i := range imgs {
				names = append(names, i.Names...)
			}
			return err
		})
		return names, cobra.ShellCompDirectiveNoFileComp
	}
	return c
}

// open opens the home.
func (a *app) open(ctx context.Context) (*coffer.Runtime, error) {
	c := coffer.Config{Home: a.home}
	if a.debug {
		c.Logger = slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	self, err := os.Executable()
	if err == nil {
		c.Helper = self
	}
	return coffer.Open(ctx, c)
}

// with opens the home for fn. It is left open, for the process ends next: the last to close a database waits for the disk, where
// it is enough that one in many commands does.
func (a *app) with(ctx context.Context, fn func(*coffer.Runtime) error) error {
	rt, err := a.open(ctx)
	if err != nil {
		return err
	}
	return fn(rt)
}

// each tries fn on every target, prints what failed, and fails if anything did.
func (a *app) each(ctx context.Context, refs []string, fn func(ref string, b *coffer.Box) error) error {
	return a.with(ctx, func(rt *coffer.Runtime) error {
		failed := false
		for _, ref := range refs {
			b, err := rt.Get(ctx, ref)
			if err == nil {
				err = fn(ref, b)
			}
			if err != nil {
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

// complainOfOthers prints the parts of a joined error that are more than an exit code.
func (a *app) complainOfOthers(err error) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return
	}
	for _, e := range joined.Unwrap() {
		if exit := exitError(0); errors.As(e, &exit) {
			a.complainOfOthers(e)
		} else {
			a.complain(e)
		}
	}
}

// complain prints an error, each part of a joined one on a line of its own.
func (a *app) complain(err error) {
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintln(a.err, "coffer:", visible(strings.TrimSuffix(line, "\n")))
	}
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
