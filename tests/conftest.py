import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["OMP_NUM_THREADS"] = "1"  # a process per core, see pyproject.toml; for those that tests start, too

import pytest
import torch

import configs
import dapo
import grpo
import gspo
import plotting

SCRIPTS = (gspo, grpo, dapo)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def constants_restored():
    """A test may set a script's constants; the next one finds them as shipped."""
    before = [(script, configs.constant_values(vars(script))) for script in SCRIPTS]
    yield
    for script, values in before:
        vars(script).update(values)


@pytest.fixture(autouse=True)
def drawn_only_where_marked(request, monkeypatch):
    """Pictures take longer than the small runs they show: runs of tests without @pytest.mark.drawn draw none."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(plotting, "draw_run", lambda folder: None)


@pytest.fixture
def small(tmp_path):
    """gspo with the sizes of a run of a few seconds. Runs go to tmp_path/outputs."""
    return shrink(gspo, tmp_path)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def small_script(request, tmp_path):
    """Each script in turn, with the sizes of a run of a few seconds."""
    return shrink(request.param, tmp_path)


def shrink(script, tmp_path):
    vars(script).update(
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
    return script


def trainer_of(script):
    """A new trainer, whatever the script's name."""
    return getattr(script, f"{script.__name__.upper()}Trainer")()
