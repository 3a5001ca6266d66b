package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/coffer-box/coffer"
)

func (a *app) startCmd() *cobra.Command {
	var attach, stdin bool
	var keys string
	c := a.boxes(&cobra.Command{Use: "start [flags] BOX [BOX...]", Short: "Start boxes", Args: between(1, -1, "box")}, -1)
	c.Flags().BoolVarP(&attach, "attach", "a", false, "connect to the box and exit with its code (one box)")
	c.Flags().BoolVarP(&stdin, "interactive", "i", false, "connect standard input too")
	addDetachKeys(c.Flags(), &keys)
	c.RunE = func(c *cobra.Command, args []string) error {
		detaching, err := parseKeys(keys)
		if err != nil {
			return err
		}
		if !attach && !stdin {
			return a.each(c.Context(), args, func(ref string, b *coffer.Box) error { return a.named(ref, b.Start(c.Context())) })
		}
		if len(args) > 1 {
			return errors.New("only one box can be attached to")
		}
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			i, err := b.Info(c.Context())
			if err != nil {
				return err
			}
			t, err := a.terminal(i.TTY, stdin && i.OpenStdin)
			if err != nil {
				return err
			}
			return a.foreground(c.Context(), t, detaching, func(ctx context.Context, o coffer.AttachOptions) (*coffer.Box, *coffer.Attachment, error) {
				att, err := b.StartAttached(ctx, o)
				return b, att, err
			})
		})
	}
	return c
}

// one opens the home and finds one box.
func (a *app) one(ctx context.Context, ref string, fn func(*coffer.Box) error) error {
	return a.with(ctx, func(rt *coffer.Runtime) error {
		b, err := rt.Get(ctx, ref)
		if err != nil {
			return err
		}
		return fn(b)
	})
}

// stopOptions adds -t to a command and returns what it stands for.
func stopOptions(c *cobra.Command) func() ([]coffer.StopOption, error) {
	var secs int
	c.Flags().IntVarP(&secs, "time", "t", 0, "seconds to wait before the kill (default: the box's own, 10)")
	return func() ([]coffer.StopOption, error) {
		if !c.Flags().Changed("time") {
			return nil, nil
		}
		d, err := seconds("time", secs)
		return []coffer.StopOption{coffer.WithTimeout(d)}, err
	}
}

// seconds is a flag's number of seconds.
func seconds(flag string, n int) (time.Duration, error) {
	const most = 10 * 365 * 24 * 60 * 60
	if n < 0 || n > most {
		return 0, fmt.Errorf("--%s %d: use a number of seconds from 0 to %d", flag, n, most)
	}
	return time.Duration(n) * time.Second, nil
}

func (a *app) stopCmd() *cobra.Command {
	c := a.boxes(&cobra.Command{Use: "stop [flags] BOX [BOX...]", Short: "Stop boxes; when it returns nothing of them lives",
		Args: between(1, -1, "box")}, -1)
	opts := stopOptions(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := opts()
		if err != nil {
			return err
		}
		return a.each(c.Context(), args, func(ref string, b *coffer.Box) error { return a.named(ref, b.Stop(c.Context(), o...)) })
	}
	return c
}

// named prints a target that was dealt with in the word that was given for it, as Docker does.
func (a *app) named(ref string, err error) error {
	if err == nil {
		fmt.Fprintln(a.out, ref)
	}
	return err
}

func (a *app) restartCmd() *cobra.Command {
	c := a.boxes(&cobra.Command{Use: "restart [flags] BOX [BOX...]", Short: "Stop boxes and start them again",
		Args: between(1, -1, "box")}, -1)
	opts := stopOptions(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := opts()
		if err != nil {
			return err
		}
		return a.each(c.Context(), args, func(ref string, b *coffer.Box) error { return a.named(ref, b.Restart(c.Context(), o...)) })
	}
	return c
}

func (a *app) killCmd() *cobra.Command {
	var sig string
	c := a.boxes(&cobra.Command{Use: "kill [flags] BOX [BOX...]", Short: "Send a signal to the main process of boxes",
		Args: between(1, -1, "box")}, -1)
	c.Flags().StringVarP(&sig, "signal", "s", "KILL", "signal to send")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.each(c.Context(), args, func(ref string, b *coffer.Box) error { return a.named(ref, b.Kill(c.Context(), sig)) })
	}
	return c
}

func (a *app) rmCmd() *cobra.Command {
	var force, volumes bool
	c := a.boxes(&cobra.Command{Use: "rm [flags] BOX [BOX...]", Short: "Remove boxes; when it returns nothing of them is left",
		Args: between(1, -1, "box")}, -1)
	c.Flags().BoolVarP(&force, "force", "f", false, "kill a box that runs; a box that is not there is no error")
	c.Flags().BoolVarP(&volumes, "volumes", "v", false, "remove anonymous volumes too")
	c.RunE = func(c *cobra.Command, args []string) error {
		var opts []coffer.RemoveOption
		if force {
			opts = append(opts, coffer.Force())
		}
		if volumes {
			opts = append(opts, coffer.WithVolumes())
		}
		if !force {
			return a.each(c.Context(), args, func(ref string, b *coffer.Box) error { return a.named(ref, b.Remove(c.Context(), opts...)) })
		}
		return a.with(c.Context(), func(rt *coffer.Runtime) error {
			failed := false
			for _, ref := range args {
				b, err := rt.Get(c.Context(), ref)
				if err == nil {
					err = b.Remove(c.Context(), opts...)
				}
				switch {
				case errors.Is(err, coffer.ErrNotFound):
				case err != nil:
					failed = true
					a.complain(err)
				default:
					fmt.Fprintln(a.out, ref)
				}
			}
			if failed {
				return exitError(codeFailed)
			}
			return nil
		})
	}
	return c
}

