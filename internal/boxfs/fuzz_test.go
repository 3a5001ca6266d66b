package boxfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/lisafs"
	"gvisor.dev/gvisor/pkg/log"
)

// message is one request as it goes over the socket.
func message(id lisafs.MID, payload ...any) []byte {
	var body bytes.Buffer
	for _, v := range payload {
		if s, ok := v.(string); ok {
			_ = binary.Write(&body, binary.LittleEndian, uint16(len(s)))
			body.WriteString(s)
			continue
		}
		_ = binary.Write(&body, binary.LittleEndian, v)
	}
	head := binary.LittleEndian.AppendUint32(nil, uint32(body.Len()))
	head = binary.LittleEndian.AppendUint16(head, uint16(id))
	return append(append(head, 0, 0), body.Bytes()...)
}

// conversation is what a client would send that tries everything. Objects are numbered in the order in which they are made: 1 is
// the root.
func conversation() []byte {
	type u16 = uint16
	type u32 = uint32
	type u64 = uint64
	create := func(dir u64, mode u16) []any {
		return []any{dir, u32(0), u32(0), mode, u16(0), u32(0)}
	}
	cat := func(a []any, b ...any) []any { return append(a, b...) }
	return slices.Concat(
		message(lisafs.Mount),
		message(lisafs.FStat, u64(1)),
		message(lisafs.Walk, u64(1), u16(2), "dir", "file"),                             // 2, 3
		message(lisafs.Walk, u64(1), u16(1), "link"),                                    // 4
		message(lisafs.Walk, u64(1), u16(1), ".."),                                      //
		message(lisafs.Walk, u64(1), u16(3), "link", "..", "secret"),                    // 5
		message(lisafs.WalkStat, u64(1), u16(3), "", "link", "secret"),                  //
		message(lisafs.OpenAt, u64(3), u32(unix.O_RDWR), u32(0)),                        // 6
		message(lisafs.OpenAt, u64(1), u32(unix.O_RDONLY), u32(0)),                      // 7
		message(lisafs.Getdents64, u64(7), int32(-4096), u32(0)),                        //
		message(lisafs.PWrite, u64(3), u64(6), u32(5), []byte("hello")),                 //
		message(lisafs.PRead, u64(0), u64(6), u32(100), u32(0)),                         //
		message(lisafs.OpenCreateAt, cat(create(1, 0o644), u32(unix.O_RDWR), "new")...), // 8, 9
		message(lisafs.MkdirAt, cat(create(1, 0o755), "made")...),                       // 10
		message(lisafs.MknodAt, cat(create(1, unix.S_IFREG|0o600), u32(1), u32(3), "node")...),
		message(lisafs.SymlinkAt, u64(1), u32(0), u32(0), "out", "../outside/secret"),
		message(lisafs.ReadLinkAt, u64(4)),
		message(lisafs.LinkAt, u64(10), u64(3), "linked"),
		message(lisafs.SetStat, u64(3), u32(unix.STATX_MODE|unix.STATX_SIZE|unix.STATX_UID), u32(0o4755), u32(0), u32(0), u64(7), u64(0), u64(0), u64(0), u64(0)),
		message(lisafs.FAllocate, u64(6), u64(0), u64(0), u64(64)),
		message(lisafs.FSetXattr, u64(3), u32(0), "user.a", "value"),
		message(lisafs.FGetXattr, u64(3), u32(100), "user.a"),
		message(lisafs.FListXattr, u64(3), u64(100)),
		message(lisafs.FRemoveXattr, u64(3), "user.a"),
		message(lisafs.FStatFS, u64(1)),
		message(lisafs.FSync, u16(1), u64(6)),
		message(lisafs.RenameAt, u64(1), u64(10), "new", "moved"),
		message(lisafs.RenameAt2, u64(1), u64(10), "node", "other", u32(unix.RENAME_NOREPLACE)),
		message(lisafs.BindAt, cat(create(1, 0o600), u32(1), "sock")...),
		message(lisafs.Connect, u64(3), u32(1), u32(0)),
		message(lisafs.Listen, u64(3), int32(1), u32(0)),
		message(lisafs.Accept, u64(3)),
		message(lisafs.Channel),
		message(lisafs.UnlinkAt, u64(10), u32(0), "moved"),
		message(lisafs.Close, u16(3), u64(6), u64(7), u64(3)),
		message(lisafs.FStat, u64(3)),
	)
}

// hostile sends bytes to a file server, with a descriptor that nobody asked for, and returns all that comes back.
func hostile(t *testing.T, root string, o Options, data []byte) (answer []byte, err error) {
	t.Helper()
	fd, done := serve(t, root, o)
	defer unix.Close(fd)
	gift, giftErr := os.Open("/dev/null")
	must(t, giftErr)
	defer gift.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		if len(data) > 0 {
			n, err := unix.SendmsgN(fd, data, unix.UnixRights(int(gift.Fd())), nil, unix.MSG_NOSIGNAL)
			for data = data[max(n, 0):]; err == nil && len(data) > 0; data = data[max(n, 0):] {
				n, err = unix.SendmsgN(fd, data, nil, nil, unix.MSG_NOSIGNAL)
			}
		}
		_ = unix.Shutdown(fd, unix.SHUT_WR)
	})
	buf, oob := make([]byte, 64<<10), make([]byte, 4096)
	for {
		n, oobn, _, _, err := unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		answer = append(answer, buf[:n]...)
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		must(t, err)
		for _, m := range messages {
			fds, err := unix.ParseUnixRights(&m)
			must(t, err)
			for _, got := range fds {
				checkDonated(t, root, got, o)
				unix.Close(got)
			}
		}
	}
	wg.Wait()
	return answer, over(t, done)
}

