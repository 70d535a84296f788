# make help lists the targets.
PREFIX = /usr/local
DESTDIR =
LANGUAGE = c
LISTEN = 127.0.0.1:8080
export LISTEN

# Under sudo cargo may not be on the PATH: take that of the user who called it.
ifeq ($(shell command -v cargo),)
ifneq ($(SUDO_USER),)
CALLER := $(shell getent passwd "$$SUDO_USER" | cut -d: -f6)
export PATH := $(CALLER)/.cargo/bin:$(PATH)
export RUSTUP_HOME ?= $(CALLER)/.rustup
endif
endif

HOST := $(or $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p'),$(shell uname -m)-unknown-linux-gnu)
EXECUTABLE := $(or $(CARGO_TARGET_DIR),target)/$(HOST)/release/coderunner

.PHONY: all help build run test test-web bench lint web images install uninstall clean setup

all: build

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

build: ## build the executable
	cargo build --release --locked

setup: ## install what building, running and testing need
	@packaging/dev/setup

# The last line without a shell between: its parent is make, and ends it.
run: setup build ## start a server and post a hello program; LANGUAGE=c, LISTEN=127.0.0.1:8080
	@setpriv --pdeathsig TERM packaging/dev/run $(EXECUTABLE) $(LANGUAGE)

test: setup ## run every test, with both engines
	@packaging/images/build c python bash
	@packaging/dev/cargo test --locked
	@echo 'again, with the other engine:'
	@CODERUNNER_TEST_ENGINE=podman packaging/dev/cargo test --locked --test integration -- --skip podman:: --skip crun::

# The page's packages are those of its lock file, and are asked for again only when that changes.
web/node_modules: web/package-lock.json
	cd web && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

web: ## build the playground page anew, which is committed
	@packaging/dev/setup web
	@$(MAKE) --no-print-directory web/node_modules
	cd web && node build.mjs

test-web: ## test the playground page in a browser
	@packaging/dev/setup web
	@packaging/images/build c python bash
	@$(MAKE) --no-print-directory web/node_modules
	cd web && node build.mjs --check
	cargo build --locked
	cd web && CODERUNNER_TEST_EXE=$(abspath $(or $(CARGO_TARGET_DIR),target))/$(HOST)/debug/coderunner npm test

bench: setup ## measure; BENCH=long for longer
	@packaging/images/build bash c gcc
	@mkdir -p $(or $(CARGO_TARGET_DIR),target)/bench
	@packaging/dev/cargo bench --locked --bench runs -- --json $(if $(filter long,$(BENCH)),--long) \
		>$(or $(CARGO_TARGET_DIR),target)/bench/runs.json

lint: setup ## check the form of the code
	cd web && sha256sum --check --quiet dist/sources.sha256
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	shellcheck -x packaging/subids packaging/account packaging/images/build .ci/run \
		$(addprefix packaging/dev/,as-user cargo common run setup) web/test/serve

images: setup ## build the local images of c, python, bash and gcc
	@packaging/images/build c python bash gcc

install: ## install what was built; DESTDIR=, PREFIX=/usr/local
	@test -x $(EXECUTABLE) || { echo 'nothing is built yet: make build' >&2; exit 1; }
	install -D -m 755 $(EXECUTABLE) $(DESTDIR)$(PREFIX)/bin/coderunner
	install -d $(addprefix $(DESTDIR)$(PREFIX)/lib/,systemd/system sysusers.d tmpfiles.d) $(DESTDIR)/etc/coderunner
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' coderunner.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/coderunner.service
	install -m 644 packaging/sysusers.d/coderunner.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/
	install -m 644 packaging/tmpfiles.d/coderunner.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/
	test -e $(DESTDIR)/etc/coderunner/coderunner.toml || \
		sed 's/^[^#]/#&/' src/defaults.toml >$(DESTDIR)/etc/coderunner/coderunner.toml
ifeq ($(DESTDIR),)
	packaging/account $(PREFIX)
endif

uninstall: ## remove it again, but its settings, account and data
ifeq ($(DESTDIR),)
	test ! -d /run/systemd/system || systemctl disable --now coderunner
endif
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/,bin/coderunner lib/systemd/system/coderunner.service \
		lib/sysusers.d/coderunner.conf lib/tmpfiles.d/coderunner.conf)

clean: ## remove what was built
	cargo clean
