# `make demo` shows a stall being diagnosed, `make test` checks everything; both fill .venv first when it lacks something.
#
# PIP_ARGS goes to pip. Where PyPI's PyTorch would bring gigabytes of CUDA and there is no GPU to use them:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
PINS := pyproject.toml telemetry/pyproject.toml constraints.txt
# pip compiles modules one after the other, COMPILE on all cores. Uncompiled, importing pandas alone takes two seconds in
# each command where Python may not write its caches (PYTHONDONTWRITEBYTECODE, a read-only file system).
INSTALL = $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
COMPILE = $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
PYTHON_IS_NEW = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check .
TYPES = $(BIN)/mypy
IMPORTS = $(BIN)/lint-imports --no-logo

.PHONY: help demo test test-vllm lint types imports format docs boards plotly clean

help:
	@echo "make demo      record a stall on the bundled engine, diagnose it, say who did it"
	@echo "make test      lint, types, imports and all tests"
	@echo "make test-vllm VLLM_PYTHON=VENV/bin/python     the hook in the schedulers of a real vLLM 0.32"
	@echo "make lint | types | imports     one of these"
	@echo "make format    format the code and mend what ruff can mend"
	@echo "make docs      write the pages of docs/ that are made from code"
	@echo "make boards    write the Grafana boards of dashboards/grafana/"
	@echo "make plotly    fetch from npm the part of Plotly that charts are drawn with, of the version that is installed"
	@echo "make clean     remove .venv and caches"

demo: .venv/.installed-demo
	@$(BIN)/stallscope demo

# Each check runs even if one before it failed: one run shows all there is to mend, and pytest's summary comes last.
test: .venv/.installed-dev
	@failed=0; \
	{ $(LINT); } || failed=1; \
	$(TYPES) || failed=1; \
	$(IMPORTS) || failed=1; \
	$(BIN)/pytest || failed=1; \
	exit $$failed

test-vllm: .venv/.installed-dev
	$(if $(VLLM_PYTHON),,$(error VLLM_PYTHON is to name the Python of an environment with vLLM 0.32))
	@STALLSCOPE_VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) $(BIN)/pytest tests/vllm tests/test_vllm_judge.py

lint: .venv/.installed-dev
	@$(LINT)

types: .venv/.installed-dev
	@$(TYPES)

imports: .venv/.installed-dev
	@$(IMPORTS)

format: .venv/.installed-dev
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: .venv/.installed-dev
	@$(BIN)/python docs/generate.py

boards: .venv/.installed-dev
	@$(BIN)/python dashboards/grafana/generate.py

plotly: .venv/.installed-dev
	@cd "$$(mktemp -d)" && npm pack --silent plotly.js-basic-dist-min@$$($(abspath $(BIN))/python -c \
	  'from plotly.offline import get_plotlyjs_version as version; print(version())') && tar -xzf *.tgz && \
	  cp package/plotly-basic.min.js $(CURDIR)/stallscope/reports/page/plotly.js && \
	  cp package/LICENSE $(CURDIR)/stallscope/reports/page/plotly.LICENSE

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/pip:
	$(if $(PYTHON_IS_NEW),,$(error stallscope needs Python 3.11 or newer, but '$(PYTHON)' is not: name one, as in 'make $(MAKECMDGOALS) PYTHON=python3.12'))
	@$(PYTHON) -m venv .venv

# Without PyTorch the demo still runs, in virtual time. No stamp then, so that the next run tries again.
.venv/.installed-demo: $(PINS) | .venv/bin/pip
	@echo "Installing stallscope and PyTorch into .venv: a minute or two, longer where PyTorch comes with CUDA (PIP_ARGS in the README)."
	@if $(INSTALL) -e telemetry -e '.[engine]'; then touch $@; else \
	  echo "PyTorch could not be installed: going on without it, the demo will run in virtual time."; \
	  $(INSTALL) -e telemetry -e .; \
	fi
	@$(COMPILE)

# All that the demo needs is among it.
.venv/.installed-dev: $(PINS) | .venv/bin/pip
	@echo "Installing stallscope, PyTorch and the test tools into .venv: two minutes, longer where PyTorch comes with CUDA (PIP_ARGS in the README)."
	@$(INSTALL) -e telemetry -e '.[all,dev]'
	@$(COMPILE)
	@touch .venv/.installed-demo $@
