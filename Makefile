# Every target but gpu-check sets up what it needs: a virtual environment with pinned versions and the
# library built from this tree. The demos need few packages (requirements-demo.txt), the others all of
# them (requirements.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py $(wildcard buildtools/*.py)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
DEVICE ?= cpu

.PHONY: setup demo demo-dense demo-detection test-fast test test-slow test-triton test-integrations dist test-dist kernels-hub bench bench-full gpu-check lint docs readme-picture format clean

setup: $(VENV)/.installed $(VENV)/.built

# --no-compile: a demo imports a small part of torch, and Python compiles what it imports.
$(VENV)/.demo: requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python must be 3.11 or newer for the pinned packages (3.10 serves to use disalign_ops), got %d.%d: PYTHON=python3.11 make ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements-demo.txt
	touch $@

$(VENV)/.installed: requirements.txt requirements-recipes.txt $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchvision -r requirements-recipes.txt
	touch $@

$(VENV)/.built: $(VENV)/.demo $(NATIVE) pyproject.toml
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.built
	$(BIN)/python examples/characters.py

demo-dense: $(VENV)/.built
	$(BIN)/python examples/pages.py

# Two processes of one thread each. What is in which set, and why: tests/support/sets.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# The kernels in every layout and dtype with every option, each value of a parameter at least once.
test-fast: setup
	$(PYTEST) -m "not standard and not slow" --once

test: setup
	$(PYTEST) -m "not slow and not fast"

# What repeats `make test` at length: see CONTRIBUTING.md.
test-slow: setup
	$(PYTEST) -m slow

# The operators' tests with Triton's interpreter in their place, all of them: some hours.
TRITON_TESTS := row forward_backward shard dense calibrate in_place autograd stage2 operators upsample linear
test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/python -W ignore -m pytest -q \
	  -p support.triton_operators -k "not depend_on and not beyond_the_cache and not keeps_no_gradient" \
	  $(foreach name,$(TRITON_TESTS),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))
	DISALIGN_OPS_TRITON_COMPILE=all $(BIN)/python -m pytest -q tests/_ops/test_triton_targets.py

# An environment with the frameworks, 6 GB of packages, and the wheel of this tree under another torch
# than it was built with.
INTEGRATIONS := .venv-integrations
PACKAGE := $(shell find disalign_ops -name '*.py')

$(INTEGRATIONS)/.installed: requirements-integrations.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet -r requirements-integrations.txt
	touch $@

$(INTEGRATIONS)/.built: $(INTEGRATIONS)/.installed $(VENV)/.built $(PACKAGE)
	rm -rf build/wheel-out
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel-out .
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel-out/*.whl
	touch $@

# Without conftest.py files: pytest would put their folders on the path, and find this tree there
# before the wheel.
test-integrations: $(INTEGRATIONS)/.built
	DISALIGN_OPS_TEST_WHEEL=1 $(INTEGRATIONS)/bin/python -P -m pytest --noconftest -o pythonpath= tests/integrations

# What is published, in dist/. DISALIGN_OPS_CUDA=1: with the CUDA library for all architectures.
RELEASE := .venv-release

$(RELEASE)/.installed: requirements-release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet -r requirements-release.txt
	touch $@

dist: $(VENV)/.demo $(RELEASE)/.installed
	PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" $(BIN)/python -m buildtools.dist dist

# The wheel of `make dist` in a new environment under another torch, without a compiler.
TORCH ?= 2.14.1
CLEAN := build/clean-$(TORCH)
test-dist: $(if $(wildcard dist/*manylinux*.whl),,dist)
	$(PYTHON) -m venv --clear $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet torch==$(TORCH) pytest dist/*manylinux*.whl
	env -i PATH="$(CURDIR)/$(CLEAN)/bin" DISALIGN_OPS_TEST_WHEEL=1 $(CLEAN)/bin/python -I -m pytest \
	  --noconftest -o pythonpath= -o addopts= tests/integrations/test_wheel.py

# What the Hugging Face kernels hub builds from: buildtools/kernels_hub.py. REPOSITORY: its name there.
REPOSITORY ?= OWNER/disalign-ops
kernels-hub:
	$(PYTHON) -m buildtools.kernels_hub build/kernels-hub --repository $(REPOSITORY)
	$(PYTHON) -m buildtools.kernels_hub build/kernels-hub-compiled --compiled --repository $(REPOSITORY)

# Object detection and instance segmentation need torchvision.
demo-detection: $(INTEGRATIONS)/.built
	$(INTEGRATIONS)/bin/python -W ignore examples/boxes.py

bench: setup
	$(BIN)/python -m benchmarks.run --device $(DEVICE)
	$(if $(filter cpu,$(DEVICE)),$(BIN)/python -m benchmarks.overhead)
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python -m benchmarks.bandwidth --device cuda)

bench-full: setup
	$(BIN)/python -m benchmarks.run --device $(DEVICE) --full

# On a machine with a GPU and no network: by PYTHON's own packages, in no virtual environment. Further
# runs go on; STEPS="build model": these again, and no others; MINUTES: of this run. See docs/gpus.md.
OUT ?= out/gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES)) $(STEPS)

# Into build/site; a warning fails it (and would be none with --quiet). The variable silences an
# announcement of the theme's makers.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# docs/pictures: the README's first screen by Chromium (apt-get install chromium).
readme-picture: setup
	$(BIN)/python -m buildtools.readme_picture

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/zizmor --quiet --offline --config .github/zizmor.yml .github

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) $(INTEGRATIONS) $(RELEASE) dist build out disalign_ops/lib *.egg-info
