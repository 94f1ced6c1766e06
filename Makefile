# `make demo` and `make test` each do everything from a machine with python3, make and git.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Tests start hundreds of processes, each of which would compile the project anew.
unexport PYTHONDONTWRITEBYTECODE
ALONE := not slow and not gpu and not integration and not chaos
UNIT := $(ALONE) and not heavy
# One process more than there are cores: now and then a test waits.
PROCESSES := $(shell expr $$(nproc 2>/dev/null || echo 4) + 1)

.PHONY: install demo test test-changed test-unit coverage check docs figures format infra lock release clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv and install the project with what its tests need

# pip, not uv: with pip an already configured CPU build of torch is taken.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[local,dev,docs]'
	touch $@

demo: $(STAMP) ## Train, evaluate and register a digits model on the local stack
	$(BIN)/ddpm flow +experiment=digits --out demo-samples

# Integration and chaos tests wait for services, and for what was killed, as much as they compute: three streams on two
# cores, each with a stack of its own. What takes longest comes first, by tests/times.json (`python -m tests.times`).
test: $(STAMP) ## All tests but those that take minutes each
	rm -rf build/times
	$(BIN)/pytest -n $(PROCESSES) -m '$(ALONE)' --junitxml build/times/unit.xml
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --timeout 600 --junitxml build/times/services.xml \
		-m '(integration or chaos) and not slow and not gpu' $$(grep -rlE 'mark\.(integration|chaos)' tests --include='test_*.py')

test-unit: $(STAMP) ## Unit tests only: no Ray, no network, nothing that computes for long
	$(BIN)/pytest -n $(PROCESSES) -m '$(UNIT)'

test-changed: $(STAMP) ## Unit tests of what differs from the last commit (REF=main: from another one)
	tests="$$($(BIN)/python -m tests.changed $(REF))"; test -z "$$tests" || $(BIN)/pytest -n $(PROCESSES) -m '$(UNIT)' $$tests

check: $(STAMP) ## Lint, format, types, import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

coverage: $(STAMP) ## Show which lines of the mathematics no unit test runs
	$(BIN)/pytest -n $(PROCESSES) -m '$(ALONE)' --cov=ddpm --cov-report=term:skip-covered

docs: $(STAMP) ## Make the web site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

figures: $(STAMP) ## Write the measured figures of docs/ from benchmarks/results
	$(BIN)/python -m benchmarks.pages

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

infra: $(STAMP) ## Write the cluster files that are rendered, infra/kuberay and infra/aws
	$(BIN)/python -m pipelines.launch.committed infra

lock: $(STAMP) ## Write the exact packages, with hashes, that images are built from
	$(BIN)/pip install --quiet uv
	$(BIN)/python infra/docker/lock.py

# Its tools have an environment of their own: what cyclonedx-bom brings takes every import of Ray a second and a half.
release: ## Build sdist and wheel, try the wheel in an environment of its own, list what it brings (SBOM)
	rm -rf dist build/release build/release-tools build/sbom.cdx.json
	$(PYTHON) -m venv build/release-tools
	build/release-tools/bin/pip install --quiet 'build>=1.2' 'cyclonedx-bom>=6' 'twine>=6'
	build/release-tools/bin/python -m build --outdir dist
	build/release-tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/pip install --quiet dist/*.whl
	cd build/release && bin/ddpm --version && bin/ddpm config +experiment=cifar10 > /dev/null
	build/release-tools/bin/cyclonedx-py environment build/release --output-reproducible --output-file build/sbom.cdx.json

clean: ## Remove .venv and build products; .ddpm (data of the local stack) stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
