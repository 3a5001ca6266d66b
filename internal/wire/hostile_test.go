package wire

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"github.com/coffer-box/coffer/internal/spec"
)

// hostilePair is a client's session and the connection of its peer.
func hostilePair(t *testing.T) (*Session, net.Conn) {
	t.Helper()
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i := range fd {
		f := os.NewFile(uintptr(fd[i]), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	s, err := NewClient(conns[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conns[1].Close()
		s.Close()
	})
	return s, conns[1]
}

// TestStreamsThatPeerKeeps: a peer that fills every stream and closes none makes us hold little, and does not keep calls from ending.
func TestStreamsThatPeerKeeps(t *testing.T) {
	s, peer := hostilePair(t)
	cfg := yamux.DefaultConfig()
	cfg.EnableKeepAlive, cfg.MaxStreamWindowSize, cfg.LogOutput = false, window, io.Discard
	mux, err := yamux.Server(peer, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer mux.Close()
	go func() {
		for {
			st, err := mux.AcceptStream()
			if err != nil {
				return
			}
			go func() {
				_, _ = st.Write(append([]byte{0xff, 0xff, 0xff, 0xff}, make([]byte, 1<<20)...))
			}()
		}
	}()
	c := NewClientOf(s)
	refused := 0
	for range 2 * maxLingering {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		if refused > 0 {
			cancel()
		}
		err := c.Call(ctx, OpPing, nil, nil)
		if cancel(); errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			refused++
		} else if !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
	}
	if refused != maxLingering {
		t.Errorf("%d calls were refused, want %d", refused, maxLingering)
	}
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapInuse > 100<<20 {
		t.Errorf("%d MiB held", m.HeapInuse>>20)
	}
	mux.Close()
	<-s.Done()
	if err := c.Call(t.Context(), OpPing, nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the session's end: %v", err)
	}
}

// TestCheckOfAHostilePeer: what a box says of a check is held only as far as it may be shown.
func TestCheckOfAHostilePeer(t *testing.T) {
	client, server := pair(t)
	for _, tc := range []struct {
		size, kept int
		want       error
	}{{100, 100, nil}, {MaxCheckOutput, MaxCheckOutput, nil}, {100 << 10, MaxCheckOutput, nil}, {MaxMessage, 0, ErrTooLarge}} {
		go func() {
			if _, s, err := server.Accept(t.Context()); err == nil {
				_ = Reply(s, CheckReply{Output: make([]byte, tc.size)}, nil)
			}
		}()
		got, err := NewClientOf(client).Check(t.Context(), spec.Process{})
		if !errors.Is(err, tc.want) || len(got.Output) != tc.kept || got.Cut != (tc.kept < tc.size && err == nil) {
			t.Errorf("%d bytes: kept %d, cut %v, %v", tc.size, len(got.Output), got.Cut, err)
		}
	}
}

// TestPeerThatReadsNothing: a call ends with its context though nothing can be sent any more.
func TestPeerThatReadsNothing(t *testing.T) {
	s, peer := hostilePair(t)
	c := NewClientOf(s)
	// The announcement is let through, and then the connection filled.
	fill, err := s.Open(t.Context(), Header{Op: OpPing})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	called := make(chan error, 1)
	go func() { called <- c.Call(ctx, OpPing, nil, nil) }()
	// Both have their header out; the second waits for its answer.
	if _, err := io.ReadFull(peer, make([]byte, 2*(muxHeader+muxHeader+4+len(`{"op":"ping"}`)))); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = fill.Write(make([]byte, window)) }()
	fd, err := peer.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for had := -1; ; time.Sleep(10 * time.Millisecond) {
		n := 0
		_ = fd.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		if n > 0 && n == had {
			break
		}
		had = n
	}
	cancel()
	select {
	case err := <-called:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the call did not end with its context")
	}
	closed := make(chan error, 1)
	go func() { closed <- fill.Close() }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Error("close waits")
	}
}
