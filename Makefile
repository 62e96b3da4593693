# Two commands do everything: `make train` and `make test`. Both install into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test clean

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

train: install  ## dense and STL on the digits, then one table and one plot
	$(BIN)/python train.py --multirun linear=dense,stl
	$(BIN)/python scripts/compare.py outputs/digits

test: install  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

clean:
	rm -rf .venv outputs .pytest_cache .mypy_cache .ruff_cache
