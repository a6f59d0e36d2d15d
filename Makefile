# The commands of a checkout. Each sets up .venv by itself, and takes seconds when nothing changed.
#
#   make demo    train on a synthetic scene with and without the losses; a table and a picture in runs/demo/
#   make test    every test (PYTEST_ARGS="-k name" for some)
#   make sanitize  the tests of the CPU operators on a build that watches its memory and its arithmetic
#   make lint    ruff and mypy
#   make bench   the benchmarks
#   make wheel   source archive and wheel in dist/
#
# PYTHON names the interpreter that .venv is made with (3.11 or newer), WORKERS the processes of the tests.

PYTHON ?= python3
CORES := $(shell nproc 2>/dev/null || echo 2)
WORKERS ?= $(shell echo $$(($(CORES) < 8 ? $(CORES) : 8)))

BIN := .venv/bin
READY := .venv/.in2nect-ready
INSTALLED_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

# ASan and UBSan, with the casts of numbers that do not fit.
SANITIZERS := address,undefined,float-cast-overflow
# No leaks are looked for: Python and torch keep memory until the process ends. A finding ends the process.
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

.PHONY: demo test sanitize lint bench wheel setup
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/in2nect demo

# One thread a worker: the workers are the parallelism.
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# With GCC. Its libraries must be loaded before Python, and libstdc++ with them, in which they look for __cxa_throw. They
# speak on stderr itself, which pytest must leave alone. Left out: what runs none of our C++ (the reference, the emulated
# CUDA kernels), and the tests of memory, which the sanitizers need much of themselves.
sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" IN2NECT_SANITIZE=$(SANITIZERS) $(BIN)/python setup.py -q build_ext --inplace
	$(SANITIZER_OPTIONS) IN2NECT_NATIVE_DIR="$(CURDIR)/build/sanitized" OMP_NUM_THREADS=1 \
	  LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell g++ -print-file-name=lib$(name).so))" \
	  $(BIN)/python -m pytest -n $(WORKERS) --capture=sys -k "not [reference and not memory" \
	  --ignore tests/ops/test_cuda_emulated.py tests/ops tests/test_functional.py $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The scripts are those that can be run; the other files of bench/ are their modules.
bench: $(READY)
	@for script in $$(grep -l '^if __name__ == "__main__":' bench/*.py); do \
	  echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# The wheel is built from the source archive, so both are tried.
wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

setup: $(READY)

# torch comes first: the compiled operators are built against the one that is installed.
$(READY): $(INSTALLED_FROM)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "in2nect needs Python 3.11 or newer and PYTHON=$(PYTHON) is not: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	  | xargs $(BIN)/python -m pip install --quiet
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev,bundled]'
	@$(BIN)/python -c 'from in2nect import native; [print(b, "operators:", native.why_not(b) or "ready") for b in ("cpp", "cuda")]'
	@touch $@
