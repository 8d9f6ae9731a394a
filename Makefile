# `make quickstart` and `make test` each set up everything that they need and run. PYTHON: 3.11 or 3.12.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-long bench-gpu check venv clean

quickstart: .venv/.quickstart
	$(BIN)/rayembed run configs/quickstart.yaml

test: export OMP_NUM_THREADS = 1
test: export RAY_AUTH_MODE = disabled
test: export RAY_USAGE_STATS_ENABLED = 0
test: export HF_HUB_OFFLINE = 1
test: venv
	$(BIN)/python -m pytest -q --durations=10 -m "not ray and not long" -n 2 --dist worksteal
	$(BIN)/python -m pytest -q --durations=10 -m "ray and not long"

# What does not fit into the time of `make test`; it exports the same.
test-long: export OMP_NUM_THREADS = 1
test-long: export RAY_AUTH_MODE = disabled
test-long: export RAY_USAGE_STATS_ENABLED = 0
test-long: export HF_HUB_OFFLINE = 1
test-long: venv
	$(BIN)/python -m pytest -q --durations=10 -m long

# Everything that is measured on a CUDA GPU; tests/benchmarks/gpu.py says how to run it where Ray is not.
bench-gpu: export HF_HUB_OFFLINE = 1
bench-gpu: venv
	$(BIN)/python -m tests.benchmarks.gpu

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/.development

# A stamp file says for which pyproject.toml the environment was installed.
.venv/.development: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[quickstart,parity,qlora,dev]'
	touch .venv/.development .venv/.quickstart

.venv/.quickstart: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[quickstart]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else f"Python 3.11 or 3.12 is needed, found {sys.version.split()[0]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find rayembed tests -name __pycache__ -type d -prune -exec rm -rf {} +
