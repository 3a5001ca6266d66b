// Coffer-agent is the first process inside a box. The engine starts it with the stream to the shim as descriptor 3.
package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/agent"
)

// streamFD is where every engine puts the stream to the shim.
const streamFD = 3

func main() {
	agent.RunHelper(os.Args)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(log); err != nil {
		log.Error("agent failed", "err", err)
		os.Exit(1)
	}
}

func run(log *slog.Logger) error {
	conn, err := stream()
	if err != nil {
		return err
	}
	return agent.Run(context.Background(), agent.Config{Conn: conn, Rootfs: agent.NewRootfs(), Log: log})
}

func stream() (io.ReadWriteCloser, error) {
	unix.CloseOnExec(streamFD)
	if err := unix.SetNonblock(streamFD, true); err != nil {
		return nil, errors.New("descriptor 3 is not open: the agent is started by an engine, not by hand")
	}
	return os.NewFile(streamFD, "shim"), nil
}
