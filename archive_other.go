//go:build !linux

package coffer

import (
	"context"
	"io"
)

func (b *Box) archive(context.Context, io.Writer) error { return noEngine() }
