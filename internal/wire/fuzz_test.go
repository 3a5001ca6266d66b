package wire

import (
	"encoding/json"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/coffer-box/coffer/internal/spec"
)

func FuzzHeader(f *testing.F) {
	f.Add([]byte(`{"op":"exec","body":{"a":[1,2]},"nonce":"abc","parts":["stdin","stdout"]}`))
	f.Add([]byte(`{"op":"x","part":"stderr"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := ParseHeader(data)
		if err != nil {
			return
		}
		// What was accepted must survive a relay unchanged.
		b, err := frame(h, 2*MaxHeader+1024)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseHeader(b[4:])
		if err != nil {
			if len(b) > MaxHeader {
				return
			}
			t.Fatal(err)
		}
		opt := cmp.Transformer("json", func(r json.RawMessage) any { var v any; json.Unmarshal(r, &v); return v })
		if d := cmp.Diff(h, again, opt); d != "" && !(len(h.Parts) == 0 && len(again.Parts) == 0) {
			t.Fatal(d)
		}
	})
}

// FuzzSession lets both sides of a session meet garbage: nothing may panic, hang or stay behind.
func FuzzSession(f *testing.F) {
	f.Add([]byte("\x00\x01\x00\x02\x00\x00\x00\x01\x00\x00\x00\x00"), true)
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x06\x00\x00\x00\x02{}"), true)
	f.Add([]byte("\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0e\x00\x00\x00\x0a{\"op\":\"x\"}"), false)
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x28\x00\x00\x00\x24{\"body\":{\"exit\":{},\"output\":\"QUFB\"}}"), true)
	f.Add([]byte("\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), true)
	f.Fuzz(func(t *testing.T, data []byte, host bool) {
		a, b := sockets(t)
		go io.Copy(io.Discard, b)
		if host {
			s, err := NewClient(a)
			if err != nil {
				t.Fatal(err)
			}
			c := NewClientOf(s)
			checked := make(chan struct{})
			go func() {
				defer close(checked)
				if r, err := c.Check(t.Context(), spec.Process{}); err == nil && len(r.Output) > MaxCheckOutput {
					t.Errorf("%d bytes of a check's output", len(r.Output))
				}
			}()
			started := make(chan struct{})
			go func() {
				defer close(started)
				p, err := c.Start(t.Context(), ExecRequest{}, IO{Stdout: io.Discard, Stderr: io.Discard})
				if err == nil {
					p.Wait(t.Context())
				}
			}()
			b.Write(data)
			b.Close()
			end(t, started)
			end(t, checked)
			s.Close()
			return
		}
		s, err := NewServer(a)
		if err != nil {
			t.Fatal(err)
		}
		served := make(chan struct{})
		go func() {
			defer close(served)
			var m Meeting
			for {
				h, st, err := s.Accept(t.Context())
				if err != nil {
					return
				}
				if h.Part != PartControl {
					m.Join(h, st)
					continue
				}
				go Reply(st, nil, nil)
			}
		}()
		b.Write(data)
		b.Close()
		end(t, served)
		s.Close()
	})
}

func end(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("still not over")
	}
}
