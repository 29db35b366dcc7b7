# make gspo   set up .venv and run the main job        make test    set up and run all checks and tests
# make check  lint and format only                     make clean   remove .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: gspo test check clean

gspo: .venv/run-ready
	$(BIN)/python gspo.py

test: check
	$(BIN)/python -m pytest

check: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamps are newer than the requirements once these are installed, so that nothing is installed twice.
.venv/run-ready: requirements.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test-ready: requirements-dev.txt .venv/run-ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
