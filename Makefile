# Two commands do everything on a fresh machine, each with its own set-up:
#   make demo    the main job on a pretrained model, whose package it downloads once (--toy: none)
#   make test    the whole test suite

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Plain `torch` may bring gigabytes of CUDA; set TORCH to the build you want, e.g.
#   make demo TORCH="torch==2.13.0 --index-url <the CUDA index of your choice>"
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE = 1
export AXOLOTL_DO_NOT_TRACK = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test lint format docs bench clean

demo: $(STAMP)
	$(BIN)/python -m demo

# One process per core with one thread each: small models run far faster so than with more threads.
test: $(STAMP)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages, into build/site; a broken link or a page outside the menu's reach is an error.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/python -m benchmarks.attribution

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "loki_plugin needs Python 3.11 or 3.12; set PYTHON="'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	date +%s > $@.begun
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -e '.[axolotl,dev,docs,real]'
	expr $$(date +%s) - $$(cat $@.begun) > $@  # its seconds, which the demo tells

clean:
	rm -rf $(VENV) .demo .demo-toy .pytest_cache .ruff_cache .mypy_cache build/site
