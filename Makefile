# The template's interface. Written for GNU Make 3.81 and any POSIX shell.

PROJECT := {{cookiecutter.project_slug}}
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The template's tests format, lint and type-check generated projects, so they have the project's requirements too.
LOCKS := requirements/dev.txt $(PROJECT)/requirements/run.txt $(PROJECT)/requirements/dev.txt
READY := $(VENV)/.ready
# What the gates run, in an environment of its own; a generated project has the same.
TOOLS := .venv-tools
TOOLS_LOCK := $(PROJECT)/requirements/tools.txt
TOOLS_READY := $(TOOLS)/.ready
GATE := $(TOOLS)/bin/python '$(PROJECT)/tools/gate.py'
FRESH := $(RUN) -m pytest --quiet tests/test_quality.py tests/test_gates.py -k
GATES := format lint types bandit audit secrets workflows container test sbom

.DEFAULT_GOAL := help
.PHONY: help demo $(GATES) gates hooks baseline test-fast test-all variants mutations bench celery-suite lock table setup

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## Generate a project, start its stack, send signed tasks, attack it, end everything
	@$(RUN) -m tests.demo

test: $(READY) $(TOOLS_READY) ## All tests: the template's, and a generated project's unit tests, live tests and attacks
	@$(RUN) -m pytest -m "not exhaustive"

test-fast: $(READY) $(TOOLS_READY) ## What needs no server and no second environment
	@$(RUN) -m pytest -m "not exhaustive and not slow"

test-all: $(READY) $(TOOLS_READY) ## make test, every variant and every Python on this machine
	@$(RUN) -m pytest

variants: $(READY) ## Every combination of answers, the oldest and the newest Cookiecutter, from a zip and from a repository
	@$(RUN) -m pytest tests/test_variants.py

celery-suite: $(READY) ## Celery's own integration tests, on stock and on ours (CELERY_SOURCE=/path/to/celery)
	@$(RUN) -m tests.celery_suite "$(CELERY_SOURCE)"

gates: $(GATES) ## Everything that a pipeline refuses, in the template and in a generated project

hooks: $(TOOLS_READY) ## Run the gates at each commit, and audit at each push
	@$(TOOLS)/bin/pre-commit install

format: $(READY) $(TOOLS_READY) ## Formatting
	@$(RUN) -m ruff format --check .
	@$(FRESH) formatted

lint: $(READY) $(TOOLS_READY) ## Ruff's rules, security among them; YAML and shell scripts
	@$(RUN) -m ruff check .
	@$(GATE) lint ':!$(PROJECT)'
	@$(FRESH) "linter or fresh and default and lint"

types: $(READY) $(TOOLS_READY) ## mypy, strictly
	@$(RUN) -m mypy
	@$(FRESH) type_checker

audit: $(TOOLS_READY) ## Known vulnerabilities of everything that is locked
	@$(TOOLS)/bin/python '$(PROJECT)/tools/audit.py' requirements/dev.txt requirements/tools/ci.txt '$(PROJECT)'/requirements/*.txt

secrets: $(READY) $(TOOLS_READY) ## What must not be committed: secrets, private keys, large files, halves of a merge
	@$(GATE) secrets
	@$(FRESH) "fresh and default and secrets"

baseline: $(TOOLS_READY) ## Accept what only looks like a secret: read the difference of .secrets.baseline, then commit it
	@git ls-files -z -- ':!*.secrets.baseline' | xargs -0 $(TOOLS)/bin/detect-secrets scan --no-verify --slim >.secrets.baseline

bandit: $(READY) $(TOOLS_READY) ## Insecure Python, and misuse of Celery wherever it is written
workflows: $(READY) $(TOOLS_READY) ## Pipelines: their schema, and zizmor at its strictest
container: $(READY) $(TOOLS_READY) ## Dockerfiles and compose files
bandit workflows container:
	@$(GATE) $@ ':!$(PROJECT)' ':!hooks' # those are Python only when they are rendered
	@$(FRESH) "fresh and default and $@"

sbom: $(TOOLS_READY) ## What the template's own tests are made of, in CycloneDX: reports/sbom.json
	@mkdir -p reports
	@$(TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o reports/sbom.json requirements/dev.txt

lock: $(READY) ## Lock all requirements again (make lock UPGRADE=--upgrade for newer versions)
	@for layer in $(PROJECT)/requirements/run $(PROJECT)/requirements/dev $(PROJECT)/requirements/flower \
		$(PROJECT)/requirements/tools requirements/dev requirements/tools/browser requirements/tools/ci \
		requirements/tools/image requirements/tools/kubernetes requirements/tools/oldest; do \
		$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
			--no-header $(UPGRADE) --output-file $$layer.txt $$layer.in || exit 1; \
	done

mutations: $(READY) ## Take each control out, one at a time, and see that a test fails
	@$(RUN) -m tests.mutations

bench: $(READY) ## Measure what each layer costs, beside stock Celery: reports/benchmark.json and .svg
	@$(RUN) -m tests.benchmark

table: $(READY) ## Attack a project of each broker and write the README's table
	@$(RUN) -m tests.attack_table && $(RUN) -m tests.controls

setup: $(READY) ## Make .venv from the hash-locked requirements

$(READY): $(LOCKS) $(PROJECT)/tools/venv.py
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install python3 and python3-venv" >&2; exit 1; }
	@PYTHON=$(PYTHON) $(PYTHON) '$(PROJECT)/tools/venv.py' $(VENV) $(LOCKS)

$(TOOLS_READY): $(TOOLS_LOCK) $(PROJECT)/tools/venv.py
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed: install python3 and python3-venv" >&2; exit 1; }
	@PYTHON=$(PYTHON) $(PYTHON) '$(PROJECT)/tools/venv.py' $(TOOLS) '$(TOOLS_LOCK)'
