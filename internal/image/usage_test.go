package image

import (
	"os"
	"testing"
)

// What images share is counted once in all, and told of each; what a cut-off pull has left is nobody's.
func TestUsage(t *testing.T) {
	one, two := sampleImage(t, "one"), sampleImage(t, "two")
	s, r := newStore(t), newRemote(t, map[string]testImage{"1": one, "2": two})
	for _, tag := range []string{"1", "2"} {
		if _, _, err := s.Pull(t.Context(), mustName(t, "h.example/app:"+tag), r, PullOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(s.path("pull", "x.part"), make([]byte, 10000), 0o600); err != nil {
		t.Fatal(err)
	}
	images, total, other, err := s.Usage(t.Context())
	if err != nil || len(images) != 2 {
		t.Fatal(images, err)
	}
	disk := func(path string) int64 {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return diskSize(fi)
	}
	shared := disk(s.blobPath(hashBytes(one.packed[0]).String())) // the one layer that both have
	if other != disk(s.path("pull", "x.part")) {
		t.Errorf("other: %d", other)
	}
	for _, u := range images {
		if u.Shared != shared || u.Size <= u.Shared {
			t.Errorf("%s: %d, shared %d, want %d", u.Names, u.Size, u.Shared, shared)
		}
	}
	if want := images[0].Size + images[1].Size - shared; total != want {
		t.Errorf("total %d, want %d", total, want)
	}
	before := images[0]
	res, err := s.Remove(t.Context(), before.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := before.Size - before.Shared; res.Freed != want {
		t.Errorf("freed %d, want its own %d", res.Freed, want)
	}
}
