# make help lists the targets.
PREFIX = /usr/local
DESTDIR =
LANGUAGE = c
LISTEN = 127.0.0.1:8080
PROFILE = release
CASES = 100000
RUNS = 10000
SECONDS = 600
export LISTEN

# Under sudo cargo may not be on the PATH: use the cargo of the user who called sudo.
ifeq ($(shell command -v cargo),)
ifneq ($(SUDO_USER),)
CALLER := $(shell getent passwd "$$SUDO_USER" | cut -d: -f6)
export PATH := $(CALLER)/.cargo/bin:$(PATH)
export RUSTUP_HOME ?= $(CALLER)/.rustup
endif
endif

HOST := $(or $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p'),$(shell uname -m)-unknown-linux-gnu)
TARGET := $(or $(CARGO_TARGET_DIR),target)
# Cargo names the directory of the profile dev differently.
EXECUTABLE = $(TARGET)/$(HOST)/$(PROFILE:dev=debug)/coderunner

.PHONY: all help build run test fuzz libfuzzer soak test-web test-vm bench lint web images install uninstall deb tarball clean setup

all: build

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

build: ## build the executable; PROFILE=release
	cargo build --profile $(PROFILE) --locked

setup: ## install what building, running and testing need
	@packaging/dev/setup

# Full optimization takes minutes and is only for installed executables.
run: PROFILE = quick
# A single command, so that make starts it without a shell and pdeathsig refers to make.
run: setup build ## start a server and post a hello program; LANGUAGE=c, LISTEN=127.0.0.1:8080
	@setpriv --pdeathsig TERM packaging/dev/run $(EXECUTABLE) $(LANGUAGE)

test: setup ## run every test, with both engines
	@packaging/images/build c python bash toolchains
	@packaging/dev/clients
	@packaging/dev/cargo test --locked
	@echo 'running the tests that depend on the engine with the other engine:'
	@packaging/dev/cargo test --locked --profile podman

# Installs the packages of the lock file, again only when that changes.
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
	cd web && CODERUNNER_TEST_EXE=$(abspath $(TARGET))/$(HOST)/debug/coderunner npm test

fuzz: setup ## try malformed input; CASES=100000 of each kind
	@PROPTEST_CASES=$(CASES) packaging/dev/cargo test --locked --lib fuzz::

# The flags of cargo-fuzz without its sanitizers, which need another compiler. Inputs that reach new code are kept.
FUZZ = $(TARGET)/fuzz
COVERAGE = -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions $(addprefix -Cllvm-args=-sanitizer-coverage-,\
	level=4 inline-8bit-counters pc-table trace-compares)
libfuzzer: setup ## the same, inputs chosen by the code that it reaches; SECONDS=600
	RUSTFLAGS='--cfg fuzzing $(COVERAGE)' cargo build --release --locked --target-dir $(FUZZ)
	@mkdir -p $(FUZZ)/found
	cd $(FUZZ) && $(HOST)/release/coderunner -max_total_time=$(SECONDS) -rss_limit_mb=4096 -max_len=8192 -timeout=10 \
		found $(abspath tests/fuzz)

soak: setup ## run good and hostile programs, RUNS=10000, and see that nothing grows
	@packaging/images/build c python bash
	@CODERUNNER_TEST_RUNS=$(RUNS) packaging/dev/cargo test --locked --test integration --no-capture soak

bench: setup ## measure; BENCH=long for longer, BASELINE=FILE against an older executable too
	@packaging/images/build bash c gcc
	@mkdir -p $(TARGET)/bench
	@packaging/dev/cargo bench --locked --bench runs -- --json $(if $(filter long,$(BENCH)),--long) \
		$(if $(BASELINE),--baseline $(abspath $(BASELINE))) >$(TARGET)/bench/runs.json

lint: setup ## check the form of the code
	cd web && sha256sum --check --quiet dist/sources.sha256
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	shellcheck -x packaging/subids packaging/account $(addprefix packaging/deb/,postinst prerm postrm) \
		$(addprefix tests/vm/,able bootstrap guest image kernel run uncounted) packaging/images/build .ci/run \
		$(addprefix packaging/dev/,as-user cargo clients common run setup) web/test/serve

images: setup ## build the local images of c, python, bash and gcc
	@packaging/images/build c python bash gcc

# Completions of bash, zsh and fish, in the directories below the prefix where Debian's shells look.
completions = bash-completion/completions/coderunner fish/vendor_completions.d/coderunner.fish \
	zsh/$(if $(filter /usr,$(1)),vendor-completions,site-functions)/_coderunner

# Installs everything except the account and the configuration: packaging/account makes these if they are missing. The
# Debian package has the same files.
define lay_out
	install -d $(addprefix $(1)/lib/,systemd/system systemd/user sysusers.d tmpfiles.d coderunner) $(1)/share/man/man1 \
		$(addprefix $(1)/share/,$(dir $(call completions,$(2))))
	install -D -m 755 $(EXECUTABLE) $(1)/bin/coderunner
	strip --strip-debug $(1)/bin/coderunner
	$(EXECUTABLE) man $(1)/share/man/man1
	$(EXECUTABLE) completions bash >$(1)/share/$(word 1,$(call completions,$(2)))
	$(EXECUTABLE) completions fish >$(1)/share/$(word 2,$(call completions,$(2)))
	$(EXECUTABLE) completions zsh >$(1)/share/$(word 3,$(call completions,$(2)))
	install -m 755 packaging/account packaging/subids $(1)/lib/coderunner/
	install -m 644 packaging/systemd/systemd-254.conf packaging/sysctl.d/no-module-loading.conf $(1)/lib/coderunner/
	install -m 644 packaging/sysusers.d/coderunner.conf $(1)/lib/sysusers.d/
	install -m 644 packaging/tmpfiles.d/coderunner.conf $(1)/lib/tmpfiles.d/
	install -m 644 coderunner.socket $(1)/lib/systemd/system/
	sed 's|/usr/local/bin/|$(2)/bin/|' coderunner.service >$(1)/lib/systemd/system/coderunner.service
	sed 's|/usr/local/bin/|$(2)/bin/|' packaging/systemd/user/coderunner.service >$(1)/lib/systemd/user/coderunner.service
	sed 's/^[^#]/#&/' src/config/defaults.toml >$(1)/lib/coderunner/coderunner.toml
endef

install: ## install what was built; DESTDIR=, PREFIX=/usr/local
	@test -x $(EXECUTABLE) || { echo 'nothing is built yet: make build' >&2; exit 1; }
	$(call lay_out,$(DESTDIR)$(PREFIX),$(PREFIX))
ifeq ($(DESTDIR),)
	$(PREFIX)/lib/coderunner/account $(PREFIX)
	@printf '\n%s\n' 'coderunner is installed; it needs podman, crun and uidmap. Next:' \
		'  $$EDITOR /etc/coderunner/coderunner.toml' '  systemctl enable --now coderunner' \
		'  curl http://127.0.0.1:8080/readyz'
endif

uninstall: ## remove it again, but its settings, account and data
ifeq ($(DESTDIR),)
	test ! -d /run/systemd/system || systemctl disable --now coderunner.socket coderunner.service
endif
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/,bin/coderunner lib/systemd/system/coderunner.service \
		lib/systemd/system/coderunner.socket lib/systemd/user/coderunner.service \
		lib/sysusers.d/coderunner.conf lib/tmpfiles.d/coderunner.conf $(addprefix share/,$(call completions,$(PREFIX))))
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/coderunner.1 $(DESTDIR)$(PREFIX)/share/man/man1/coderunner-*.1
	rm -rf $(addprefix $(DESTDIR)$(PREFIX)/lib/,coderunner systemd/system/coderunner.service.d)

