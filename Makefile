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

# GPU tests and the benchmarks with the Python at hand, installing nothing; JSON goes to $(OUT). All parts run, whatever fails, and each
# goal is told beside its figure. `make gpu-check PART=vit_small` runs one, in less than ten minutes: tests augment loader resnet50
# vit_small vit_base memory switches_resnet50 switches_vit_small loader_peers. `PART="augment loader" WITHIN=590` runs two in that time.
gpu-check:
	$(PYTHON) -m tests.gpu_check --out $(OUT) $(if $(PART),--only $(PART)) $(if $(WITHIN),--within $(WITHIN))

clean:
	rm -rf $(VENV) demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
