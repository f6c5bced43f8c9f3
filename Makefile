# One environment (.venv) for every target; whichever runs first makes it.
#   make TORCH='torch==2.13.0+cpu' test    another torch; pip's own settings say where wheels come from
#   make PYTHON=python3.12 fit             another Python (3.11 or 3.12)
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
CONFIG ?= configs/pretrain.yaml
ARGS ?=
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv/peers
# README's `python -m app ...` is that of the environment.
USE = echo 'by hand: source .venv/bin/activate, then python -m app --help (or .venv/bin/python -m app --help)'

.PHONY: help setup fit test lint format tensorboard
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@$(USE)

setup: $(READY)  ## set up .venv, and say how to use it
	@$(USE)

fit: $(READY)  ## train: CONFIG=FILE (the tiny model unless given), ARGS='--key=value ...'
	@$(BIN)/python -m app fit --config $(CONFIG) $(ARGS)

test: $(READY) $(PEERS)/.ready  ## run the tests: ARGS='tests/modules -k name'
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: $(READY)  ## mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

tensorboard: $(READY)  ## show every run under runs/: ARGS='--port 6007 ...'
	@$(BIN)/python -m app.tensorboard --logdir runs $(ARGS)

# torch comes first and alone, so that pip takes the build (CPU or CUDA) that the machine offers and nothing later
# replaces it; the lock follows without dependencies, so that nothing pulls torchvision (see requirements.lock).
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11 or 3.12 with its venv module found; name one: make PYTHON=FILE' >&2; exit 2; }
	@echo 'setting up .venv (a minute or two, once)' >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
	@$(USE) >&2

# What only tests compare with (Triton alone is 1 GB) lies in a folder that only they look into: transformers, and a
# user's run, stay as they are without it. Where torch has brought its own Triton, that one is used.
$(PEERS)/.ready: requirements-peers.lock | $(READY)
	@echo 'setting up $(PEERS) (half a minute, once)' >&2
	@rm -rf $(PEERS)
	@has=$$($(BIN)/python -c 'import triton; print("triton")' 2>/dev/null); grep -v "^$${has:-#}" requirements-peers.lock | \
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	--no-build-isolation --target $(PEERS) --requirement /dev/stdin
	@touch $@
