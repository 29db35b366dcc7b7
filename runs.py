"""A run's folder: the script as it ran, its constants, metrics, samples, checkpoints and pictures.

outputs/gspo-20260131-101500/
    gspo.py          a copy of the script
    config.json      resolved constants, command, git commit, versions, hardware
    metrics.jsonl    one object per training step; step 0 holds the evaluation before training
    metrics.png      the 4x2 figure, redrawn while training runs
    samples.jsonl    prompts, completions, rewards, advantages, answers
    samples.html     the same to look at, by page.py
    checkpoints/step-N/, final/    Hugging Face layout
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from math import comb, sqrt
from pathlib import Path

import torch

from configs import InputError


class Run:
    """The folder of one run; made when constructed. Raises InputError if it cannot be written.

    Metrics also go to TensorBoard, where constants["TENSORBOARD"] is set and the package is there, and to Weights &
    Biases, where constants["WANDB_PROJECT"] names a project.
    """

    def __init__(self, output_dir, script, constants):
        self.writer = self.wandb = None
        if constants["WANDB_PROJECT"]:
            self.wandb = _wandb()
        self.algorithm = Path(script).stem
        name = f"{self.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            for number in range(1, 1000):  # two runs may start in the same second
                self.folder = Path(output_dir) / (name if number == 1 else f"{name}-{number}")
                try:
                    self.folder.mkdir(parents=True)
                    break
                except FileExistsError:
                    continue
            shutil.copy(script, self.folder)
        except OSError as error:
            raise InputError(f"OUTPUT_DIR = {str(output_dir)!r}: cannot write there ({error}); give another") from None
        self.write_json("config.json", {"constants": constants, **describe_machine(Path(script).parent)})
        if constants["TENSORBOARD"] and find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder)
        if self.wandb:
            self.wandb.init(
                project=constants["WANDB_PROJECT"], name=self.folder.name, dir=self.folder, config=constants
            )

    def write_json(self, name, value):
        (self.folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def log_metrics(self, metrics):
        """Adds a step's metrics to metrics.jsonl, and to the other places that were asked for."""
        self._append("metrics.jsonl", [metrics])
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, metrics["step"])
            self.writer.flush()
        if self.wandb:
            self.wandb.log(numbers, step=metrics["step"])

    def log_samples(self, samples):
        self._append("samples.jsonl", samples)

    def _append(self, name, rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self, name, *writers):
        """Saves to folder/name, unless it is there; returns the path. writers: each writes into the folder it is given.

        Written beside, then renamed, so that it is never half there.
        """
        target = self.folder / name
        beside = target.with_name(target.name + ".part")
        if not target.exists():
            beside.mkdir(parents=True, exist_ok=True)
            for write in writers:
                write(beside)
            os.replace(beside, target)
        return target

    def print_summary(self, before, after, rows, texts_before, texts_after):
        """Held-out accuracy and the first completions before and after training, and where to find what was made."""
        for name, how in (("eval_accuracy", "sampled"), ("eval_accuracy_greedy", "greedy")):
            print(f"Held-out accuracy, {how}: {before[name]:.3f} before, {after[name]:.3f} after")
        for row, old, new in list(zip(rows, texts_before, texts_after, strict=True))[:3]:
            print(f"  {row['prompt']!r} (answer {row['answer']})\n    before {old!r}\n    after  {new!r}")
        print(f"Model:   {self.folder / 'final'}")
        print(f"Picture: {self.folder / 'metrics.png'}")
        print(f"Samples: {self.folder / 'samples.html'}")


def _wandb():
    try:
        import wandb
    except ImportError:
        raise InputError(
            'WANDB_PROJECT is set, but wandb is not installed; pip install wandb, or set it to ""'
        ) from None
    return wandb


def samples_of(step, tokenizer, rollouts, rewards, advantages, old_logps, new_logps):
    """What a reader wants to see of the first completions of a step, as many as new_logps has rows; a dict each.

    logp_change: of each token, by how much the step's updates have moved its log-prob, nats.
    """
    rewards, advantages, changes = (
        rewards.tolist(),
        advantages.tolist(),
        (new_logps - old_logps[: len(new_logps)]).tolist(),
    )
    ids = [
        sequence[start : start + length].tolist()
        for sequence, start, length in zip(
            rollouts.input_ids, rollouts.prompt_lengths, rollouts.completion_lengths, strict=True
        )
    ]
    return [
        {
            "step": step,
            "prompt": rollouts.prompts[i]["prompt"],
            "completion": rollouts.texts[i],
            "reward": rewards[i],
            "advantage": advantages[i],
            "answer": rollouts.prompts[i]["answer"],
            "tokens": int(rollouts.completion_lengths[i]),
            "truncated": bool(rollouts.truncated[i]),
            "token_texts": [tokenizer.decode([token]) for token in ids[i]],
            "logp_change": [round(change, 4) for change in changes[i][: len(ids[i])]],
        }
        for i in range(len(new_logps))
    ]


def accuracy_metrics(right, samples, k):
    """Held-out accuracy from 0 and 1 per completion, `samples` for each prompt, contiguous: what eval_* metrics hold.

    eval_accuracy: pass@1, the mean. eval_pass_at_k: the chance that one of k samples is right, by the unbiased
    estimator 1 − C(n−c, k) / C(n, k) with c right of n (Chen et al. 2021, arXiv 2107.03374, eq. 1). Both with Wilson's
    95 % interval for as many trials as there are prompts, on the safe side where a prompt has several samples.
    """
    prompts = [right[i : i + samples] for i in range(0, len(right), samples)]
    k = min(k, samples)
    missed = [comb(samples - sum(value > 0 for value in one), k) / comb(samples, k) for one in prompts]
    metrics = {}
    for name, mean in (
        ("eval_accuracy", sum(right) / len(right)),
        ("eval_pass_at_k", 1 - sum(missed) / len(missed)),
    ):
        low, high = wilson_interval(mean, len(prompts))
        metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return metrics


def wilson_interval(share, trials, z=1.96):
    """Wilson's score interval of a share: two numbers in [0, 1]."""
    centre = share + z * z / (2 * trials)
    width = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)


def speed_metrics(times, tokens, device):
    """Seconds of a step's four phases from the five times around them, tokens per second, and memory on the device."""
    names = ("seconds_rollout", "seconds_reward", "seconds_logps", "seconds_update")
    seconds = {name: times[i + 1] - times[i] for i, name in enumerate(names)}
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return seconds | {"tokens_per_second": tokens / (times[-1] - times[0]), "peak_memory_gb": memory}


def describe_machine(repository):
    """What a reader of the run needs to repeat it."""
    commit = None
    if shutil.which("git"):
        describe = ["git", "-C", str(repository), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "numpy")
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {
            "cpus": os.cpu_count(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
