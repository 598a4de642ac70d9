# Everything a newcomer needs: `make demo` and `make test`. Both set up what is missing, once.
# Choose an interpreter with PYTHON=python3.13, another folder with VENV=folder.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
VENV_313 ?= .venv313
VENV_PEERS ?= .venv-peers
VENV_TORCH ?= .venv-torch
VENV_TFF ?= .venv-tff
BENCH ?= secagg
ARGS ?=
PYTEST_ARGS ?=
# More than cores, since many tests wait for brokers and deadlines; a file's tests stay together.
PARALLEL ?= -n 4 --dist loadfile

# The first that runs and fits: a version manager's stub may exist and yet not run.
supported = $(shell for name in $(1); do "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1 && echo "$$name" && break; done)
managed = $(wildcard $(addsuffix /versions/$(1)*/bin/python,$(shell pyenv root 2>/dev/null)))

# Python 3.11 first: it is what Raspberry Pi OS Bookworm has, and all that TensorFlow 2.14 runs on.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(call supported,python3.11 python3 python3.12 python3.13)
endif
PYTHON_VERSION := $(if $(call supported,"$(PYTHON)"),$(shell "$(PYTHON)" -c \
	'import sys; print("%d.%d" % sys.version_info[:2])'))
# Looked for only where it is used.
PYTHON_313 ?= $(call supported,python3.13 $(call managed,3.13))

# Editable, so that a pull needs no reinstall; wheels only where there is a choice, so that nothing compiles.
PIP_INSTALL := -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off --prefer-binary
BIN := $(VENV)/bin
STAMP := $(VENV)/.covey-$(PYTHON_VERSION)
ROOT := $(filter 0,$(shell id -u))
APT := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends
TEST_PACKAGES := mosquitto postgresql dosfstools fdisk mtools xz-utils sqlite3
SLOW_PACKAGES := chromium chromium-driver mmdebstrap qemu-user-static binutils-aarch64-linux-gnu arch-test qemu-system-arm openssh-client

.PHONY: bundle docs image lock-bundle help demo test test-slow test-313 test-all lint format bench bench-peers bench-torch fuzz \
	setup setup-dev debian debian-slow parity setup-parity clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  options: make demo ARGS="--devices 6 --rounds 5"   PYTHON=python3.13 make demo   make test PYTEST_ARGS="-k broker"'

demo: $(STAMP)-demo  ## set up, then let ten watches train one model: `covey demo $(ARGS)`
	@$(BIN)/covey demo $(ARGS)

test: debian $(STAMP)-dev  ## set up (Debian packages too, when root), then lint and run the fast tests
	@lint=0; $(MAKE) lint || lint=$$?; $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS) && exit $$lint

test-slow: debian-slow $(STAMP)-dev  ## the slow tests: whole demo, aarch64, browser, faults
	@$(BIN)/python -m pytest -m "e2e or arm64 or browser or chaos" $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-313:  ## unit and property tests of the bare device install on Python 3.13, where there is one
	$(eval PYTHON_313 := $(PYTHON_313))
	@$(if $(PYTHON_313),$(MAKE) PYTHON_313="$(PYTHON_313)" $(VENV_313)/.covey-device \
		&& $(VENV_313)/bin/python -m pytest $(PARALLEL) tests/unit tests/property $(PYTEST_ARGS),\
		echo "no Python 3.13 on this machine: its tests are skipped")

test-all:  ## every test there is
	@$(MAKE) test
	@$(MAKE) test-313
	@$(MAKE) test-slow

fuzz: $(STAMP)-dev  ## fuzz all that the network can hand in, a minute: make fuzz ARGS="--seconds 3600"
	@$(BIN)/python -m tests.fuzz_wire $(ARGS)

parity: setup-parity $(STAMP)-dev  ## the same training by TensorFlow Federated, in an environment of its own (2.4 GB)
	@COVEY_TFF_PYTHON=$(VENV_TFF)/bin/python $(BIN)/python -m pytest -m e2e tests/parity $(PYTEST_ARGS)

setup-parity:  ## only install TensorFlow Federated, where Python is 3.11
	@$(if $(filter 3.11,$(PYTHON_VERSION)),$(MAKE) $(VENV_TFF)/.covey-tff,\
		echo "TensorFlow Federated needs Python 3.11: its tests are skipped")

lint: $(STAMP)-dev  ## check style, types and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)-dev  ## rewrite the code in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP)-dev  ## build the documentation's site into build/docs, the reference from the code
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

bench: $(STAMP)-dev bench-peers  ## run benchmarks/$(BENCH).py beside its peers: make bench BENCH=secagg ARGS="--json FILE"
	@$(BIN)/python benchmarks/$(BENCH).py $(ARGS)

bench-peers: $(VENV_PEERS)/.covey-peers  ## only install what we are measured against, apart from everything else

bundle: $(STAMP)-venv  ## build the client as one file for Bookworm and for Trixie, arm64; print their sizes
	@$(BIN)/python -m deploy.bundle --out dist $(ARGS)

image: $(STAMP)-venv  ## build a minimal Debian arm64 image, as root; the first time takes a quarter of an hour
	@$(BIN)/python -m deploy.image --out dist/covey-arm64.img $(ARGS)

