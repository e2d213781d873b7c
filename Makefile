# Each target does all its own set-up: a fresh machine needs Python >= 3.10 and make, nothing else.
# What is installed is remembered in stamp files, so the second run is quick and works offline.

# What .venv is made with, and .venv-lowest: the oldest pydantic has wheels up to Python 3.13.
PYTHON ?= python3
LOWEST_PYTHON ?= $(shell for p in python3.10 python3.11; do $$p -c '' 2>/dev/null && echo $$p && exit; done; echo $(PYTHON))
# More arguments for demo, demo-batch, demo-budget, serve, test, test-lowest and bench.
ARGS ?=

PY := .venv/bin/python
PIP := -m pip install --quiet --quiet --disable-pip-version-check

# $(call venv,directory,interpreter): one clear line when the interpreter will not do.
define venv
	@$(2) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo 'make: "$(2)" is not Python 3.10 or newer; name one that is: make PYTHON=python3.12' >&2; exit 1; }
	@$(2) -c 'import ensurepip, venv' 2>/dev/null || { echo 'make: "$(2)" cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	@echo 'making $(1) …'; $(2) -m venv --clear $(1)
	@$(1)/bin/python $(PIP) 'pip>=21.3'  # the first that installs a pyproject.toml editable
endef

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

install: .venv/dev  ## make .venv with everything for development

demo: .venv/core  ## a short streamed talk, through a local server
	@$(PY) -m LLM demo $(ARGS)

demo-budget: .venv/core  ## 200 calls, paced, budgeted, cached and reported, through a local server
	@$(PY) -m LLM demo budget $(ARGS)

demo-batch: .venv/core  ## 5,000 prompts, killed half-way, and resumed, through a local server
	@$(PY) -m LLM demo batch $(ARGS)

# A model of your own: AGENTS_LOCAL=false make serve, with what `python -m agents serve --help` tells of.
serve: .venv/serve  ## the chat service with a stand-in model, in data/chat.db; prints its address
	@mkdir -p data
	@AGENTS_LOCAL=$${AGENTS_LOCAL:-true} AGENTS_DATABASE=$${AGENTS_DATABASE:-sqlite:///data/chat.db} $(PY) -m agents serve $(ARGS)

test: .venv/dev  ## run all tests, then ask for 95 % branch coverage
	@$(PY) -m coverage erase
	@$(PY) -m pytest -n auto --dist loadgroup --cov --cov-report= $(ARGS)
	@$(MAKE) --no-print-directory cover

cover: .venv/dev  ## what the last `make test` did not run; fails below 95 %
	@$(PY) -m coverage report --fail-under=95

lint: .venv/dev  ## ruff, mypy and the import contract of setup.cfg
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) -c 'from importlinter.cli import lint_imports as run; exit(run(no_cache=True, no_logo=True))'

format: .venv/dev  ## rewrite the code as `make lint` wants it
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

docs: .venv/dev  ## build docs/_build/html, warnings are errors
	@$(PY) -m sphinx --builder html --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	@echo 'docs/_build/html/index.html'

bench: .venv/dev  ## measure against other clients; writes docs/benchmarks.md
	@$(PY) bench/run.py $(ARGS)

test-lowest: .venv-lowest/dev  ## all tests, with the oldest dependencies that pyproject.toml allows
	@.venv-lowest/bin/python -m pytest -n auto --dist loadgroup --deselect tests/test_docs.py::test_the_documentation_builds_without_a_warning $(ARGS)  # Sphinx stumbles over pydantic 2.10

soak: .venv/dev  ## 20,000 calls, one in ten faulty: nothing may be left behind
	@LLM_SOAK_CALLS=20000 $(PY) -m pytest -q --timeout 600 tests/test_soak.py $(ARGS)

clean:  ## remove all that these targets made
	rm -rf .venv .venv-lowest build dist docs/_build htmlcov *.egg-info .coverage .coverage.* .hypothesis .*_cache
	find LLM agents tests bench docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.venv/bin/python:
	$(call venv,.venv,$(PYTHON))

.venv/core: pyproject.toml | .venv/bin/python
	@echo 'installing …'; $(PY) $(PIP) --editable '.[cli,progress]'
	@touch $@

.venv/serve: pyproject.toml | .venv/bin/python
	@echo 'installing …'; $(PY) $(PIP) --editable '.[cli,server]'
	@touch $@

.venv/dev: .venv/core
	@echo 'installing what development needs …'; $(PY) $(PIP) --editable '.[dev]'
	@touch $@

.venv-lowest/bin/python:
	$(call venv,.venv-lowest,$(LOWEST_PYTHON))

.venv-lowest/dev: pyproject.toml | .venv-lowest/bin/python
	@sed -E -n 's/^ *"(requests|urllib3|pydantic)>=([0-9.]+)".*/\1==\2/p' pyproject.toml > .venv-lowest/floors.txt
	@echo 'installing the oldest:' `cat .venv-lowest/floors.txt`; .venv-lowest/bin/python $(PIP) --constraint .venv-lowest/floors.txt --only-binary pydantic-core --editable '.[cli,docs,test]'
	@touch $@

.PHONY: help install demo demo-batch demo-budget serve test cover lint format docs bench test-lowest soak clean
.DELETE_ON_ERROR:
