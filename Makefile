# make gspo   set up .venv and run the main job (or make grpo, make dapo)
# make test   set up and run all checks and tests          make check   lint and format only
# make sync   copy the shared sections out of gspo.py      make diff A=gspo B=grpo
# make clean  remove .venv

PYTHON ?= python3
BIN := .venv/bin

.PHONY: gspo grpo dapo test check sync diff clean

gspo grpo dapo: .venv/run-ready
	$(BIN)/python $@.py

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

# The sections that siblings share are written in gspo.py; `make sync` copies them into the others.
sync:
	$(PYTHON) tests/siblings.py sync

# make diff A=gspo B=grpo: what one algorithm changes of the other.
diff:
	@git diff --no-index --patience $(A).py $(B).py || true

clean:
	rm -rf .venv