# uv resolves for another machine and Python; a backport that ended at Python 3.10 needs its last open release.
lock-bundle: $(STAMP)-venv  ## pin the bundles' packages anew, with hashes
	@$(BIN)/python $(PIP_INSTALL) uv
	@set -e; echo 'backports-strenum<1.3' > $(VENV)/bundle-constraints; for pair in bookworm:3.11 trixie:3.13; do \
		file=deploy/bundle/requirements-$${pair%:*}-arm64.txt; \
		$(BIN)/uv pip compile --quiet --no-header --no-annotate --generate-hashes --no-emit-index-url \
			--python-version $${pair#*:} --python-platform aarch64-manylinux_2_34 --only-binary :all: \
			--constraint $(VENV)/bundle-constraints pyproject.toml --output-file $$file; \
		sed -i "1i # Pinned by \`make lock-bundle\` from pyproject.toml: what the $${pair%:*}-arm64 bundle holds." $$file; \
	done

bench-torch: $(VENV_TORCH)/.covey-torch  ## only install PyTorch, which benchmarks/training.py is measured against

setup: $(STAMP)-demo  ## only install what the demo needs
setup-dev: $(STAMP)-dev  ## only install what developers need

clean:  ## remove environments, caches and reports
	rm -rf .venv $(VENV) .venv313 $(VENV_313) .venv-peers $(VENV_PEERS) .venv-torch $(VENV_TORCH) .venv-tff $(VENV_TFF) demo-report build *.egg-info
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find protocol models edge_client aggregator deploy tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# An environment of another Python version is replaced: the stamp's name carries the version.
$(STAMP)-venv:
	@if [ -z "$(PYTHON_VERSION)" ]; then \
		echo "Covey needs Python 3.11, 3.12 or 3.13; on Debian: apt-get install python3 python3-venv"; \
		$(if $(PYTHON),echo "PYTHON=$(PYTHON) does not run or is another version:"; "$(PYTHON)" --version;) \
		exit 1; fi
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		if [ -n "$(ROOT)" ] && command -v apt-get >/dev/null; then \
			echo "installing python$(PYTHON_VERSION)-venv"; \
			$(APT) python$(PYTHON_VERSION)-venv || { apt-get update -qq && $(APT) python$(PYTHON_VERSION)-venv; }; \
		else \
			echo "$(PYTHON) cannot make environments; on Debian: sudo apt-get install python3-venv"; exit 1; \
		fi; }
	@[ "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$(PYTHON_VERSION)" ] \
		|| { echo "making $(VENV) with Python $(PYTHON_VERSION)"; "$(PYTHON)" -m venv --clear "$(VENV)"; }
	@touch $@

$(STAMP)-demo: pyproject.toml | $(STAMP)-venv
	@echo "installing the demo into $(VENV), without TensorFlow; this takes about a minute"
	@$(BIN)/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

# By uv: with all extras at once, pip tries old versions until it meets one that cannot be resolved.
$(STAMP)-dev: pyproject.toml | $(STAMP)-venv
	@echo "installing the development tools into $(VENV); this takes a minute or two"
	@$(BIN)/python $(PIP_INSTALL) uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@touch $(STAMP)-demo $@

$(VENV_313)/.covey-device: pyproject.toml
	@echo "installing the device's packages into $(VENV_313)"
	@"$(PYTHON_313)" -m venv "$(VENV_313)"
	@$(VENV_313)/bin/python $(PIP_INSTALL) -e . 'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100'
	@touch $@

$(VENV_PEERS)/.covey-peers: benchmarks/requirements-peers.txt | $(STAMP)-venv
	@echo "installing the peers of the benchmarks into $(VENV_PEERS)"
	@"$(PYTHON)" -m venv --clear "$(VENV_PEERS)"
	@$(VENV_PEERS)/bin/python $(PIP_INSTALL) -r benchmarks/requirements-peers.txt
	@touch $@

$(VENV_TORCH)/.covey-torch: benchmarks/requirements-torch.txt | $(STAMP)-venv
	@echo "installing PyTorch into $(VENV_TORCH)"
	@"$(PYTHON)" -m venv --clear "$(VENV_TORCH)"
	@$(VENV_TORCH)/bin/python $(PIP_INSTALL) -r benchmarks/requirements-torch.txt
	@touch $@

# The locked file was resolved with overrides, which pip has not: so it is installed without resolving.
$(VENV_TFF)/.covey-tff: tests/parity/requirements.txt
	@echo "installing TensorFlow Federated into $(VENV_TFF); this takes some minutes"
	@"$(PYTHON)" -m venv --clear "$(VENV_TFF)"
	@$(VENV_TFF)/bin/python $(PIP_INSTALL) --no-deps --require-hashes -r tests/parity/requirements.txt
	@touch $@

# Tests that miss a program are skipped, so without root the rest still runs.
debian:
	@$(call debian_install,$(TEST_PACKAGES))

debian-slow:
	@$(call debian_install,$(TEST_PACKAGES) $(SLOW_PACKAGES))

define debian_install
missing=""; \
for package in $(1); do \
	dpkg-query -W -f '$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
done; \
if [ -z "$$missing" ] || ! command -v apt-get >/dev/null; then :; \
elif [ -z "$(ROOT)" ]; then echo "not root: tests that need$$missing are skipped"; \
else echo "installing$$missing"; $(APT) $$missing >/dev/null || { apt-get update -qq && $(APT) $$missing >/dev/null; }; fi
endef
