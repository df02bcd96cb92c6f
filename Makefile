# Two commands on a fresh machine: `make demo` and `make test`.
# VENV may point anywhere, PYTHON at any Python from 3.11 on.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= demo_output
export JAX_PLATFORMS ?=

.PHONY: demo test check format env env-dev clean

env: $(VENV)/.runtime
env-dev: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexjax needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The bundled model, its weights on all three tiers, a file of prompts.
demo: env
	mkdir -p $(OUT)
	$(BIN)/flexjax generate --input=configs/demo_prompts.jsonl \
	  --output=$(OUT)/results.jsonl --stats=$(OUT)/stats.json \
	  --weights=40,30,30 --cache=50,50,0 --hidden=100,0,0 \
	  --batch_size=4 --num_batches=2 --disk_dir=$(OUT)/disk
	cat $(OUT)/results.jsonl

check: env-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

format: env-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(OUT) build *.egg-info
