# Everything happens in .venv; nothing outside the checkout is touched. See README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV ?= .venv
# Any requirement that pip understands, or the path of a wheel: TORCH=torch==2.11.0, TORCH=./torch-….whl
TORCH ?= torch==2.13.0
# Used only where torch brings no Triton of its own (CPU builds); the interpreter runs the Triton kernels' tests there.
TRITON ?= triton==3.6.0
# The first of these that is new enough; PYTHON=/path/to/python names another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

PY := $(VENV)/bin/python
STAMP := $(VENV)/.prism-fast-installed
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
# A file stays on one worker, so that what its tests share is built once; files begin in the order of tests/conftest.py.
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# vLLM and DeepSpeed have an environment of their own, made anew when its list changes.
ENGINES := .venv-engines
ENGINES_SHIM := tests/engines/venv/torchvision_beside_cpu_torch.py
ENGINES_STAMP := $(ENGINES)/.installed-$(shell cat constraints-engines.txt $(ENGINES_SHIM) | sha256sum | cut -c 1-16)
# Another interpreter that imports both: nothing is installed then.
ENGINES_PYTHON ?=

# An interpreter that imports verl and torch; tests/integrations/README.md says how to make one.
VERL_PYTHON ?=

.PHONY: install test test-long test-gpu test-engines verl-parity demo docs lint build clean

install: $(STAMP)

$(STAMP): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "prism-fast needs Python >= 3.11; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet "setuptools>=77" wheel "pybind11>=2.13" -c constraints.txt
	$(PY) -m pip install --quiet "$(TORCH)" -c constraints.txt
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet "$(TRITON)" -c constraints.txt
	$(PY) -m pip install --quiet --no-build-isolation -e ".[train,test,docs]" -c constraints.txt
	touch $@

test: $(STAMP)
	$(PYTEST) -m "not gpu and not long"

test-long: $(STAMP)
	$(PYTEST) -m "long and not gpu"

test-gpu: $(STAMP)
	$(PY) -m pytest -m gpu

$(ENGINES_STAMP):
	@test -n "$(PYTHON)" || { echo "prism-fast needs Python >= 3.11; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	rm -rf $(ENGINES)
	"$(PYTHON)" -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet "setuptools==78.1.1" wheel
	$(ENGINES)/bin/python -m pip install --quiet "torch==2.13.0" -c constraints-engines.txt
	$(ENGINES)/bin/python -m pip install --quiet --no-deps -r constraints-engines.txt
	site=$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	cp $(ENGINES_SHIM) $$site/; echo "import torchvision_beside_cpu_torch" > $$site/torchvision_beside_cpu_torch.pth
	touch $@

test-engines: $(if $(ENGINES_PYTHON),,$(ENGINES_STAMP))
	OMP_NUM_THREADS=1 "$(or $(ENGINES_PYTHON),$(ENGINES)/bin/python)" -m pytest tests/engines

verl-parity:
	@test -n "$(VERL_PYTHON)" || { echo "name an interpreter that has verl: make verl-parity VERL_PYTHON=..." >&2; exit 2; }
	PYTHONPATH=. OMP_NUM_THREADS=1 "$(VERL_PYTHON)" tests/integrations/verl_parity.py

demo: $(STAMP)
	$(VENV)/bin/prism-fast run digits

# The pages of docs/ as a site in build/docs, every link checked.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) -m pytest -q tests/docs

lint: $(STAMP)
	$(PY) -m ruff check .

build: $(STAMP)
	$(PY) -m pip wheel --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache prism_fast/_C*.so
