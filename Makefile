# Every target sets itself up: `make demo` and `make test` work in a fresh clone with Python 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format bench compile gpu clean

demo: $(INSTALLED)
	$(RUN) -m hawk_kernels.demo $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(INSTALLED)
	$(RUN) -m bench.micro $(ARGS)

compile: $(INSTALLED)
	$(RUN) -m bench.compile_only $(ARGS)

# Installs nothing: PYTHON is an interpreter that has torch with CUDA, triton, transformers and pytest.
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
