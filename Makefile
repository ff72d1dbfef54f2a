# Works on a new Debian or Ubuntu machine, as root or with sudo. Everything but system packages stays in .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input install --no-cache-dir --no-warn-script-location

RUN_PACKAGES := python3 python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3
TEST_PACKAGES := $(RUN_PACKAGES) redis-server rsync attr strace

# What an installation is made from, besides the modules themselves.
INSTALLED := setup.cfg pyproject.toml setup.py desfs/_levers.c

BENCH_PACKAGES := $(TEST_PACKAGES) rclone s3fs

# What `make bench` runs (all but the soak; e.g. BENCH='mount --quick'), and where its tables and its plot go.
BENCH ?=
BENCH_OUTPUT ?= build/bench

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
	@$(BIN)/python -m pytest

.PHONY: check
check: test-packages $(BIN)/.test-stamp
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "make: not formatted; run $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/mypy --strict --no-error-summary
	@$(BIN)/lint-imports --no-logo >.venv/lint-imports.log || { cat .venv/lint-imports.log >&2; exit 1; }

.PHONY: bench
bench: bench-packages $(BIN)/.bench-stamp
	@$(BIN)/python -m tests.bench $(BENCH) --output $(BENCH_OUTPUT)

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

$(BIN)/.bench-stamp: $(INSTALLED) | $(BIN)/python
	@echo 'Installing desfs and what its benchmarks need into .venv'
	@$(PIP) --editable '.[redis,test,bench]'
	@touch $@ $(BIN)/.dev-stamp $(BIN)/.test-stamp
