# The template's interface. Written for GNU Make 3.81 and any POSIX shell.

PROJECT := {{cookiecutter.project_slug}}
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The template's tests format, lint and type-check generated projects, so they have the project's requirements too.
LOCKS := requirements/dev.txt $(PROJECT)/requirements/run.txt $(PROJECT)/requirements/dev.txt
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-all lint lock table setup

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## Generate a project, start its stack, send signed tasks, attack it, end everything
	@$(RUN) -m tests.demo

test: $(READY) ## All tests: the template's, and a generated project's unit tests, live tests and attacks
	@$(RUN) -m pytest -m "not exhaustive"

test-fast: $(READY) ## What needs no server and no second environment
	@$(RUN) -m pytest -m "not exhaustive and not slow"

test-all: $(READY) ## make test, every variant and every Python on this machine
	@$(RUN) -m pytest

lint: $(READY) ## Formatting, security and other rules, types: of the template and of a generated project
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(RUN) -m pytest --quiet tests/test_quality.py

lock: $(READY) ## Lock all requirements again (make lock UPGRADE=--upgrade for newer versions)
	@for layer in $(PROJECT)/requirements/run $(PROJECT)/requirements/dev requirements/dev; do \
		$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
			--no-header $(UPGRADE) --output-file $$layer.txt $$layer.in || exit 1; \
	done

table: $(READY) ## Write the README's attack table from what make demo reported
	@$(RUN) -m tests.attack_table

setup: $(READY) ## Make .venv from the hash-locked requirements

$(READY): $(LOCKS) $(PROJECT)/tools/venv.py
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install python3 and python3-venv" >&2; exit 1; }
	@PYTHON=$(PYTHON) $(PYTHON) '$(PROJECT)/tools/venv.py' $(VENV) $(LOCKS)
