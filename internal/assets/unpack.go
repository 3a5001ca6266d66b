package assets

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// unpackTo writes an embedded file to path, checked and synced.
func unpackTo(ctx context.Context, src fs.FS, name string, want File, path string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	in, err := openPacked(src, name)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	defer out.Close()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), in)
	if err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); n != want.Size || got != want.SHA256 {
		return fmt.Errorf("it is damaged: %d bytes, sha256 %s; build the program again", n, got)
	}
	// The umask of whoever runs first must not decide who can run it.
	if err := out.Chmod(0o555); err != nil {
		return err
	}
	return out.Sync()
}
