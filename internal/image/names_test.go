package image

import (
	"errors"
	"strings"
	"testing"
)

func TestParseName(t *testing.T) {
	hex := strings.Repeat("ab", 32)
	for in, want := range map[string]string{
		"base":                        "docker.io/library/base:latest",
		"a/b:c":                       "docker.io/a/b:c",
		"index.docker.io/library/x:1": "docker.io/library/x:1",
		"host:5000/x@sha256:" + hex:   "host:5000/x@sha256:" + hex,
		"host:5000/sha256:" + hex:     "host:5000/sha256:" + hex,
		"localhost/" + hex:            "localhost/" + hex + ":latest",
		"sha256sum:1":                 "docker.io/library/sha256sum:1",
		hex[:63]:                      "docker.io/library/" + hex[:63] + ":latest",
		hex:                           "",
		hex + ":tag":                  "",
		"sha256:" + hex:               "",
		"sha256":                      "",
		"library/sha256:abc":          "",
		"docker.io/library/" + hex:    "",
		"":                            "",
		"UPPER":                       "",
		"a//b":                        "",
		"x:y:z":                       "",
		"x@sha256:12":                 "",
		strings.Repeat("n", 600):      "",
	} {
		n, err := ParseName(in)
		if err == nil && n.String() != want || (err != nil) != (want == "") {
			t.Errorf("%q is %q, %v; want %q", in, n.String(), err, want)
		}
	}
}

// Whatever an archive calls its images, an id means the image that has it.
func TestNameLikeAnID(t *testing.T) {
	s := newStore(t)
	imgs, err := s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, sampleImage(t, "good"), "good:1"))}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	good := imgs[0].ID
	bad := sampleImage(t, "bad")
	for _, name := range []string{good, strings.TrimPrefix(good, "sha256:"), "docker.io/library/" + good} {
		if _, err := s.Load(t.Context(), Source{Path: asDir(t, dockerFiles(t, map[string]testImage{name: bad}))}, Options{}); err == nil {
			t.Errorf("an image is called %s", name)
		}
	}
	// One that an older program let in.
	if imgs, err = s.Load(t.Context(), Source{Path: asDir(t, ociFiles(t, bad, "bad:1"))}, Options{}); err != nil {
		t.Fatal(err)
	}
	idx, err := s.readIndex()
	if err != nil {
		t.Fatal(err)
	}
	idx.byID(imgs[0].ID).Names = []string{"docker.io/library/" + good, "docker.io/library/" + strings.TrimPrefix(good, "sha256:") + ":latest"}
	for _, ref := range []string{good, strings.TrimPrefix(good, "sha256:")} {
		if e, err := idx.find(ref); err != nil || e.ID != good {
			t.Errorf("%s: %+v, %v", ref, e, err)
		}
	}
	if _, err := idx.find(strings.Repeat("0", 64)); !errors.Is(err, ErrNotFound) {
		t.Errorf("an id of no image: %v", err)
	}
}
