# What there is to do with a clone. Needs Python 3.11+, git, make and a C++ compiler; uv is brought along if missing.
.DEFAULT_GOAL := help
PYTHON ?= python3
WORKERS ?= 3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help: ## Say what there is to do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## Install the locked versions and this package into .venv

.venv/installed: requirements.lock pyproject.toml | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=python3.12")'
	$(UV) venv --quiet --seed --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --python .venv --compile-bytecode --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation -e .
	@touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet uv

install-eval: .venv-eval/installed ## Install lmms-eval, in an environment of its own, into .venv-eval

.venv-eval/installed: requirements-eval.lock pyproject.toml | $(UV)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv-eval
	$(UV) pip install --quiet --python .venv-eval --compile-bytecode --require-hashes -r requirements-eval.lock
	$(UV) pip install --quiet --python .venv-eval --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## Train a small model from nothing and ask it about images (minutes, CPU)
	$(RUN) -m vlm.demo

test: install ## Run the tests, WORKERS files at a time; what one process compiles serves the others
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not torture and not attack and not load" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: install ## Run the tests that take minutes each
	$(RUN) -m pytest -m slow

torture: install ## Kill runs, damage their checkpoints, fill their disk, again and again; half an hour
	$(RUN) -m pytest -m torture tests/torture

attack: install ## Attack the page, the endpoint, checkpoints, records and overrides; about six minutes
	$(RUN) -m pytest -m attack tests

load: install ## Put the endpoint under 100 clients for a minute, hostile ones among them
	$(RUN) -m pytest -m load tests

lint: install ## Check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

audit: $(UV) ## Look the locked versions up among the known vulnerabilities (OSV); needs that database
	@log=$$(mktemp); $(UV) tool run pip-audit --vulnerability-service osv --require-hashes --disable-pip \
	    --progress-spinner off -r requirements.lock > $$log 2>&1; status=$$?; \
	if grep -q 'known vulnerabilit' $$log; then cat $$log; rm $$log; exit $$status; fi; \
	tail -n 1 $$log; rm $$log; \
	echo 'make audit: nothing was checked, since pip-audit or its database (api.osv.dev) cannot be reached from here'; exit 2

docs: install | $(UV) ## Write docs/configuration.md from the schema, and build the site into site/
	$(RUN) docs/write_configuration.py
	NO_MKDOCS_2_WARNING=1 $(UV) tool run --from 'mkdocs>=1.6,<2' --with 'mkdocs-material>=9.7,<10' mkdocs build --strict

AS_HERE := accelerate|huggingface-hub|peft|pillow|safetensors|simplejpeg|timm|tokenizers|torch|torchvision|transformers

lock: $(UV) ## Renew requirements.lock from the ranges in pyproject.toml, and requirements-eval.lock with it
	$(UV) lock --quiet
	$(UV) export --frozen --no-emit-project --no-header --quiet --output-file requirements.lock
	grep -oE '^($(AS_HERE))==[^ ;]+' requirements.lock | $(UV) pip compile --quiet --universal --python-version 3.11 \
	    --generate-hashes --no-header --no-annotate -c - requirements-eval.in -o requirements-eval.lock

wheel: install ## Build the wheel into dist/
	$(RUN) -m build --wheel --no-isolation

clean: ## Remove what make made, except outputs/
	rm -rf .venv .venv-eval .uv dist site .pytest_cache .ruff_cache

.PHONY: help install install-eval demo test test-slow torture attack load lint audit docs lock wheel clean
