# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint unit matrix bench-sft bench-dpo bench-generate bench-data bench-memory bench-quality clean

demo: .venv/installed
	$(BIN)/tunesmith demo --out demo

test: lint unit

# Without a cache: a file that moved changes how the imports of other files sort, which the cache does not see.
lint: .venv/installed-test
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

matrix: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/training/cells.py docs/matrix.md

bench-sft: .venv/installed-test
	$(BIN)/python benchmarks/sft.py $(BENCH)

bench-dpo: .venv/installed-test
	$(BIN)/python benchmarks/dpo.py $(BENCH)

bench-generate: .venv/installed-test
	$(BIN)/python benchmarks/generate.py $(BENCH)

bench-memory: .venv/installed-test
	$(BIN)/python benchmarks/memory.py $(BENCH)

bench-quality: .venv/installed-test
	$(BIN)/python benchmarks/quality.py $(BENCH)

bench-data: .venv/installed-test
	$(BIN)/python benchmarks/data.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv demo runs
