# Every target sets itself up: `make demo` and `make test` work in a fresh clone with Python 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo floor test lint format bench plots compile gpu clean

demo: $(INSTALLED)
	$(RUN) -m hawk_kernels.demo $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses logical --dist worksteal $(ARGS)

# The declared floor of transformers, or another version: make floor FLOOR=5.17.0
FLOOR ?= 5.5.4
FLOOR_TESTS := tests/test_families.py tests/test_family_edges.py tests/test_hf_parts.py tests/test_prune.py \
	tests/test_prune_contract.py

floor: $(VENV)-$(FLOOR)/.installed
	$(VENV)-$(FLOOR)/bin/python -m pytest $(FLOOR_TESTS) $(ARGS)

$(VENV)-$(FLOOR)/.installed: setup.py constraints.txt constraints-floor.txt
	$(PYTHON) -m venv $(VENV)-$(FLOOR)
	$(VENV)-$(FLOOR)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)-$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt transformers==$(FLOOR)
	touch $@

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# The whole suite for this machine's CPU or GPU, into bench/results/<device>.
bench: $(INSTALLED)
	$(RUN) -m bench $(ARGS)

plots: $(INSTALLED)
	$(RUN) -m bench.plots $(ARGS)

compile: $(INSTALLED)
	$(RUN) -m bench.compile_only $(ARGS)

# Installs nothing: PYTHON is an interpreter that has torch with CUDA, triton, transformers, pytest and hypothesis.
# ARGS=--dry-run rehearses it on a CPU.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
