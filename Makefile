PYTHON ?= python

.PHONY: check lint types fast test long wheel-test break

check: lint types fast  ## what every commit must pass; the pre-commit hooks call these same targets

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

fast:
	$(PYTHON) -m pytest -q -m "not slow and not long and not gpu"

test:
	$(PYTHON) -m pytest

long:  ## before a release: the tests that `pytest` alone leaves out
	$(PYTHON) -m pytest -m long

wheel-test:  ## builds sdist and wheel, installs the wheel in a fresh venv and tests it from another directory
	set -eu; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PYTHON) -m venv "$$work/venv"; pip="$$work/venv/bin/python -m pip install -q -c $(CURDIR)/constraints.txt"; \
	$$pip build; "$$work/venv/bin/python" -m build --outdir "$$work/dist" .; \
	$$pip "$$(ls "$$work"/dist/*.whl)[test]"; \
	mkdir "$$work/elsewhere"; cp -r tests examples docs README.md pyproject.toml "$$work/elsewhere"; \
	cd "$$work/elsewhere"; "$$work/venv/bin/python" -m pytest tests; \
	"$$work/venv/bin/python" -m pytest --pyargs tokenmdp

break:  ## kills, damaged files, full disks, power cuts, random calls: half an hour, not part of the checks; docs/reliability.md
	$(PYTHON) benchmarks/reliability.py
