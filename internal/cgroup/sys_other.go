//go:build !linux

package cgroup

import "errors"

func onCgroupFS(string) bool { return false }

func killMembers(string) error { return errors.ErrUnsupported }
