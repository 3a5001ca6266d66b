// Package boxfs serves files of the host to a sandbox over gVisor's LISAFS protocol, from inside the jail. It knows two kinds of
// trees. A box's own layer, and an anonymous volume, keep every owner, mode, device number and link target that the guest gives,
// without any right on the host: each guest object is a plain file or directory of the serving user's, and what the guest sees of
// it stands in an extended attribute. On the host there is then never a setuid file, a device, a foreign owner or a symbolic link
// of a guest's making. A volume of the host's is passed through as it is. Symbolic links are never followed here, in either tree.
package boxfs

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/lisafs"
	"gvisor.dev/gvisor/pkg/unet"
)

// Options describes one tree.
type Options struct {
	// Host serves the tree as it is on the host; otherwise it is a box's own layer.
	Host bool
	// ReadOnly refuses every change, whatever the client believes.
	ReadOnly bool
	// Quota bounds what the tree takes, with those of others; nil: nothing does. It is for a box's own trees, and has counted this one.
	Quota *Quota
	// IDOffset is subtracted from owners that the server sees and added to those it sets, for id-mapped volumes.
	IDOffset uint32
}

// Serve serves the tree at root on a socket until the peer closes it. It takes over both files.
func Serve(sock, root *os.File, o Options) (err error) {
	defer root.Close()
	// Not for the program that is being started meanwhile.
	fd, err := unix.FcntlInt(sock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("file server socket: %w", err)
	}
	sock.Close()
	us, err := unet.NewSocket(fd)
	if err != nil {
		return fmt.Errorf("file server socket: %w", err)
	}
	srv := lisafs.NewServer()
	srv.SetHandlers(handlers(o))
	conn, err := srv.CreateConnection(us, "/", lisafs.ConnectionOpts{
		Readonly: o.ReadOnly, WalkStatSupported: true, SetAttrOnDeleted: true, AllocateOnDeleted: true, OpenOnDeleted: true,
	}, &tree{o: o, root: int(root.Fd())})
	if err != nil {
		return fmt.Errorf("file server connection: %w", err)
	}
	// The protocol's own reader trusts the length of a message. Whatever the client makes it do ends this connection alone: the same
	// process serves others.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("file server: the client broke the protocol: %v", p)
		}
	}()
	conn.Run()
	srv.Destroy()
	return nil
}

// tree implements [lisafs.ConnectionImpl].
type tree struct {
	o     Options
	root  int
	white whiteouts
}

// Mount implements [lisafs.ConnectionImpl].
func (t *tree) Mount(c *lisafs.Connection, node *lisafs.Node) (*lisafs.ControlFD, lisafs.Statx, int, error) {
	fd, err := t.reopenRoot()
	if err != nil {
		return nil, lisafs.Statx{}, -1, err
	}
	st, err := t.stat(fd)
	if err != nil {
		unix.Close(fd)
		return nil, lisafs.Statx{}, -1, err
	}
	if !t.o.Host && !t.o.ReadOnly {
		_ = t.o.Quota.naming([]int{t.root}, t.prepare) // while there is room; it is tried again before it is needed
	}
	f := &file{t: t, fd: fd, ino: t.o.Quota.hold(fd)}
	node.IncRef()
	f.ControlFD.Init(c, node, linux.FileMode(st.Mode), f)
	return f.FD(), st, -1, nil
}

func (t *tree) reopenRoot() (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(t.root, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.Openat(t.root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	// A volume that is a single file. What is not a plain file or directory is not served at all.
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, unix.EPERM
	}
	return reopen(t.root, unix.O_RDONLY|unix.O_NONBLOCK)
}

// MaxMessageSize implements [lisafs.ConnectionImpl].
func (t *tree) MaxMessageSize() uint32 { return lisafs.MaxMessageSize() }

// SupportedMessages implements [lisafs.ConnectionImpl].
func (t *tree) SupportedMessages() []lisafs.MID {
	var out []lisafs.MID
	for id, h := range handlers(t.o) {
		if h != nil && lisafs.MID(id) != lisafs.Error {
			out = append(out, lisafs.MID(id))
		}
	}
	return out
}

// handlers are those of the messages that are served, by number.
func handlers(o Options) []lisafs.RPCHandler {
	all := []lisafs.RPCHandler{
		lisafs.Error: lisafs.ErrorHandler, lisafs.Mount: lisafs.MountHandler, lisafs.Channel: lisafs.ChannelHandler,
		lisafs.FStat: lisafs.FStatHandler, lisafs.SetStat: lisafs.SetStatHandler, lisafs.Walk: lisafs.WalkHandler,
		lisafs.WalkStat: lisafs.WalkStatHandler, lisafs.OpenAt: lisafs.OpenAtHandler, lisafs.OpenCreateAt: lisafs.OpenCreateAtHandler,
		lisafs.Close: lisafs.CloseHandler, lisafs.FSync: lisafs.FSyncHandler, lisafs.PWrite: lisafs.PWriteHandler,
		lisafs.PRead: lisafs.PReadHandler, lisafs.MkdirAt: lisafs.MkdirAtHandler, lisafs.MknodAt: lisafs.MknodAtHandler,
		lisafs.SymlinkAt: lisafs.SymlinkAtHandler, lisafs.LinkAt: lisafs.LinkAtHandler, lisafs.FStatFS: lisafs.FStatFSHandler,
		lisafs.FAllocate: lisafs.FAllocateHandler, lisafs.ReadLinkAt: lisafs.ReadLinkAtHandler, lisafs.UnlinkAt: lisafs.UnlinkAtHandler,
		lisafs.RenameAt: lisafs.RenameAtHandler, lisafs.RenameAt2: lisafs.RenameAt2Handler, lisafs.Getdents64: lisafs.Getdents64Handler,
		lisafs.FGetXattr: lisafs.FGetXattrHandler, lisafs.FSetXattr: lisafs.FSetXattrHandler,
		lisafs.FListXattr: lisafs.FListXattrHandler, lisafs.FRemoveXattr: lisafs.FRemoveXattrHandler,
		// Every one of these is refused: nothing outside the box is reached by a socket of the host.
		lisafs.Connect: lisafs.ConnectHandler, lisafs.ConnectWithCreds: lisafs.ConnectWithCredsHandler, lisafs.BindAt: lisafs.BindAtHandler,
		lisafs.Listen: lisafs.ListenHandler, lisafs.Accept: lisafs.AcceptHandler,
	}
	if o.Host {
		all[lisafs.SetStat] = setStatOrFail
	}
	return all
}

// setStatOrFail answers with an error where an attribute could not be set. The guest's kernel does not look at the mask of those that
// failed where it caches nothing, as on a volume, and its programs would see a success.
func setStatOrFail(c *lisafs.Connection, comm lisafs.Communicator, n uint32) (uint32, error) {
	n, err := lisafs.SetStatHandler(c, comm, n)
	if err != nil {
		return 0, err
	}
	var resp lisafs.SetStatResp
	if _, ok := resp.CheckedUnmarshal(comm.PayloadBuf(n)); ok && resp.FailureMask != 0 {
		return 0, unix.Errno(resp.FailureErrNo)
	}
	return n, nil
}

// reopen opens what a descriptor refers to anew, with other rights. It goes through /proc, which in the jail is its own.
func reopen(fd, flags int) (int, error) {
	return unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), flags|unix.O_CLOEXEC, 0)
}
