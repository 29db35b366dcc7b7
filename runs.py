"""A run's folder: the script as it ran, its constants, metrics, samples, checkpoints and pictures.

outputs/gspo-20260131-101500/
    gspo.py          a copy of the script
    config.json      resolved constants, command, git commit, versions, hardware
    metrics.jsonl    one object per training step; step 0 holds the evaluation before training
    metrics.png      the 4x2 figure, redrawn while training runs
    samples.jsonl    prompts, completions, rewards, advantages, answers
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
from pathlib import Path

import torch

from configs import InputError


class Run:
    """The folder of one run; made when constructed. Raises InputError if it cannot be written."""

    def __init__(self, output_dir, script, constants):
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

    def write_json(self, name, value):
        (self.folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def log_metrics(self, metrics):
        self._append("metrics.jsonl", [metrics])

    def log_samples(self, samples):
        self._append("samples.jsonl", samples)

    def _append(self, name, rows):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def save_model(self, name, model, tokenizer):
        """Saves to folder/name in Hugging Face layout, unless it is there; returns the path.

        Written beside, then renamed, so that it is never half there.
        """
        target = self.folder / name
        beside = target.with_name(target.name + ".part")
        if not target.exists():
            beside.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            os.replace(beside, target)
        return target


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