PACKAGE := target/package
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p;/^version/q' Cargo.toml)
DEB = target/debian/coderunner_$(VERSION)-1_$(shell dpkg --print-architecture 2>/dev/null).deb
ARCHIVE = target/coderunner-$(VERSION)-$(HOST).tar.gz
RELEASES = bookworm trixie

deb: build ## make a Debian package in target/debian
	@command -v cargo-deb >/dev/null || cargo install --locked --debug cargo-deb
	rm -rf $(PACKAGE)
	$(call lay_out,$(PACKAGE)/usr,/usr)
	chmod -R u=rwX,go=rX $(PACKAGE)
	cargo deb --locked --no-build --no-strip --output target/debian/

tarball: build ## make an archive of what `make install` lays out, in target
	rm -rf $(PACKAGE)
	$(call lay_out,$(PACKAGE)/usr/local,/usr/local)
	chmod -R u=rwX,go=rX $(PACKAGE)
	tar -C $(PACKAGE) --owner=0 --group=0 --sort=name -czf $(ARCHIVE) usr

test-vm: deb tarball ## install and test the package on Debian 12 and 13 in virtual machines; RELEASES="bookworm trixie"
	@$(MAKE) --no-print-directory -j $(words $(RELEASES)) $(addprefix vm-,$(RELEASES))

vm-%:
	@tests/vm/run $* $(DEB) $(ARCHIVE)

clean: ## remove what was built
	cargo clean
