package main

// int80 makes a system call through the entrance for 32-bit programs.
func int80(nr, a, b, c uint32) (int32, bool) { return int80raw(nr, a, b, c), true }

//go:noescape
func int80raw(nr, a, b, c uint32) int32
