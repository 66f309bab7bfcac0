# `make demo` and `make test` set everything up by themselves: Python 3.11, pip and make are all they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
VERL_VENV := .venv-verl
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench test-verl reproduce clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready  ## train on heterogeneous rewards and write a report
	$(BIN)/polyreward train

test: $(VENV)/.ready  ## all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready  ## side by side with peers; writes benchmarks/README.md
	$(BIN)/python benchmarks/run.py $(if $(wildcard $(VERL_VENV)/.ready),--verl-python $(VERL_VENV)/bin/python)

# the last four are what verl's trainers import and its package does not require
$(VERL_VENV)/.ready: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt torch setuptools
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-verl.txt verl \
		TransferQueue cachetools fastapi uvicorn
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

test-verl: $(VERL_VENV)/.ready  ## against verl's own registries, in an environment of its own
	$(VERL_VENV)/bin/python scripts/test_verl.py

reproduce: $(VENV)/.ready  ## all studies at full size; rewrites results/ and the README's table
	$(BIN)/polyreward reproduce
	$(BIN)/python scripts/update_readme.py

clean:
	rm -rf $(VENV) $(VERL_VENV) runs build dist
