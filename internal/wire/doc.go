// Package wire is the protocol of the hops between a client, the shim and the agent inside a box: streams with flow control of
// their own over one connection, a header that says what a stream is for, and the messages of every operation. The host's side
// treats the other end as hostile: everything is bounded, nothing the peer sends is trusted, and the peer opens no stream.
//
// A process is an attachment: one control stream for its start, signals, terminal size and exit, and one stream each for
// stdin, stdout and stderr. All carry the same nonce, and all are opened at once, so that a start costs one round trip. On a
// one-way stream the receiver closes its half when it no longer wants the bytes, and the sender takes that as a closed pipe.
//
// The package knows no processes, no sockets' names and no boxes; it starts nothing.
package wire
