# Works on a new Debian or Ubuntu machine, as root or with sudo. Everything but system packages stays in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := -m pip -qq --disable-pip-version-check --no-input install --no-cache-dir --no-warn-script-location
PIP := $(BIN)/python $(PIP_INSTALL)

RUN_PACKAGES := python3 python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3
TEST_PACKAGES := $(RUN_PACKAGES) redis-server postgresql rsync attr strace systemd chromium prometheus

# What an installation is made from, besides the modules themselves.
INSTALLED := setup.cfg pyproject.toml setup.py desfs/_levers.c
SOURCES := setup.cfg pyproject.toml setup.py README.md LICENSE des_format desfs assignment

BENCH_PACKAGES := $(TEST_PACKAGES) rclone s3fs

# Files of tests that run side by side, in their order: the many short ones come last, and leave no core idle. Many wait
# for something, so there is one more than the two cores that the bar of 15 minutes is for. What they start are a
# thousand programs, which should not compile the package each.
TEST_PROCESSES ?= 3

# What `make bench` runs (all but the soak; e.g. BENCH='mount --quick'), and where its tables and its plot go.
BENCH ?=
BENCH_OUTPUT ?= build/bench

# Where `make install` puts things. With DESTDIR= it does so below that directory, for a package, and leaves the machine
# as it is: no packages are installed, no user is made, systemd is not told.
DESTDIR ?=
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
VENVDIR ?= $(PREFIX)/lib/desfs
DATADIR ?= $(PREFIX)/share
DOCDIR ?= $(DATADIR)/doc/desfs
MANDIR ?= $(DATADIR)/man
SYSTEMD_UNIT_DIR ?= $(PREFIX)/lib/systemd/system
SYSUSERS_DIR ?= $(PREFIX)/lib/sysusers.d
TMPFILES_DIR ?= $(PREFIX)/lib/tmpfiles.d
# mount(8) looks for its helpers there alone. `mount -t` takes both types; a mount calls itself by the longer one.
MOUNT_HELPER_DIR ?= /sbin
MOUNT_HELPERS := mount.desfs mount.fuse.desfs
# Who is asked for the manual and the completions.
MANUAL_PYTHON ?= $(DESTDIR)$(VENVDIR)/bin/python
# More options for pip, such as --no-index --find-links=DIR.
PIP_FLAGS ?=

