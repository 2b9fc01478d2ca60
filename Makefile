# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests. Each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= docs/benchmarks

.PHONY: demo test lint gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/fastssl demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# GPU tests and the benchmark ladder with the Python at hand, installing nothing; JSON goes to $(OUT). Both run, whatever fails.
gpu-check:
	status=0; \
	$(PYTHON) -m pytest -m gpu tests || status=1; \
	$(PYTHON) -m tests.gpu_check --out $(OUT) || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
