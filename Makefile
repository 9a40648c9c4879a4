# make demo, make test: each works on a fresh clone with nothing installed, and is quick the second time.
# make test CASES=all: all cases of those tests, too, of which the long ones' are sampled otherwise; CASES=rest: those others.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
CASES ?= sample
N ?= 100
SEED ?= 0
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1
export ALLOW_MULTIPLE_LIBTPU_LOAD ?= 1

.PHONY: demo test lint docs bench fuzz clean

demo: .venv/demo
	$(BIN)/ringmoe demo

test: .venv/all
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cases $(CASES) tests

lint: .venv/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/all
	$(BIN)/python -m sphinx -E -W -q --keep-going docs out/docs
	@echo "out/docs/index.html"

bench: .venv/all
	$(BIN)/python -m pytest bench --benchmark-columns=min,median,rounds --benchmark-group-by=group

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "RingMoE needs Python 3.12 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Install one (pyenv install 3.12, apt install python3.12-venv, brew install python@3.12),"; \
	  echo "then: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@

.venv/all: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,bench,lint,docs,targets]'
	@touch $@ .venv/demo

fuzz: .venv/all
	$(BIN)/python -m tests.fuzz $(N) --seed $(SEED)

clean:
	rm -rf .venv .venv-oldest out .pytest_cache .ruff_cache .hypothesis .benchmarks