UNITS := desfs-mount@.service desfs-packer@.service desfs-assignment@.service desfs-seal@.service desfs-seal@.timer
EXAMPLES := systemd/mnt-des.mount systemd/mnt-des.automount $(wildcard systemd/examples/*)
COMPLETIONS := bash:bash-completion/completions/desfs zsh:zsh/site-functions/_desfs \
	fish:fish/vendor_completions.d/desfs.fish
DOCUMENTS := README.md $(wildcard docs/*.md)

# Installs those of the packages that are missing; asks the network only then.
define install-packages
@missing=; for package in $(1); do \
	test "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null)" = installed || missing="$$missing $$package"; \
done; \
test -z "$$missing" && exit 0; \
command -v apt-get >/dev/null || { echo "make: no apt-get here; install what Debian calls:$$missing" >&2; exit 1; }; \
as_root=; test "$$(id -u)" = 0 || { as_root=sudo; \
	command -v sudo >/dev/null || { echo "make: as root, run: apt-get install$$missing" >&2; exit 1; }; }; \
echo "Installing$$missing"; \
apt_get="$$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0"; \
log=$$(mktemp) && { $$apt_get update && $$apt_get install --yes --no-install-recommends $$missing; } >"$$log" 2>&1 \
	|| { cat "$$log" >&2; rm -f "$$log"; exit 1; }; \
rm -f "$$log"
endef

.PHONY: dev
dev: run-packages $(BIN)/.dev-stamp

.PHONY: demo
demo: dev
	@$(BIN)/python -m tests.demo

.PHONY: test
test: check
	@$(BIN)/python -m compileall -q des_format assignment desfs
	@$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: check
check: test-packages $(BIN)/.test-stamp
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "make: not formatted; run $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary
	@$(BIN)/lint-imports --no-logo >.venv/lint-imports.log || { cat .venv/lint-imports.log >&2; exit 1; }
	@$(BIN)/python -m tests.audit --if-possible

# What is known of the vulnerabilities of all that is installed in .venv. PyPI is asked; no answer is a failure here.
.PHONY: audit
audit: $(BIN)/.test-stamp
	@$(BIN)/python -m tests.audit

# The pages of docs/ as a site, in build/docs. (The theme would say at each start how long it is going to be maintained.)
.PHONY: docs
docs: $(BIN)/.docs-stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file docs/mkdocs.yml

.PHONY: bench
bench: bench-packages $(BIN)/.bench-stamp
	@$(BIN)/python -m tests.bench $(BENCH) --output $(BENCH_OUTPUT)

.PHONY: install
install: install-program install-units install-documents install-manual
ifeq ($(DESTDIR),)
	@if command -v systemd-tmpfiles >/dev/null; then \
		systemd-sysusers '$(SYSUSERS_DIR)/desfs.conf' && systemd-tmpfiles --create '$(TMPFILES_DIR)/desfs.conf'; \
	fi
	@test ! -d /run/systemd/system || systemctl daemon-reload
endif

# The program in a virtual environment of its own, built beside the one that is there and put in its place when it is
# whole. What names the place where it was built is made to name its last one. Not every module of the dependencies is
# for this version of Python: what does not compile is left as it is.
.PHONY: install-program
install-program: $(if $(DESTDIR),,run-packages)
	@umask 022; set -e; case '$(VENVDIR)' in */) echo 'make: VENVDIR=$(VENVDIR): without the slash at its end' >&2; exit 1;; esac; \
	test ! -e '$(DESTDIR)$(VENVDIR)' -o -e '$(DESTDIR)$(VENVDIR)/pyvenv.cfg' || { \
		echo 'make: $(DESTDIR)$(VENVDIR) is there, and is no virtual environment' >&2; exit 1; }; \
	above='$(DESTDIR)$(dir $(VENVDIR))'; mkdir -p "$$above"; \
	place="$$(cd "$$above"; pwd)/$(notdir $(VENVDIR))"; new="$$place.new"; source=$$(mktemp -d); \
	trap 'rm -rf "$$source" "$$new"' EXIT; \
	echo "Installing desfs into $$place"; \
	cp -R $(SOURCES) "$$source"; \
	find "$$source" -name '*.so' -delete; \
	rm -rf "$$new"; \
	$(PYTHON) -m venv "$$new"; \
	"$$new/bin/python" $(PIP_INSTALL) --no-compile $(PIP_FLAGS) "$$source[redis]"; \
	rm -f "$$new"/lib/python*/site-packages/desfs-*.dist-info/direct_url.json; \
	grep -rlIF "$$new" "$$new/bin" "$$new/pyvenv.cfg" | while IFS= read -r file; do \
		sed -i "s|$$new|$(VENVDIR)|g" "$$file"; \
	done; \
	"$$new/bin/python" -m compileall -qq -f -j 0 -s "$$new" -p '$(VENVDIR)' "$$new/lib" || :; \
	rm -rf "$$place"; mv "$$new" "$$place"; \
	install -d '$(DESTDIR)$(BINDIR)' '$(DESTDIR)$(MOUNT_HELPER_DIR)'; \
	ln -sfn '$(VENVDIR)/bin/desfs' '$(DESTDIR)$(BINDIR)/desfs'; \
	for helper in $(MOUNT_HELPERS); do \
		ln -sfn '$(VENVDIR)/bin/mount.desfs' "$(DESTDIR)$(MOUNT_HELPER_DIR)/$$helper"; \
	done; \
	path=$$(readlink -f "$$place/bin/python"); \
	while test "$$path" != /; do \
		case $$(stat -c %A "$$path") in \
			*x|*t) path=$$(dirname "$$path");; \
			*) echo "make: other users may not use $$path and cannot mount; take another PYTHON=" >&2; break;; \
		esac; \
	done

.PHONY: install-units
install-units:
	@umask 022; set -e; \
	install -d '$(DESTDIR)$(SYSTEMD_UNIT_DIR)' '$(DESTDIR)$(SYSUSERS_DIR)' '$(DESTDIR)$(TMPFILES_DIR)'; \
	for unit in $(UNITS); do \
		sed -e 's|@BINDIR@|$(BINDIR)|g' -e 's|@DOCDIR@|$(DOCDIR)|g' "systemd/$$unit" \
			>"$(DESTDIR)$(SYSTEMD_UNIT_DIR)/$$unit"; \
	done; \
	install -m 644 systemd/sysusers.d/desfs.conf '$(DESTDIR)$(SYSUSERS_DIR)'; \
	install -m 644 systemd/tmpfiles.d/desfs.conf '$(DESTDIR)$(TMPFILES_DIR)'

