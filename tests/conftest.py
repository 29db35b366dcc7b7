import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["OMP_NUM_THREADS"] = "1"  # a process per core, see pyproject.toml; for those that tests start, too

import pytest
import torch

import configs
import plotting
from scoring import rule_processes, rules

for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup or behind a shell's &; runs would ignore it, too
        signal.signal(number, action)

SCRIPTS = tuple(importlib.import_module(path.stem) for path in configs.scripts())
torch.set_num_threads(1)

FEW = tempfile.TemporaryDirectory()  # of the shipped prompts, for all of them take longer to read than to sample from
for name, rows in (("train", 256), ("test", 32)):
    lines = (configs.HERE / f"data/arithmetic/{name}.jsonl").read_text().splitlines(keepends=True)
    Path(FEW.name, f"{name}.jsonl").write_text("".join(lines[:rows]))


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
    return shrink(SCRIPTS[0], tmp_path)


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
        PROMPTS=f"{FEW.name}/train.jsonl",
        EVAL_PROMPTS=f"{FEW.name}/test.jsonl",
        OUTPUT_DIR=str(tmp_path / "outputs"),
    )
    return script


def scores_while_training(monkeypatch, score):
    """Has score(name, texts) stand for rules, but not in the checks before the first step."""
    by_rule = rules.score_by_rule

    def scored(file, name, rows, texts):
        if not texts or texts[0] in [form.format(rows[0]["answer"]) for form in rules.FORMS]:
            return by_rule(file, name, rows, texts)
        return score(name, texts)

    monkeypatch.setattr(rules, "score_by_rule", scored)
    return by_rule


def trainer_of(script):
    """A new trainer, whatever the script's name."""
    return getattr(script, f"{script.__name__.upper()}Trainer")()


class Forked(multiprocessing.get_context("fork").Process):
    """work() in a process of its own, forked from this one: what it would import first takes longer than small runs.

    To be used like a subprocess.Popen with both streams piped.
    """

    def __init__(self, work, folder):
        super().__init__()
        self.work, self.streams = work, [folder / f"{name}-{id(self)}" for name in ("out", "err")]
        self.start()

    def run(self):
        as_a_program(*(os.open(path, os.O_WRONLY | os.O_CREAT) for path in self.streams))
        self.work()

    def communicate(self, timeout=None):
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.work, timeout)
        return tuple(path.read_text() for path in self.streams)

    @property
    def returncode(self):
        return self.exitcode


def as_a_program(out, err):
    """Gives a forked process streams of its own, by their descriptors, and lets it start its own server of rules."""
    for number, descriptor in ((1, out), (2, err)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    rule_processes._server_of.cache_clear()
