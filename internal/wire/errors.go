package wire

import (
	"errors"
	"fmt"
)

// Code names a kind of error across the wire.
type Code string

const (
	CodeNotFound      Code = "command-not-found"
	CodeNotExecutable Code = "command-not-executable"
	CodeNoUser        Code = "no-such-user"
	CodeBadDir        Code = "bad-working-directory"
	CodeNoFile        Code = "no-such-file"
	CodeInvalid       Code = "invalid-request"
	CodeStopping      Code = "stopping"
	CodeUnknownOp     Code = "unknown-operation"
	CodeFailed        Code = "failed"
)

// Error is an error that crossed the wire. errors.Is compares codes with the sentinels below.
type Error struct {
	Code Code   `json:"code"`
	Msg  string `json:"msg,omitempty"`
}

// Kinds of errors that callers tell apart.
var (
	ErrCommandNotFound = &Error{Code: CodeNotFound}
	ErrNotExecutable   = &Error{Code: CodeNotExecutable}
	ErrNoUser          = &Error{Code: CodeNoUser}
	ErrBadDir          = &Error{Code: CodeBadDir}
	ErrNoFile          = &Error{Code: CodeNoFile}
	ErrInvalid         = &Error{Code: CodeInvalid}
	ErrStopping        = &Error{Code: CodeStopping}
	ErrUnknownOp       = &Error{Code: CodeUnknownOp}
)

func (e *Error) Error() string {
	if e.Msg == "" {
		return string(e.Code)
	}
	return e.Msg
}

// Is makes any two errors of one code the same to errors.Is.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// ExitCode is what a shell would exit with: 127 for a command that is not there, 126 for one that cannot be run, and 125 for
// everything that is not about the command.
func (e *Error) ExitCode() int {
	switch e.Code {
	case CodeNotFound:
		return 127
	case CodeNotExecutable, CodeBadDir:
		return 126
	}
	return 125
}

// Errorf makes an error that keeps its code across the wire.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// maxErrorText keeps an error, which may quote what a peer or a user sent, well inside a message.
const maxErrorText = 8 << 10

// asError prepares any error for the wire.
func asError(err error) *Error {
	if err == nil {
		return nil
	}
	out := &Error{Code: CodeFailed, Msg: err.Error()}
	if e, ok := errors.AsType[*Error](err); ok {
		out.Code = e.Code
	}
	if len(out.Msg) > maxErrorText {
		out.Msg = out.Msg[:maxErrorText] + "…"
	}
	return out
}