.PHONY: install-documents
install-documents:
	@umask 022; set -e; \
	install -d '$(DESTDIR)$(DOCDIR)/examples'; \
	install -m 644 $(DOCUMENTS) '$(DESTDIR)$(DOCDIR)'; \
	install -m 644 $(EXAMPLES) '$(DESTDIR)$(DOCDIR)/examples'

# What the program says of itself: man pages, and what shells ask when they complete a word.
.PHONY: install-manual
install-manual: install-program
	@umask 022; set -e; python='$(MANUAL_PYTHON)'; \
	"$$python" -B -m desfs.cli.man '$(DESTDIR)$(MANDIR)'; \
	for pair in $(COMPLETIONS); do \
		file='$(DESTDIR)$(DATADIR)'/"$${pair#*:}"; mkdir -p "$$(dirname "$$file")"; \
		_DESFS_COMPLETE="source_$${pair%%:*}" "$$python" -B -c \
			'import sys; sys.argv = ["desfs"]; from desfs.cli import main; main()' >"$$file"; \
	done

# What `install` has put there. Settings, spools, caches and the user desfs stay.
.PHONY: uninstall
uninstall:
	@test ! -e '$(DESTDIR)$(VENVDIR)/pyvenv.cfg' || rm -rf '$(DESTDIR)$(VENVDIR)'
	@cd '$(DESTDIR)$(DOCDIR)' 2>/dev/null || exit 0; rm -f $(notdir $(DOCUMENTS)) $(addprefix examples/,$(notdir $(EXAMPLES))); \
		rmdir examples . 2>/dev/null || :; rmdir '$(DESTDIR)$(DOCDIR)' 2>/dev/null || :
	@rm -f '$(DESTDIR)$(BINDIR)/desfs' $(patsubst %,'$(DESTDIR)$(MOUNT_HELPER_DIR)/%',$(MOUNT_HELPERS))
	@rm -f $(patsubst %,'$(DESTDIR)$(SYSTEMD_UNIT_DIR)/%',$(UNITS))
	@rm -f '$(DESTDIR)$(SYSUSERS_DIR)/desfs.conf' '$(DESTDIR)$(TMPFILES_DIR)/desfs.conf'
	@rm -f '$(DESTDIR)$(MANDIR)/man1/desfs.1' '$(DESTDIR)$(MANDIR)/man8/mount.desfs.8'
	@rm -f $(foreach pair,$(COMPLETIONS),'$(DESTDIR)$(DATADIR)/$(lastword $(subst :, ,$(pair)))')
ifeq ($(DESTDIR),)
	@test ! -d /run/systemd/system || systemctl daemon-reload
endif

# What the other targets made, but for .venv and the extension; `distclean` takes these as well.
.PHONY: clean
clean:
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

.PHONY: distclean
distclean: clean
	@rm -rf .venv desfs/*.so

.PHONY: run-packages
run-packages:
	$(call install-packages,$(RUN_PACKAGES))

.PHONY: test-packages
test-packages:
	$(call install-packages,$(TEST_PACKAGES))

.PHONY: bench-packages
bench-packages:
	$(call install-packages,$(BENCH_PACKAGES))

$(BIN)/python: | run-packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); desfs needs 3.11 or newer (make PYTHON=python3.12 …)" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(BIN)/.dev-stamp: $(INSTALLED) | $(BIN)/python
	@echo 'Installing desfs into .venv'
	@$(PIP) --editable .
	@touch $@

$(BIN)/.test-stamp: $(INSTALLED) | $(BIN)/python
	@echo 'Installing desfs and what its tests need into .venv'
	@$(PIP) --editable '.[redis,test]'
	@touch $@ $(BIN)/.dev-stamp

$(BIN)/.docs-stamp: $(INSTALLED) | $(BIN)/python
	@echo 'Installing desfs and what its documentation is built with into .venv'
	@$(PIP) --editable '.[docs]'
	@touch $@ $(BIN)/.dev-stamp

$(BIN)/.bench-stamp: $(INSTALLED) | $(BIN)/python
	@echo 'Installing desfs and what its benchmarks need into .venv'
	@$(PIP) --editable '.[redis,test,bench]'
	@touch $@ $(BIN)/.dev-stamp $(BIN)/.test-stamp
