# Two commands do everything on a fresh machine with Python 3.11 and git: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# The release that was tested; for another build of it set e.g. TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
DEVICE ?= cpu
WORKDIR ?= demo_output
BIN = $(VENV)/bin
# one test process per core already: more threads would only get in each other's way
test check: export OMP_NUM_THREADS ?= 1

.PHONY: demo test check format clean

demo: $(VENV)/.installed
	$(BIN)/python -m hf_moe demo --workdir $(WORKDIR) --device $(DEVICE)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and alone, so that nothing else chooses a build of it
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(WORKDIR) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
