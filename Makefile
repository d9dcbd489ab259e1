# Each target sets up .venv by itself; PYTHON chooses the interpreter that makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format bench clean

.venv/.ready: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt --editable '.[test]'
	$(BIN)/python -m compileall -q elastic_launch  # it saves 50 ms a start where PYTHONDONTWRITEBYTECODE is set
	touch $@

demo: .venv/.ready
	$(BIN)/elastic-run --standalone --nproc-per-node 2 --max-restarts 1 examples/digits_ddp.py --epochs 10 --kill-rank 1 --kill-epoch 5

test: .venv/.ready
	$(BIN)/pytest

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest --quiet tests/decisions/test_layers.py

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.ready
	for script in benchmarks/launch.py benchmarks/idle.py benchmarks/restart.py benchmarks/recovery.py benchmarks/rendezvous.py benchmarks/logs.py benchmarks/warm.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
