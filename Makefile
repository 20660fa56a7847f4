# demo, demo-dense, test, bench, lint and docs set up what they need: a virtual environment with pinned versions
# (requirements.txt) and the library built from this tree.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
DEVICE ?= cpu

.PHONY: setup demo demo-dense test test-triton test-integrations bench bench-full lint docs format clean

setup: $(VENV)/.built

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE) pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python examples/characters.py

demo-dense: setup
	$(BIN)/python examples/pages.py

test: setup
	$(BIN)/python -m pytest

# The operators' tests with Triton's interpreter in their place, all of them: about an hour.
TRITON_TESTS := row shard dense calibrate in_place autograd stage2 operators upsample linear
test-triton: setup
	cd tests && TRITON_INTERPRET=1 PYTHONPATH=. ../$(BIN)/python -W ignore -m pytest -q \
	  -p triton_operators -k "not depend_on" $(TRITON_TESTS:%=test_%.py)

# The adapters with the frameworks themselves, under another torch than the library is built with:
# 6 GB of packages.
INTEGRATIONS := .venv-integrations
test-integrations: setup
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet -r requirements-integrations.txt
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel/*.whl
	$(INTEGRATIONS)/bin/python -P -m pytest -o pythonpath= tests/integrations

bench: setup
	$(BIN)/python -m benchmarks.run --device $(DEVICE)
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m benchmarks.bandwidth --device cuda)

bench-full: setup
	$(BIN)/python -m benchmarks.run --device $(DEVICE) --full

# Into build/site; a warning fails it (and would be none with --quiet). The variable silences an
# announcement of the theme's makers.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build out disalign_ops/lib *.egg-info
