import faulthandler
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests are of bits on a CPU; make test-gpu shows test_gpu.py one
os.environ["OMP_NUM_THREADS"] = "1"  # pyproject.toml runs a process per core; also holds for those that tests start

import pytest
import torch
import transformers

import configs
import plotting
from scoring import rule_processes, rules

for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, or behind a shell's &; a run would ignore it, too
        signal.signal(number, action)

SCRIPTS = tuple(importlib.import_module(path.stem) for path in configs.scripts())
torch.set_num_threads(1)
transformers.logging.disable_progress_bar()  # of models that tests save; its thread would hang a process forked later

FEW = tempfile.TemporaryDirectory()  # holds some of the shipped prompts, because reading all of them takes long
for name, rows in (("train", 256), ("test", 32)):
    lines = (configs.HERE / f"data/arithmetic/{name}.jsonl").read_text().splitlines(keepends=True)
    Path(FEW.name, f"{name}.jsonl").write_text("".join(lines[:rows]))


@pytest.fixture(autouse=True)
def constants_restored():
    """Restores the scripts' constants after each test."""
    before = [(script, configs.constant_values(vars(script))) for script in SCRIPTS]
    yield
    for script, values in before:
        vars(script).update(values)


@pytest.fixture(autouse=True)
def drawn_only_where_marked(request, monkeypatch):
    """Turns pictures off in tests without @pytest.mark.drawn.

    They take longer than the small runs that they show.
    """
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr(plotting, "draw_run", lambda folder: None)


@pytest.fixture
def small(tmp_path):
    """Returns gspo, with sizes for a run of a few seconds. Runs go to tmp_path/outputs."""
    return shrink(SCRIPTS[0], tmp_path)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def small_script(request, tmp_path):
    """Returns each script in turn, with sizes for a run of a few seconds."""
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
        SAMPLE_GROUPS=2,
        PROMPTS=f"{FEW.name}/train.jsonl",
        EVAL_PROMPTS=f"{FEW.name}/test.jsonl",
        OUTPUT_DIR=str(tmp_path / "outputs"),
    )
    let_the_policy_train(script)
    return script


def let_the_policy_train(script):
    """Sets the number of steps in which the policy rests to 0, because a script's default may be more than a test's."""
    if hasattr(script, "policy_rests"):
        vars(script)[script.policy_rests] = 0


def scores_while_training(monkeypatch, score):
    """Lets score(name, texts) replace the rules, but not in the checks before the first step."""
    by_rule = rules.score_by_rule

    def scored(file, name, rows, texts):
        if not texts or texts[0] in [form.format(rows[0]["answer"]) for form in rules.FORMS]:
            return by_rule(file, name, rows, texts)
        return score(name, texts)

    monkeypatch.setattr(rules, "score_by_rule", scored)
    return by_rule


def trainer_of(script):
    """Returns a new trainer of a script, whatever its class is called."""
    return getattr(script, f"{script.__name__.upper()}Trainer")()


def keep_weights(trainer):
    """Lets optimizer steps keep the weights, and put the gradients, by name, into trainer.gradients."""

    def step():
        named = trainer.policy.named_parameters()
        trainer.gradients = {name: weight.grad.clone() for name, weight in named if weight.requires_grad}

    trainer.optimizer.step = step


class Forked(multiprocessing.get_context("fork").Process):
    """Runs work() in a process that is forked from this one.

    The fork has all imports, which would take longer than a small run. It is used like a subprocess.Popen with both
    streams piped.
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
            self.kill()
            raise subprocess.TimeoutExpired(self.work, timeout)
        return tuple(path.read_text() for path in self.streams)

    @property
    def returncode(self):
        return self.exitcode


def as_a_program(out, err):
    """Gives a forked process its own stdout and stderr, by their descriptors, and its own server of rules."""
    for number, descriptor in ((1, out), (2, err)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    faulthandler.enable(sys.stderr)  # if a library crashes, its place is in what this process printed
    rule_processes._server_of.cache_clear()
