package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Bounds of what one side is willing to hold for the other in a single piece.
const (
	MaxHeader  = 2 << 20   // an exec carries its arguments and environment, which the kernel bounds to about this much
	MaxMessage = 256 << 10 // everything on a control stream
	MaxReply   = 4 << 20   // the reply of a call: a process list may be long
)

// ErrTooLarge is returned when a frame is longer than its bound, before any of it is read or written.
var ErrTooLarge = errors.New("frame is larger than allowed")

// Parts of an attachment. The empty part is the control stream.
const (
	PartControl = ""
	PartStdin   = "stdin"
	PartStdout  = "stdout"
	PartStderr  = "stderr"
)

// Header is the first frame of every stream.
type Header struct {
	// Op says what the stream is for. All streams of one attachment carry the same Op, so that whoever routes streams can do it
	// by Op alone, and one at a time.
	Op   string          `json:"op"`
	Body json.RawMessage `json:"body,omitempty"`
	// Nonce ties the streams of one attachment together, Part says which of them this one is, and Parts (on the control stream)
	// which others there are.
	Nonce string   `json:"nonce,omitempty"`
	Part  string   `json:"part,omitempty"`
	Parts []string `json:"parts,omitempty"`
}

// check refuses what no honest peer sends, so that later code need not.
func (h Header) check() error {
	if h.Op == "" || len(h.Op) > 64 {
		return errors.New("header: op is empty or too long")
	}
	if len(h.Nonce) > 64 || len(h.Parts) > 3 {
		return errors.New("header: nonce or list of parts is too long")
	}
	for _, p := range append([]string{h.Part}, h.Parts...) {
		switch p {
		case PartControl, PartStdin, PartStdout, PartStderr:
		default:
			return fmt.Errorf("header: unknown part %q", p)
		}
	}
	return nil
}

// ParseHeader reads the JSON of a header.
func ParseHeader(data []byte) (Header, error) {
	var h Header
	if len(data) > MaxHeader {
		return h, fmt.Errorf("header: %w", ErrTooLarge)
	}
	if err := json.Unmarshal(data, &h); err != nil {
		return Header{}, fmt.Errorf("header: %w", err)
	}
	if err := h.check(); err != nil {
		return Header{}, err
	}
	return h, nil
}

// frame encodes v with its length in front, as one slice: one write is one packet on the wire.
func frame(v any, max int) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", v, err)
	}
	if len(data) > max {
		return nil, fmt.Errorf("encode %T of %d bytes: %w", v, len(data), ErrTooLarge)
	}
	return append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(data)), uint32(len(data))), data...), nil
}

// WriteMsg writes v as one length-prefixed JSON frame of at most max bytes.
func WriteMsg(w io.Writer, v any, max int) error {
	b, err := frame(v, max)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// ReadMsg reads one frame into v. It returns io.EOF only at a frame's boundary.
func ReadMsg(r io.Reader, v any, max int) error {
	data, err := readFrame(r, max)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %T: %w", v, err)
	}
	return nil
}

func readFrame(r io.Reader, max int) ([]byte, error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(n[:])
	if uint64(size) > uint64(max) {
		return nil, fmt.Errorf("read frame of %d bytes: %w", size, ErrTooLarge)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(r, data); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read frame: %w", err)
	}
	return data, nil
}
