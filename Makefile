# Every target sets itself up: `make demo` and `make test` work in a fresh clone with Python 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RUNNABLE := $(VENV)/.runnable
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo floor ceiling test races hostile lint format bench plots compile gpu clean

# Needs only what the demo imports, not the linters and tests.
demo: $(RUNNABLE)
	$(RUN) -m hawk_kernels.demo $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest --numprocesses logical --dist worksteal $(ARGS)

# Thousands of schedules of the kernels' programs; ARGS="--schedules 10000 --minutes 60 --seed 1", or ARGS=--mutants.
races: $(INSTALLED)
	$(RUN) -m tests.concurrent $(ARGS)

# Random prompts, modes and methods for every family; ARGS="--minutes 120 --seed 1", "--only llava", or "--replay CASE".
hostile: $(INSTALLED)
	$(RUN) -m tests.hostile $(ARGS)

# The lowest declared transformers and Triton; another transformers: make floor FLOOR=5.17.0. The lowest declared torch
# is left out: where the index has no CPU build of it, it brings CUDA packages (TORCH_FLOOR=2.11.0 takes it all the same).
FLOOR ?= 5.5.4
TORCH_FLOOR ?=
# Triton 3.6 spills registers in two kernels for sm_100, which costs time there and changes no result.
FLOOR_ONLY := -k "not test_compiles_without_a_device"
FLOOR_TESTS := tests/test_families.py tests/test_family_edges.py tests/test_hf_parts.py tests/test_prune.py \
	tests/test_prune_contract.py tests/test_compact.py tests/test_triton_launch.py tests/test_methods.py \
	$(wildcard tests/test_method_*.py) tests/test_cache_rows.py tests/test_packed_sequences.py tests/test_hybrids.py

floor: $(VENV)-$(FLOOR)/.installed
	$(VENV)-$(FLOOR)/bin/python -m pytest $(FLOOR_TESTS) $(FLOOR_ONLY) $(ARGS)

$(VENV)-$(FLOOR)/.installed: setup.py constraints.txt constraints-floor.txt
	$(PYTHON) -m venv $(VENV)-$(FLOOR)
	$(VENV)-$(FLOOR)/bin/python $(PIP) --editable '.[dev]'
	$(VENV)-$(FLOOR)/bin/python -m pip install --quiet --constraint constraints-floor.txt transformers==$(FLOOR) triton numpy \
		$(TORCH_FLOOR:%=torch==%)
	touch $@

# The newest versions that setup.py allows, with the same tests.
ceiling: $(VENV)-ceiling/.installed
	$(VENV)-ceiling/bin/python -m pytest $(FLOOR_TESTS) $(ARGS)

$(VENV)-ceiling/.installed: setup.py constraints.txt constraints-ceiling.txt
	$(PYTHON) -m venv $(VENV)-ceiling
	$(VENV)-ceiling/bin/python $(PIP) --editable '.[dev]'
	$(VENV)-ceiling/bin/python -m pip install --quiet --constraint constraints-ceiling.txt --upgrade triton transformers
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

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(RUNNABLE): setup.py constraints.txt | $(RUN)
	$(RUN) $(PIP) --editable '.[hf]'
	touch $@

$(INSTALLED): setup.py constraints.txt | $(RUN)
	$(RUN) $(PIP) --editable '.[dev]'
	touch $@ $(RUNNABLE)

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
