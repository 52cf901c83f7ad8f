# Every target sets up by itself: pip into .venv, with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
THREADS ?= 2
BENCH ?=
QUICK ?=

.PHONY: help setup test test-long check format demo figures bench study study-wrappers clean

help:
	@echo "make demo       a small real ablation: 17 cells on scikit-learn's digits, about 3 minutes"
	@echo "make test       the tests ($(WORKERS) processes; WORKERS=n for more)"
	@echo "make test-long  the property tests and the checks of pieces with ten times the draws"
	@echo "make check      format, lint, types, doctests"
	@echo "make figures    the pictures of docs/, what quantised kernels round, and what each piece can do"
	@echo "make bench      speed and memory against PEFT, about 25 minutes; QUICK=1: 3; BENCH=linear_step: one claim"
	@echo "make study      AdaLoRA's ranks on MiniLM, about an hour; goes on where it was stopped"
	@echo "make study-wrappers  wrappers x generators on MiniLM, about an hour; goes on where it was stopped"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-long: $(VENV)/.ready
	HYPOTHESIS_PROFILE=long ADAPTERZOO_DRAWS=10 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -p no:cacheprovider --doctest-modules adapterzoo

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(VENV)/.ready
	$(BIN)/python -m adapterzoo ablate recipe:demo --workers 2
	$(BIN)/python -m adapterzoo report runs/demo

figures: $(VENV)/.ready
	$(BIN)/python docs/figures/map_start.py
	$(BIN)/python docs/figures/quantised_norms.py
	$(BIN)/python docs/figures/capabilities.py

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(BENCH) --threads $(THREADS) $(if $(QUICK),--quick)

study: $(VENV)/.ready
	$(BIN)/python -m studies ranks

study-wrappers: $(VENV)/.ready
	$(BIN)/python -m adapterzoo ablate studies/wrappers.yaml --workers 2
	$(BIN)/python -m adapterzoo report runs/wrappers --out docs/studies/wrappers
	$(BIN)/python -m studies.wrappers

# The peers, PEFT and Transformers, beside what the tests need.
$(VENV)/.bench: $(VENV)/.ready
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
