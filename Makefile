# Two commands for newcomers: `make demo` and `make test`. Each makes .venv when there is none.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two sessions of tests: Triton's interpreter replaces the compiler for a whole process. The second takes what time the
# first leaves of the cores, and prints when both have ended. ARGS picks tests of the first.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(WORKERS),2)
INTERPRETED := tests/contract $(shell grep -l "^if INTERPRETED" tests/test_triton_*.py)
# Modules of which the first import makes what bytecode it needs.
UNUSED := /(tests?|testing|pip)/|/transformers/models/|/diffusers/pipelines/
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: install demo test lint bench docs clean

install: $(BIN)/.installed

demo: $(BIN)/.installed
	$(BIN)/codmd demo $(ARGS)

test: $(BIN)/.installed
ifdef ARGS
	$(TEST) --dist loadfile $(ARGS)
else
	nice -n 19 env TRITON_INTERPRET=1 $(TEST) --dist worksteal $(INTERPRETED) >$(VENV)/interpreted.txt 2>&1 & other=$$!; \
	trap "kill $$other" INT TERM; failed=0; \
	$(TEST) --dist loadfile --no-loadscope-reorder || failed=1; \
	wait $$other || failed=1; cat $(VENV)/interpreted.txt; exit $$failed
endif

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BIN)/.installed
	$(BIN)/python -m pytest -q benchmarks $(ARGS)

docs: $(BIN)/.installed
	$(BIN)/python -c "import mkdocs, latex2mathml" 2>/dev/null || $(BIN)/python -m pip install --quiet --no-compile --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/.installed: pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[$(EXTRAS)]"
	-$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib # on all cores, which pip does not
	touch $@

clean:
	rm -rf $(VENV) build dist site src/*.egg-info codmd/*.so
