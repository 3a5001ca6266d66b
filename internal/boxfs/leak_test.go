package boxfs

import (
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
)

// sameDescriptors fails the test if this process, client and server, has other descriptors than it had.
func sameDescriptors(t *testing.T, had []string) {
	t.Helper()
	if now := descriptors(t); !slices.Equal(now, had) {
		t.Errorf("descriptors:\n%s\nwere:\n%s", strings.Join(now, "\n"), strings.Join(had, "\n"))
	}
}

// operations are those that make the server open something; each lets go of what it got.
func operations(p *peer) map[string]func() error {
	closing := func(inode lisafs.Inode, err error) error {
		if err == nil {
			p.c.CloseFD(p.ctx, inode.ControlFD, true)
		}
		return err
	}
	opened := func(id lisafs.FDID, donated int, err error) error {
		if err == nil {
			p.c.CloseFD(p.ctx, id, true)
			if donated >= 0 {
				unix.Close(donated)
			}
		}
		return err
	}
	file, _ := p.at("file")
	return map[string]func() error{
		"walk": func() error { return closing(p.root.Walk(p.ctx, "file")) },
		"stat": func() error { _, err := p.root.WalkStat(p.ctx, []string{"dir", "below"}); return err },
		"open": func() error { return opened(file.OpenAt(p.ctx, unix.O_RDWR)) },
		"list": func() error { return opened(p.root.OpenAt(p.ctx, unix.O_RDONLY)) },
		"create": func() error {
			inode, id, donated, err := p.root.OpenCreateAt(p.ctx, "new", unix.O_RDWR, 0o400, lisafs.NoUID, lisafs.NoGID)
			return errors.Join(opened(id, donated, err), closing(inode, err))
		},
		"mkdir": func() error { return closing(p.root.MkdirAt(p.ctx, "new", 0o500, lisafs.NoUID, lisafs.NoGID)) },
		"mknod": func() error {
			return closing(p.root.MknodAt(p.ctx, "new", unix.S_IFREG, lisafs.NoUID, lisafs.NoGID, 0, 0))
		},
		"symlink": func() error { return closing(p.root.SymlinkAt(p.ctx, "new", "target", lisafs.NoUID, lisafs.NoGID)) },
	}
}

// TestOutOfDescriptors lets every step of every operation fail for want of a descriptor. What fails leaves nothing behind: no
// descriptor, no file, and no object that the connection would close a second time.
func TestOutOfDescriptors(t *testing.T) {
	var was unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	for name, o := range map[string]Options{"layer": {}, "volume": volume(), "bounded": {Quota: NewQuota(mib)}} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			if o.Quota != nil {
				count(t, o.Quota, y.root)
			}
			p := newPeer(t, y.root, o)
			p.put("file", "content")
			p.mkdir("dir")
			ops := operations(p)
			for _, op := range slices.Sorted(maps.Keys(ops)) {
				had := descriptors(t)
				failed := 0
				for allowed := uint64(0); ; allowed++ {
					free, err := unix.Dup(0)
					must(t, err)
					unix.Close(free)
					must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free) + allowed, Max: was.Max}))
					err = ops[op]()
					must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was))
					if err == nil {
						break
					}
					wants(t, op, err, unix.EMFILE)
					failed++
					sameDescriptors(t, had)
					if got := slices.Sorted(maps.Keys(p.list(p.root))); !slices.Equal(got, []string{"dir", "file"}) {
						t.Fatalf("%s left %v", op, got)
					}
					if failed > 10 {
						t.Fatalf("%s still fails with %d descriptors to spare", op, allowed)
					}
				}
				if failed == 0 {
					t.Errorf("%s needs no descriptor: this test has tried nothing", op)
				}
				sameDescriptors(t, had)
				if _, _, err := p.walk("new"); err == nil {
					flags := uint32(0)
					if op == "mkdir" {
						flags = unix.AT_REMOVEDIR
					}
					must(t, p.root.UnlinkAt(p.ctx, "new", flags))
				}
			}
			if o.Quota != nil {
				p.close()
				exact(t, o.Quota, y.root)
			}
		})
	}
}

// TestNothingStaysOpen ends connections whose client has closed nothing.
func TestNothingStaysOpen(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			had := descriptors(t)
			p := newPeer(t, y.root, o)
			must(t, p.c.StartChannels())
			f := p.put("file", "content")
			p.mkdir("dir")
			for range 20 {
				p.at("file")
				_, donated, err := f.OpenAt(p.ctx, unix.O_RDONLY)
				must(t, err)
				unix.Close(donated)
				_, _, _ = p.walk("none")
			}
			p.close()
			sameDescriptors(t, had)
		})
	}
}

// TestConversation keeps what the fuzzer starts from meaningful: the server does what is asked, but for what it must refuse.
func TestConversation(t *testing.T) {
	for name, o := range map[string]Options{"layer": {}, "volume": volume()} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			fill(t, y, o)
			answer, err := hostile(t, y.root, o, conversation())
			must(t, err)
			refused := map[int]unix.Errno{}
			for i := 0; len(answer) >= 8; i++ {
				n := binary.LittleEndian.Uint32(answer)
				if lisafs.MID(binary.LittleEndian.Uint16(answer[4:])) == lisafs.Error {
					refused[i] = unix.Errno(binary.LittleEndian.Uint32(answer[8:]))
				}
				answer = answer[8+n:]
			}
			want := map[int]unix.Errno{
				4: unix.EINVAL, 5: unix.EINVAL, 28: unix.EPERM, 29: unix.ENOTSOCK, 30: unix.EINVAL, 31: unix.EINVAL, 35: unix.EBADF,
			}
			if !maps.Equal(refused, want) {
				t.Errorf("refused: %v, want %v", refused, want)
			}
			y.untouched(t)
		})
	}
}

// TestBrokenProtocol sends a length that the protocol's reader does not survive. It ends the connection, not the process.
func TestBrokenProtocol(t *testing.T) {
	y := newYard(t)
	had := descriptors(t)
	if _, err := hostile(t, y.root, Options{}, []byte("\xff\xff\xff\xff\x01\x00\x00\x00")); err == nil {
		t.Error("not told")
	}
	sameDescriptors(t, had)
}
