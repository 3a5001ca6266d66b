// Package courier has errands to registries done by a program of their own, coffer-registry: what it is asked, what it answers, and how it
// is run. What reaches networks is not linked with what starts boxes, which would take a fifth longer to start itself (docs/internals.md).
//
// A request is one JSON value on the program's standard input, which stays open for as long as anybody wants the errand done; its end
// calls it off. The answer is JSON values on standard output: steps, and at last a result. The package knows no protocol of registries;
// the errand itself is in its directory server.
package courier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/coffer-box/coffer/internal/image"
)

// What there is to do.
const (
	Pull   = "pull"
	Push   = "push"
	Login  = "login"
	Logout = "logout"
)

// Request is one errand.
type Request struct {
	Op        string `json:"op"`
	Home      string `json:"home"` // with the images, and the settings of registries
	UserAgent string `json:"user_agent,omitempty"`
	Ref       string `json:"ref,omitempty"`      // of a pull or push: the name of the image
	Platform  string `json:"platform,omitempty"` // of a pull; empty: this host's
	Registry  string `json:"registry,omitempty"` // of a login or logout, as people name it; empty: Docker Hub
	User      string `json:"user,omitempty"`
	Password  string `json:"password,omitempty"`
	PlainHTTP bool   `json:"plain_http,omitempty"`
}

// Result is how an errand came out.
type Result struct {
	ImageID string `json:"image_id,omitempty"` // of a pull
	Changed bool   `json:"changed,omitempty"`
	Digest  string `json:"digest,omitempty"` // of a push
	File    string `json:"file,omitempty"`   // of a login
	Found   bool   `json:"found,omitempty"`  // of a logout
	Error   string `json:"error,omitempty"`
	Kind    string `json:"kind,omitempty"` // of the error, if callers tell it from others
}

// Answer is one of the values that come back.
type Answer struct {
	Step   *image.Progress `json:"step,omitempty"`
	Pushed *Pushed         `json:"pushed,omitempty"`
	Result *Result         `json:"result,omitempty"`
}

// Pushed is how far a push has come, in bytes.
type Pushed struct {
	Done  int64 `json:"done"`
	Total int64 `json:"total"`
}

// kind is a kind of error that callers tell apart.
type kind struct {
	name string
	is   error
}

// kinds are all of them. Of an error that is of several the first counts.
func kinds() []kind {
	return []kind{
		{"denied", image.ErrDenied}, {"not offered", image.ErrNotOffered}, {"not found", image.ErrNotFound}, {"ambiguous", image.ErrAmbiguous},
		{"too large", image.ErrTooLarge}, {"format", image.ErrFormat}, {"digest", image.ErrDigest},
		{"read-only", syscall.EROFS}, {"permission", os.ErrPermission}, {"canceled", context.Canceled},
	}
}

// Fail notes an error in a result.
func (r *Result) Fail(err error) {
	r.Error = err.Error()
	for _, k := range kinds() {
		if errors.Is(err, k.is) {
			r.Kind = k.name
			return
		}
	}
}

// remoteError is an error that came in a result.
type remoteError struct {
	text string
	is   error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }

// patience is how long a program may take to clean up after an errand that was called off.
const patience = 5 * time.Second

// Run has the program cmd, which is not started yet, do an errand. It calls steps for what is answered before the result. When ctx ends
// the errand is called off.
func Run(ctx context.Context, cmd *exec.Cmd, req Request, steps func(Answer)) (Result, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return Result{}, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return Result{}, err
	}
	var words strings.Builder
	cmd.Stderr = &words
	// A signal from the terminal is for the program that runs this one, which then calls the errand off.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second // for who else has its standard error open
	if err := cmd.Start(); err != nil {
		return Result{}, fmt.Errorf("start the program that reaches registries: %w", err)
	}
	done := make(chan struct{})
	defer close(done)
	stop := context.AfterFunc(ctx, func() {
		in.Close()
		select {
		case <-done:
		case <-time.After(patience):
			// With what it has started: a helper for credentials may wait for a person.
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}
	})
	defer stop()
	err = json.NewEncoder(in).Encode(req)
	var res *Result
	for d := json.NewDecoder(out); err == nil && res == nil; {
		var a Answer
		if err = d.Decode(&a); err == nil {
			if res = a.Result; res == nil {
				steps(a)
			}
		}
	}
	in.Close()
	_, _ = io.Copy(io.Discard, out)
	werr := cmd.Wait()
	switch {
	case res != nil && res.Error != "" && ctx.Err() != nil:
		return *res, ctx.Err()
	case res != nil && res.Error != "":
		e := &remoteError{text: res.Error}
		for _, k := range kinds() {
			if k.name == res.Kind {
				e.is = k.is
			}
		}
		return *res, e
	case res != nil:
		return *res, nil
	case ctx.Err() != nil:
		return Result{}, ctx.Err()
	}
	return Result{}, fmt.Errorf("the program that reaches registries ended without a result (%w): %s", errors.Join(err, werr), strings.TrimSpace(words.String()))
}
