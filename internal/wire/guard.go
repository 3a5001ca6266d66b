package wire

import (
	"encoding/binary"
	"errors"
	"io"
	"sync/atomic"
)

// Parts of yamux's frame header that the guard looks at.
const (
	muxHeader     = 12
	muxData       = 0
	muxWindow     = 1
	muxPing       = 2
	muxGoAway     = 3
	muxFlagSYN    = 1
	coalesceLimit = 64 << 10
)

var (
	errForeignStream = errors.New("peer opened a stream, which this side never accepts")
	errMuxPing       = errors.New("peer sent a ping, which neither side uses")
)

// guardConn stands between yamux and the connection.
//
// Reading, it follows the frames and ends the session on what yamux would answer with memory of ours: pings (a goroutine
// each), and, on the side that only opens streams, streams opened by the peer.
//
// Writing, it joins what yamux writes in pieces: a data frame's header with its body, and the announcement of a stream with the
// frame after it, which [Session.Open] sends at once. A small message costs one system call then, which matters most inside
// a user-space kernel.
type guardConn struct {
	conn     io.ReadWriteCloser
	acceptor bool

	hdr    [muxHeader]byte
	have   int    // bytes of hdr seen
	body   uint32 // bytes of the current data frame still to come
	broken error

	held []byte // bytes waiting for the next write; used by yamux's one sending goroutine only

	// Totals, for tests and statistics.
	reads, writes atomic.Uint64
}

func (g *guardConn) Read(p []byte) (int, error) {
	if g.broken != nil {
		return 0, g.broken
	}
	n, err := g.conn.Read(p)
	g.reads.Add(1)
	ok, bad := g.follow(p[:n])
	if bad != nil {
		g.broken = bad
		return ok, bad
	}
	return n, err
}

// follow walks over the frames in b and says how many bytes were fine.
func (g *guardConn) follow(b []byte) (int, error) {
	for i := 0; i < len(b); {
		if g.body > 0 {
			n := min(uint32(len(b)-i), g.body)
			g.body -= n
			i += int(n)
			continue
		}
		n := copy(g.hdr[g.have:], b[i:])
		g.have += n
		if g.have < muxHeader {
			return len(b), nil
		}
		start := i
		i += n
		g.have = 0
		flags := binary.BigEndian.Uint16(g.hdr[2:])
		switch g.hdr[1] {
		case muxData:
			g.body = binary.BigEndian.Uint32(g.hdr[8:])
		case muxPing:
			return start, errMuxPing
		}
		if flags&muxFlagSYN != 0 && !g.acceptor {
			return start, errForeignStream
		}
	}
	return len(b), nil
}

func (g *guardConn) Write(p []byte) (int, error) {
	if len(p) == muxHeader && len(g.held) < 1024 && holdable(p) {
		g.held = append(g.held, p...)
		return len(p), nil
	}
	if len(g.held) > 0 {
		if len(p) <= coalesceLimit {
			g.held = append(g.held, p...)
			err := g.flush()
			if err != nil {
				return 0, err
			}
			return len(p), nil
		}
		if err := g.flush(); err != nil {
			return 0, err
		}
	}
	g.writes.Add(1)
	return g.conn.Write(p)
}

// holdable reports whether a write of yamux is surely followed by another: the header of a data frame with a body, or the
// announcement of a stream. Nothing else may wait, the peer could be waiting for it.
func holdable(p []byte) bool {
	switch p[1] {
	case muxData:
		return binary.BigEndian.Uint32(p[8:]) > 0
	case muxWindow:
		return binary.BigEndian.Uint16(p[2:]) == muxFlagSYN
	}
	return false
}

func (g *guardConn) flush() error {
	g.writes.Add(1)
	_, err := g.conn.Write(g.held)
	g.held = g.held[:0]
	return err
}

func (g *guardConn) Close() error { return g.conn.Close() }
