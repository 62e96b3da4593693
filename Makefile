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

.venv/installed-llm: requirements-llm.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-llm.txt
	touch $@

train: install  ## dense and STL on the digits side by side, then one table and one plot
	@mkdir -p outputs/digits
	@$(BIN)/python train.py linear=dense num_threads=1 callbacks.progress_bar=null > outputs/digits/dense.log 2>&1 & dense=$$!; \
	echo "dense trains in the background (outputs/digits/dense.log), STL here:"; \
	$(BIN)/python train.py linear=stl num_threads=1 || { kill $$dense; exit 1; }; \
	wait $$dense || { cat outputs/digits/dense.log; exit 1; }
	$(BIN)/python scripts/compare.py outputs/digits

test: install .venv/installed-llm  ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist worksteal

clean:
	rm -rf .venv outputs .pytest_cache .mypy_cache .ruff_cache
