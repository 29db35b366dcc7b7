import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network

import pytest
import torch

import configs
import grpo
import gspo

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def constants_restored():
    """A test may set a script's constants; the next one finds them as shipped."""
    before = [(script, configs.constant_values(vars(script))) for script in (gspo, grpo)]
    yield
    for script, values in before:
        vars(script).update(values)


@pytest.fixture
def small(tmp_path):
    """Sizes for a run of a few seconds; returns the module. Runs go to tmp_path/outputs."""
    vars(gspo).update(
        MAX_STEPS=2,
        BATCH_SIZE=4,
        GROUP_SIZE=4,
        MINI_BATCHES=2,
        EVAL_SIZE=6,
        EVAL_SAMPLES=2,
        WARMUP_STEPS=0,
        MAX_COMPLETION_TOKENS=40,
        OUTPUT_DIR=str(tmp_path / "outputs"),
    )
    return gspo