func (a *app) waitCmd() *cobra.Command {
	return a.boxes(&cobra.Command{Use: "wait BOX [BOX...]", Short: "Wait until boxes have ended and print their exit codes", Args: between(1, -1, "box"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.each(c.Context(), args, func(_ string, b *coffer.Box) error {
				st, err := b.Wait(c.Context())
				if err == nil {
					fmt.Fprintln(a.out, st.Code)
				}
				return err
			})
		}}, -1)
}

func (a *app) renameCmd() *cobra.Command {
	return a.boxes(&cobra.Command{Use: "rename BOX NAME", Short: "Give a box another name", Args: exactly(2, "box and new name"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.one(c.Context(), args[0], func(b *coffer.Box) error { return b.Rename(c.Context(), args[1]) })
		}}, 1)
}

func (a *app) attachCmd() *cobra.Command {
	var noStdin bool
	var keys string
	c := a.boxes(&cobra.Command{Use: "attach [flags] BOX", Short: "Connect to the main process of a running box", Args: exactly(1, "box"),
		Long: "Connect to the main process of a running box and exit with its code. What it has put out so far is shown first."}, 1)
	c.Flags().BoolVar(&noStdin, "no-stdin", false, "do not connect standard input")
	addDetachKeys(c.Flags(), &keys)
	c.RunE = func(c *cobra.Command, args []string) error {
		detaching, err := parseKeys(keys)
		if err != nil {
			return err
		}
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			i, err := b.Info(c.Context())
			if err != nil {
				return err
			}
			t, err := a.terminal(i.TTY, i.OpenStdin && !noStdin)
			if err != nil {
				return err
			}
			defer t.close()
			run, begun, giveUp := takeover(c.Context())
			defer giveUp(nil)
			t.detachable(detaching, giveUp)
			att, err := b.Attach(run, t.options(true))
			begun()
			if err != nil {
				return err
			}
			t.forward(run, att, giveUp)
			code, err := att.Wait(run)
			switch cause := context.Cause(run); {
			case err == nil:
			case errors.Is(cause, coffer.ErrDetached):
				t.detached()
				return nil
			case cause != nil:
				return cause
			default:
				return err
			}
			t.close()
			a.tellTruncated(att)
			if code != 0 {
				return exitError(code)
			}
			return nil
		})
	}
	return c
}

func (a *app) execCmd() *cobra.Command {
	var env, files []string
	var dir, user string
	var detach, tty, stdin bool
	var timeout time.Duration
	c := a.boxes(&cobra.Command{Use: "exec [flags] BOX COMMAND [ARG...]", Short: "Run a command in a running box", Args: between(2, -1, "box and command"),
		Long: "Run a command in a running box. The command and all of its session end with its timeout and with this program, unless -d is given.\n\n" + exitCodes}, 1)
	f := c.Flags()
	f.SetInterspersed(false)
	f.StringArrayVarP(&env, "env", "e", nil, "set an environment variable")
	f.StringArrayVar(&files, "env-file", nil, "read environment variables from a file")
	f.StringVarP(&dir, "workdir", "w", "", "working directory")
	f.StringVarP(&user, "user", "u", "", "user (name|uid[:group|gid])")
	f.BoolVarP(&detach, "detach", "d", false, "leave the command running in the background")
	f.BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&stdin, "interactive", "i", false, "connect standard input")
	f.DurationVar(&timeout, "timeout", 0, "kill the command after this time")
	c.RunE = func(c *cobra.Command, args []string) error {
		vars, err := environment(env, files)
		if err != nil {
			return err
		}
		if timeout < 0 || f.Changed("timeout") && timeout == 0 {
			return errors.New("--timeout must be more than 0; leave it out for none")
		}
		return a.one(c.Context(), args[0], func(b *coffer.Box) error {
			run, begun, giveUp := takeover(c.Context())
			defer giveUp(nil)
			cmd := b.Command(run, args[1], args[2:]...)
			cmd.Env, cmd.Dir, cmd.User, cmd.TTY, cmd.Detach, cmd.Timeout = vars, dir, user, tty, detach, timeout
			if detach {
				if err := cmd.Start(); err != nil {
					return err
				}
				return cmd.Release()
			}
			t, err := a.terminal(tty, stdin)
			if err != nil {
				return err
			}
			defer t.close()
			s := t.io()
			cmd.Stdin, cmd.Stdout, cmd.Stderr = s.Stdin, s.Stdout, s.Stderr
			cmd.Rows, cmd.Cols = t.size()
			err = cmd.Start()
			begun()
			if err != nil {
				return err
			}
			t.forward(run, cmd, giveUp)
			err = cmd.Wait()
			t.close()
			a.tellTruncated(cmd)
			return err
		})
	}
	return c
}
