// Package helper is the part of the coffer program that is not for people: the processes it runs itself as, told apart by the
// first words of their command line.
package helper

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/coffer-box/coffer/internal/assets"
	"github.com/coffer-box/coffer/internal/boxfs"
	"github.com/coffer-box/coffer/internal/engine"
	"github.com/coffer-box/coffer/internal/engine/gvisor"
	"github.com/coffer-box/coffer/internal/home"
	"github.com/coffer-box/coffer/internal/image"
	"github.com/coffer-box/coffer/internal/jail"
	"github.com/coffer-box/coffer/internal/shim"
	"github.com/coffer-box/coffer/internal/supervise"
)

// Run runs the hidden command that the arguments name, if they name one, and returns its exit code. It must be called first of
// all, on the main goroutine, whose thread it keeps: supervision follows that thread's life.
func Run(args []string) (code int, mine bool) {
	if len(args) < 2 {
		return 0, false
	}
	switch {
	case args[0] == jail.Marker && args[1] == jail.Arg:
		return jail.Init(serve()), true
	case args[1] == supervise.ShimArg:
		runtime.LockOSThread()
		a, err := shim.ParseArgs(args[2:])
		if err != nil {
			fmt.Fprintln(os.Stderr, "coffer:", err)
			return 125, true
		}
		return shim.Main(a, []engine.Engine{gvisor.Engine{}}), true
	case args[1] == image.InstallBaseArg && len(args) == 3:
		if err := installBase(context.Background(), args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

// serve is the jail's file server. Root's jails run as id 1 of their namespace, the first of the ids that volumes are mapped to.
func serve() jail.ServeFunc {
	var quota *boxfs.Quota
	return func(s jail.FileServer, sock, root *os.File) (func() error, error) {
		o := boxfs.Options{Host: s.Host, ReadOnly: s.ReadOnly, IDOffset: uint32(os.Geteuid())}
		if s.Quota > 0 {
			if quota == nil {
				quota = boxfs.NewQuota(s.Quota)
			}
			if err := quota.Count(root); err != nil {
				return nil, err
			}
			o.Quota = quota
		}
		return func() error { return boxfs.Serve(sock, root, o) }, nil
	}
}

func installBase(ctx context.Context, root string) error {
	set, err := assets.Ensure(ctx, root)
	if err != nil {
		return err
	}
	defer set.Close()
	store, err := image.Open(home.Layout{Root: root}.Images(), nil)
	if err != nil {
		return err
	}
	_, err = store.EnsureBase(ctx, set.BaseDigest, func() (io.ReadCloser, error) { return set.OpenBase() })
	return err
}
