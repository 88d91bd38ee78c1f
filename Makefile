# Two commands on a fresh machine: `make demo` (the main job, end to end) and `make test`.
# Every target uses .venv in this folder; it is made on first use and again when the pins change.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Tests that start and kill processes by the clock: nothing runs beside them.
ALONE  := tests/workers tests/launch tests/e2e tests/chaos

.PHONY: demo test test-long serve lint types imports check format clean

$(READY): constraints.txt pyproject.toml client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable './client[torch]' --editable '.[api,worker,dev]'
	touch $(READY)

demo: $(READY)          ## train, upload, search, download, check: the whole main job
	$(BIN)/python -m examples.demo

test: $(READY)          ## the default suite
	$(BIN)/python -m pytest -m 'not long' -n 2 --dist loadfile $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -m 'not long' $(ALONE)

test-long: $(READY)     ## kills, Hugging Face lifts, PostgreSQL end to end
	$(BIN)/python -m pytest -m long

serve: $(READY)         ## everything on this machine, in ./data
	$(BIN)/tenfold-server up --data data

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

check: lint types imports test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
