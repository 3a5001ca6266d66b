package guest

import (
	"fmt"
	"io"
	"path"
)

// cpio writes an initial file system in the kernel's "newc" format. The first error stays.
type cpio struct {
	w    io.Writer
	dirs map[string]bool
	ino  int
	err  error
}

// file writes a program or other file, and the directories that it is in.
func (c *cpio) file(name string, data []byte) {
	c.mkdir(path.Dir(name))
	c.add(name[1:], 0o100755, data)
}

func (c *cpio) mkdir(name string) {
	if name == "/" || c.dirs[name] {
		return
	}
	c.dirs[name] = true
	c.mkdir(path.Dir(name))
	c.add(name[1:], 0o040755, nil)
}

func (c *cpio) add(name string, mode uint32, data []byte) {
	c.ino++
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	c.write([]byte(head))
	c.write(data)
}

// write pads to four bytes, as headers and data both are.
func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	if c.err == nil {
		_, c.err = c.w.Write(make([]byte, -len(b)&3))
	}
}
