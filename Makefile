# Coffer's build. `make` builds the program and runs a first box; `make test` runs every test. Both need only Go, git and make; what
# else a test needs is installed from Debian packages when this runs as root, and named when it does not.

GO      ?= go
GOFLAGS ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X github.com/coffer-box/coffer.version=$(VERSION)
FUZZTIME ?= 10s
export CGO_ENABLED ?= 0
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: all first-box build assets test test-unit test-e2e test-guest test-two-sided test-user debian lint bench fuzz cross clean deps

all: first-box

first-box: build
	@echo '$$ bin/coffer run --rm base uname -a'
	@bin/coffer run --rm base uname -a
	@echo "(that was the box's kernel; the host's is $$(uname -sr))"

# GOARCH=arm64 make build: the maker runs here, what it makes runs there.
assets:
	GOARCH= GOOS= $(GO) run ./internal/assets/mkassets $(if $(GOARCH),-arch $(GOARCH))

build: assets
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/coffer ./cmd/coffer

# What the tests use beyond Go: a C compiler for the race detector, mmdebstrap for a real image.
deps:
	@sh test/deps.sh

test: deps build test-unit test-two-sided debian
	$(MAKE) -j2 --output-sync=target test-e2e test-user # they mostly wait, each for boxes of its own
	$(MAKE) test-guest

# Failures in full, and every skipped test with its reason.
REPORT = $(GO) run ./test/report

test-unit: build
	CGO_ENABLED=$$(command -v gcc >/dev/null && echo 1 || echo 0) $(GO) test -json $$(command -v gcc >/dev/null && echo -race) \
	  $$($(GO) list ./... | grep -v -e /test/e2e -e /test/cli -e /test/guest$$) | $(REPORT)
	CGO_ENABLED=0 $(GO) test ./internal/sentry # as it is used; with the race detector gVisor's filter is another

# The real images that the end-to-end tests of root and of the ordinary user share, and what umoci makes of images.
debian:
	$(GO) test -count=1 -run "^Test(DebianRoot|ImagesLayout|UmociListings)$$" ./test/e2e

test-e2e: build
	$(GO) test -json -count=1 -timeout 30m -p 1 ./test/e2e ./test/cli | $(REPORT)

# Hosts with other control groups than this one, as virtual machines without hardware for them: some minutes.
test-guest:
	$(GO) test -json -count=1 -timeout 20m ./test/guest | $(REPORT)

# The leak tests must fail when the whole-tree kill is taken out: otherwise they prove nothing.
test-two-sided: build
	sh test/two-sided.sh

# The same tests once more as an ordinary user, when this is root.
test-user: build
	sh test/as-user.sh

lint:
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./...
	$(GO) tool -modfile=tools/go.mod golangci-lint run ./...

cross:
	GOARCH=arm64 $(GO) build -o /dev/null ./cmd/coffer ./cmd/coffer-agent ./cmd/coffer-sentry ./cmd/coffer-registry
	GOOS=darwin GOARCH=arm64 $(GO) build -o /dev/null . ./cmd/coffer

bench: build
	$(GO) run ./bench

fuzz:
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep ^Fuzz); do \
	    echo "fuzz $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p || exit 1; \
	  done; done

clean:
	rm -rf bin internal/assets/data/*.zst internal/assets/data/manifest.json internal/sentry/data/*.json
