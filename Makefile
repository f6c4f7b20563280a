# The two that matter on a fresh Debian machine with Rust: make demo, make test.

PREFIX ?= /usr/local

.PHONY: help setup build install demo docker-plugin test vm-matrix vm-soak k8s-smoke k8s-e2e lint
.PHONY: fuzz bench bench-devices bench-object clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## install what the other targets need
	scripts/setup-debian

build: ## the release binary
	cargo build --release --locked

install: ## the release binary, to PREFIX/bin (/usr/local/bin)
	PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' scripts/install

docker-plugin: build ## a managed plugin of Docker, for docker plugin create (docs/docker.md)
	deploy/docker/build

demo: ## serve a file system from objects in a directory, kill, lose, check, show latencies
	scripts/demo

test: ## all tests
	scripts/test

vm-matrix: ## the tests of devices, with Linux 6.1, 6.12 and 7.2 in turn
	scripts/vm-matrix

vm-soak: ## what devices promise, for an hour: kills, cycles, many, short memory
	scripts/vm-soak

k8s-smoke: ## the chart in a real Kubernetes: claims, pods, kill -9, upgrade (tests/k8s)
	tests/k8s/with-cluster tests/k8s/smoke

k8s-e2e: ## the External.Storage suite of Kubernetes, or specs of it: FOCUS='...' SKIP='...'
	tests/k8s/with-cluster tests/k8s/$(if $(FOCUS),e2e '$(FOCUS)' '$(SKIP)',e2e-all)

lint: ## rustfmt, clippy, cargo-deny
	scripts/lint

fuzz: ## each fuzz target for a short time (needs a nightly toolchain)
	scripts/fuzz

bench: ## compare with other NBD servers
	scripts/bench

bench-devices: ## compare block devices with those of others, in a guest
	scripts/bench-devices

bench-object: ## an object volume on an emulated store, beside the disk and a file
	scripts/bench-object

clean:
	cargo clean
