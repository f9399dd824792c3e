# `make validate` runs the whole pipeline, `make test` all checks, `make test-hf` those for Hugging Face, `make test-page` those of the
# report in a browser, `make coverage` says what the tests run; each sets up .venv.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: validate test test-hf test-page coverage torture documents clean

# Passive waiting: on a busy machine, spinning threads take the cores from the ones that work.
validate: .venv/installed
	OMP_WAIT_POLICY=passive $(BIN)/phase1 pipeline --preset smoke --dataset-name builtin --out-dir results/validate \
	|| { [ $$? -eq 3 ] && echo 'Some checks are undecided on this machine: see INCONCLUSIVE above for what would decide them.'; }

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile

# Which lines the tests run of what decides: statistics, verdicts, records, tables. A fifth slower than without.
coverage: .venv/installed-test
	$(BIN)/pytest -q -n 2 --dist loadfile --cov --cov-report=term

# Exported models in transformers, PEFT and lm-eval, which `make test` does without.
test-hf: .venv/installed-test-hf
	$(BIN)/pytest -q tests/hf

# The report as readers see it, on a phone and a screen, light, dark and printed.
test-page: .venv/installed-test-page
	$(BIN)/pytest -q tests/page/test_browser.py

# Results that survive: 1,000 SIGKILLs at random moments, where `make test` does 60; kernels compiled for more cards.
torture: .venv/installed-test
	PHASE1_TORTURE=1000 $(BIN)/pytest -q tests/test_killed.py tests/ops/test_compile_ahead.py

# What documents show of records, flags and fields; tests compare.
documents: .venv/installed
	$(BIN)/phase1 tables --results-page
	$(BIN)/python docs/reference.py
	$(BIN)/python -m phase1.records.json_schema

.venv/installed: pyproject.toml constraints.txt
	@echo 'Installing PyTorch and the rest into .venv: some gigabytes, a few minutes.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

.venv/installed-test-hf: .venv/installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test-hf]'
	touch $@

# A Chromium that is there, or Playwright's, or (for root, where only Debian's packages are in reach) Debian's.
.venv/installed-test-page: .venv/installed-test
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test-page]'
	which chromium-headless-shell || which chromium || which google-chrome || $(BIN)/playwright install --only-shell chromium \
	|| { apt-get update -q && apt-get install -yq --no-install-recommends chromium-headless-shell; }
	touch $@

clean:
	rm -rf .venv results/validate
