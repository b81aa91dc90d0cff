# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo smollm2 test types unit test-slow soak gpu-test bench ui clean

demo: $(VENV)/base  ## text to a scored model, in about five minutes on two cores
	$(BIN)/python -m pipeline run -c configs/run/quickstart.yaml

smollm2: $(VENV)/base  ## the same from published weights: SmolLM2-135M learns spam and instructions
	$(BIN)/python -m pipeline run -c configs/run/smollm2.yaml

test: $(VENV)/dev  ## lint, types and all tests but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types unit  # tests wait now and then; types are checked meanwhile

types:
	$(BIN)/mypy

unit:
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/dev  ## the long part of the fault suite: twenty kills of one run, resumes of every kind
	$(BIN)/python -m pytest -m slow tests/faults

gpu-test: $(VENV)/dev  ## on a machine with a GPU: its tests, then ours and peers there, in one report
	$(BIN)/python -m pytest -n 4 -m gpu
	$(BIN)/python -m benchmarks.gpu_levers
	$(BIN)/python -m benchmarks --workloads '[P1,P2,P3,P4,P5-1,P5-16,P5-64]'

bench: $(VENV)/dev  ## ours and its peers in turn; hours: WORKLOADS='[P1,P3]' for some
	$(BIN)/python -m benchmarks $(if $(WORKLOADS),--workloads '$(WORKLOADS)')

ui: $(VENV)/base  ## MLflow on the store of the runs
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
