// Command embed runs a command in a box from a Go program, and shows that nothing of it is left.
//
//	go run ./examples/embed echo hi
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/coffer-box/coffer"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "embed:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 0 {
		args = []string{"uname", "-a"}
	}
	// COFFER_HELPER names the coffer program where it is neither beside this one nor in PATH.
	rt, err := coffer.Open(ctx, coffer.Config{Helper: os.Getenv("COFFER_HELPER")})
	if err != nil {
		return err
	}
	defer rt.Close()
	box, err := rt.Run(ctx, coffer.Spec{Image: coffer.BaseImage, Cmd: []string{"sleep", "600"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, box.Remove(context.WithoutCancel(ctx), coffer.Force())) }()

	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := box.Command(ctx, args[0], args[1:]...).Output()
	fmt.Print(string(out))
	return err
}
