# `make demo` and `make test` set everything up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo smollm2 test types unit test-slow soak gpu-test bench ui clean

demo: $(VENV)/base  ## train from scratch on the bundled data, from tokenizer to scores: five minutes on two cores
	$(BIN)/python -m pipeline run -c configs/run/quickstart.yaml

smollm2: $(VENV)/base  ## tune SmolLM2-135M-Instruct on spam and on instructions, score it, export it
	$(BIN)/python -m pipeline run -c configs/run/smollm2.yaml

test: $(VENV)/dev  ## lint, type check, and all tests but the slow and GPU ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types unit  # mypy runs while the tests are waiting

types:
	$(BIN)/mypy

unit:
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/dev  ## the slow fault tests: twenty kills of one run, every kind of resume
	$(BIN)/python -m pytest -m slow tests/faults

gpu-test: $(VENV)/dev  ## on a machine with a GPU: its tests, then benchmarks against the peers
	$(BIN)/python -m pytest -n 4 -m gpu
	$(BIN)/python -m benchmarks.gpu_levers
	$(BIN)/python -m benchmarks --workloads '[P1,P2,P3,P4,P5-1,P5-16,P5-64]'

bench: $(VENV)/dev  ## benchmark against the peers, for hours; WORKLOADS='[P1,P3]' runs only these
	$(BIN)/python -m benchmarks $(if $(WORKLOADS),--workloads '$(WORKLOADS)')

ui: $(VENV)/base  ## browse the runs in MLflow
	$(BIN)/python -m pipeline ui

$(VENV)/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