// checkDonated sees that a descriptor that left the server is a plain file of the tree, or the protocol's own.
func checkDonated(t *testing.T, root string, fd int, o Options) {
	t.Helper()
	link, err := os.Readlink(procPath(fd))
	must(t, err)
	if strings.HasPrefix(link, "/memfd:") || strings.HasPrefix(link, "socket:") {
		return
	}
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	if o.Quota != nil {
		t.Errorf("descriptor of %s, of a tree with a quota", link)
	}
	if !strings.HasPrefix(link, root+"/") || st.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Errorf("descriptor of %s, mode %o", link, st.Mode)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || o.ReadOnly && flags&unix.O_ACCMODE != unix.O_RDONLY {
		t.Errorf("descriptor of %s with flags %#x of a read-only tree, %v", link, flags, err)
	}
}

// panics collects what the protocol's own handlers caught.
type panics struct {
	mu  sync.Mutex
	got []string
}

func (p *panics) Emit(_ int, _ log.Level, _ time.Time, format string, args ...any) {
	if strings.HasPrefix(format, "panic in handler") {
		p.mu.Lock()
		p.got = append(p.got, fmt.Sprintf(format, args...))
		p.mu.Unlock()
	}
}

func (p *panics) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.got
	p.got = nil
	return got
}

// fill makes the tree that a hostile client is let loose on.
func fill(t *testing.T, y yard, o Options) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(y.root, "dir"), 0o700))
	must(t, os.WriteFile(filepath.Join(y.root, "dir/file"), []byte("content"), 0o600))
	if o.Host {
		must(t, os.Symlink("../outside", filepath.Join(y.root, "link")))
		must(t, unix.Mkfifo(filepath.Join(y.root, "pipe"), 0o600))
		return
	}
	link := filepath.Join(y.root, "link")
	must(t, os.WriteFile(link, []byte("../outside"), 0o600))
	must(t, os.Chmod(link, filePerm|os.FileMode(typeBits[unix.S_IFLNK])))
}

// FuzzServe feeds the server bytes as a guest would that has taken over its kernel. Whatever they are: nothing outside the tree is
// changed or shown, nothing panics, a read-only tree stays as it is, a quota is charged what is there, and no descriptor stays behind.
func FuzzServe(f *testing.F) {
	whole := conversation()
	f.Add(whole, true, false, false)
	f.Add(whole, false, false, false)
	f.Add(whole, true, true, false)
	f.Add(whole, false, false, true)
	for _, head := range [][]byte{
		[]byte("\xff\xff\xff\xff\x01\x00\x00\x00"), []byte("\xfc\xff\xff\xff\x01\x00\x00\x00"), []byte("\x00\x00\x00\x00\xff\xff\x00\x00"),
		[]byte("\x08\x00\x00\x00\x03\x00\x00\x00\x01"), []byte("\x00\x00\x00\x00\x00\x00\x00\x00"),
	} {
		f.Add(slices.Concat(message(lisafs.Mount), head), false, false, false)
	}
	limitFiles(f)
	var caught panics
	was := log.Log()
	log.SetTarget(&caught)
	f.Cleanup(func() { log.SetTarget(was.Emitter) })
	f.Fuzz(func(t *testing.T, data []byte, host, readOnly, quota bool) {
		if len(data) > 1<<16 || absurd(data) {
			t.Skip("longer than a message, or it asks for absurdly much")
		}
		o := Options{Host: host, ReadOnly: readOnly, IDOffset: uint32(os.Geteuid())}
		y := newYard(t)
		fill(t, y, o)
		if quota && !host {
			o.Quota = bounded(t, y, mib).Quota
		}
		before := ""
		if readOnly {
			before = describe(t, y.root)
		}
		had := descriptors(t)
		answer, _ := hostile(t, y.root, o, data)
		if bytes.Contains(answer, []byte(secret)) {
			t.Error("the secret came out")
		}
		if got := caught.take(); len(got) > 0 {
			t.Errorf("%s", got)
		}
		sameDescriptors(t, had)
		y.untouched(t)
		if readOnly && describe(t, y.root) != before {
			t.Errorf("now:\n%s\nwas:\n%s", describe(t, y.root), before)
		}
		if !host {
			checkStored(t, y.root)
		}
		if o.Quota != nil {
			exact(t, o.Quota, y.root)
		}
	})
}

// limitFiles keeps what the guest may do to its own disk from filling the machine's. The fuzzer has a file of 100 MiB.
func limitFiles(f *testing.F) {
	var was unix.Rlimit
	must(f, unix.Getrlimit(unix.RLIMIT_FSIZE, &was))
	signal.Ignore(unix.SIGXFSZ)
	must(f, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 128 << 20, Max: was.Max}))
	f.Cleanup(func() {
		must(f, unix.Setrlimit(unix.RLIMIT_FSIZE, &was))
		signal.Reset(unix.SIGXFSZ)
	})
}

// absurd tells a stream with a message so long that reading it would only use up memory.
func absurd(data []byte) bool {
	for len(data) >= 8 {
		n := binary.LittleEndian.Uint32(data)
		if n > 4<<20 && n < 0xfffffff8 {
			return true
		}
		if uint64(n) > uint64(len(data)-8) {
			return false
		}
		data = data[8+n:]
	}
	return false
}
