# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests. Each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= docs/benchmarks

.PHONY: demo test drill lint interpreter gpu-check clean

demo: $(VENV)/.installed
	$(BIN)/fastssl demo

# No test of equality may be skipped for want of something that this file installs (tests/needs.py).
test: $(VENV)/.installed-dev $(VENV)/interpreter/.installed
	FASTSSL_TEST_ALL=1 $(BIN)/python -m pytest -n auto --dist loadfile

# Short runs that are killed, hung up, left without a disk, a terminal or a process, against one that nobody disturbed: the same weights.
drill: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/fastssl/pretraining/test_soak.py tests/fastssl/pretraining/test_resume.py \
	  tests/fastssl/pretraining/test_unwritable_output.py tests/fastssl/core/test_rendezvous.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# GPU tests and benchmarks with the Python at hand, installing nothing; dated JSON and results.tgz go to $(OUT), and each goal is told
# beside its figure. `make gpu-check FIRST=1` is for the first minutes on a GPU (540 seconds). STAGE="tests augment" runs these stages
# only (`fastssl bench gpu --help` names them), WITHIN=590 ends inside that many seconds, SHARDS=folder measures with your images, and
# WORK=folder is where photographs, shards and compiled kernels stay for the next call.
gpu-check:
	$(PYTHON) -m fastssl bench gpu --out $(OUT) $(if $(FIRST),--first) $(if $(STAGE),--only $(STAGE)) \
	  $(if $(WITHIN),--seconds $(WITHIN)) $(if $(SHARDS),--shards $(SHARDS)) $(if $(WORK),--work $(WORK))

clean:
	rm -rf $(VENV) demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Triton's interpreter, in which the tests run its kernels on a CPU, does not know NumPy 2.4: that test alone puts this folder first.
interpreter: $(VENV)/interpreter/.installed

$(VENV)/interpreter/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/interpreter 'numpy==2.3.5'
	touch $@
