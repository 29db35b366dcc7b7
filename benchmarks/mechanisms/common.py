"""What the scripts of benchmarks/mechanisms share: arguments, the scripts' functions, and how a picture looks."""

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import psutil
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import cispo  # noqa: E402, F401
import dapo  # noqa: E402, F401
import grpo  # noqa: E402, F401
import gspo  # noqa: E402
import ppo  # noqa: E402, F401
import vapo  # noqa: E402, F401
from bookkeeping.metrics import Clock  # noqa: E402


def parse(docstring, **defaults):
    """Returns a script's arguments: those of the defaults, {name: value}, and the folder of its picture."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "mechanisms")
    return parser.parse_args()


def trainer_of(script, **constants):
    """Returns a trainer of a script with these constants, without a word of its loading."""
    vars(script).update(constants)
    with contextlib.redirect_stdout(io.StringIO()):
        return next(cls for name, cls in vars(script).items() if name.endswith("Trainer"))()


def scored_rollouts(trainer, step):
    """Returns the rollouts of a step with all that its update needs."""
    rollouts = trainer.generate_responses_with_group_sampling(step)
    trainer.add_scores(rollouts, step, Clock(trainer.policy_device))
    rollouts.advantages = trainer.compute_advantages(rollouts)
    return rollouts


def after_updates(seed, prompts, steps=1):
    """Returns a step's rollouts of gspo.py, and log π of them after the step's updates, (B, T).

    There are `steps` steps before it. The learning rate is the shipped one from the first step on.
    """
    settings = {"SEED": seed, "BATCH_SIZE": prompts, "REWARDS": "exact_match", "KL_COEF": 0.0, "WARMUP_STEPS": 0}
    trainer = trainer_of(gspo, **settings, LR_SCHEDULE="constant")
    for step in range(1, steps + 1):
        rollouts = scored_rollouts(trainer, step)
        trainer.update_policy(rollouts, step)
    with torch.no_grad():
        return rollouts, trainer.compute_log_probs(trainer.policy, rollouts)


def spread(values, digits=3):
    """Returns mean ± standard deviation as text, or the value if there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def processor():
    """Returns the processor's name, as Linux has it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unknown one")
    return "an unknown one"


def figure_of(panels):
    """Returns a figure with a row of panels, and the panels."""
    figure = Figure(figsize=(6 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_seeds(axis, values, label):
    """Draws the mean over the seeds and their range against the step. values: (seeds, steps)."""
    (line,) = axis.plot(values.nanmean(0), label=label)
    steps, low, high = range(values.shape[1]), values.amin(0), values.amax(0)
    axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)


def save(figure, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=80)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    seconds, cores = time.time() - psutil.Process().create_time(), torch.get_num_threads()
    print(f"\n{folder / name}.png, {seconds:.0f} s on {cores} cores of {processor()}, at commit {commit.strip()}")
