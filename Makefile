# Two commands for newcomers: `make demo` and `make test`. Each makes .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two sessions of tests: Triton's interpreter replaces the compiler for a whole process. ARGS picks tests of the first.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(WORKERS),2)
INTERPRETED := tests/contract $(shell grep -l "^if INTERPRETED" tests/test_triton_*.py)
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test lint bench clean

demo: $(BIN)/.installed
	$(BIN)/codmd demo $(ARGS)

test: $(BIN)/.installed
ifdef ARGS
	$(TEST) --dist loadfile $(ARGS)
else
	failed=0; $(TEST) --dist loadfile || failed=1; \
	TRITON_INTERPRET=1 $(TEST) --dist worksteal $(INTERPRETED) || failed=1; exit $$failed
endif

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.installed
	$(BIN)/python -m pytest -q benchmarks $(ARGS)

$(BIN)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[dev]"
	-$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib # on all cores, which pip does not
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info codmd/*.so
