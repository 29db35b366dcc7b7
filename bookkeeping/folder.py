"""The folder of a run: its lock, its files, how they are written, and what is said once if the disk refuses.

outputs/gspo-20260131-101500/
    gspo.py          a copy of the script
    rewards.py       a copy of the rules
    config.json      resolved constants, fingerprints of prompts and models, command, git commit, versions, hardware
    metrics.jsonl    one object per training step; step 0 holds the evaluation before training
    metrics.png      the 4x2 figure, redrawn while training runs
    samples.jsonl    prompts, completions, rewards, advantages, answers
    samples.html     the same to look at, by sample_page.py
    checkpoints/step-N/    the whole state after step N, see checkpoints.py
    final/           the trained model, in Hugging Face layout
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

import configs
from bookkeeping.checkpoints import sync
from configs import InputError


class RunFolder:
    """The folder of a run, new or resumed, which no other process writes. Raises InputError if it cannot be written.

    path: the folder. resumed: the path of the run to go on with, or None for a new one.
    """

    def __init__(self, constants, resumed=None):
        self.is_new = resumed is None
        self.path = resumed or new_folder(constants)
        self.complaints, self.unwritten = set(), {}
        self._lock()

    def _lock(self):
        """Keeps a second process out of the folder; a crash releases it."""
        try:
            self.lock = open(self.path / "lock", "w")  # noqa: SIM115, for as long as the run
        except OSError as error:
            raise InputError(f"{self.path}: cannot write there ({error}); make it writable") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing this run; wait for it, or stop it") from None
        except OSError as error:
            nothing = f"this file system has no locks ({error}), so nothing keeps a second process from writing the run"
            self.complain("lock", f"{self.path}: {nothing}")

    def unlock(self):
        self.lock.close()

    def remove_if_new(self):
        """Leaves nothing of a run that has not begun."""
        if self.is_new:
            self.unlock()
            shutil.rmtree(self.path, ignore_errors=True)

    # -- What the run is made of

    def config(self):
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    def run_id(self):
        return self.config().get("id", self.path.name)  # older runs have no other

    def begin(self, constants, saved, fingerprints):
        """Writes the first files of a new run. saved: constants as config.json has them."""
        script = constants.path
        (self.path / script.name).write_text(constants.text, encoding="utf-8")
        shutil.copy(configs.HERE / "rewards.py", self.path)
        for name in (script.name, "rewards.py"):
            sync(self.path / name)
        run_id = f"{self.path.name}-{secrets.token_hex(4)}"  # runs of other folders may have the same name
        about = {"id": run_id, "constants": saved, "fingerprints": fingerprints}
        self.write("config.json", about | describe_machine(script.resolve().parent))
        sync(self.path)

    def cut_logs(self, history, done, in_part):
        """Has the logs hold what the run had written by the checkpoint, whatever came later or was half written.

        history: the rows of metrics.jsonl. done: the checkpoint's step. in_part: whether that step was not finished.
        """
        last = done - in_part
        self.write("metrics.jsonl", *history)
        for name in ("samples.jsonl", "reward_failures.jsonl", "skipped.jsonl"):
            if (self.path / name).is_file():
                rows = _rows(self.path / name)
                of_step = [row for row in rows if row["step"] == done > last and row.get("of") == "rollout"]
                self.write(name, *(row for row in rows if row["step"] <= last), *of_step)

    # -- How files are written

    def write(self, name, *rows):
        """Writes a file of the folder, whole or not at all: JSON lines, or one JSON document."""
        indent = None if name.endswith("l") else 2
        beside = self.path / f"{name}.part"
        beside.write_text("".join(_json(row, indent) + "\n" for row in rows), encoding="utf-8")
        sync(beside)
        os.replace(beside, self.path / name)

    def append(self, name, rows):
        """Adds JSON lines to a file of the folder; if the disk refuses, with the next ones."""
        rows = self.unwritten.pop(name, []) + rows
        path, size = self.path / name, None
        try:
            with open(path, "a", encoding="utf-8") as file:
                size = file.tell()
                file.write("".join(_json(row) + "\n" for row in rows))
            self.well_again(name)
        except OSError as error:
            self.unwritten[name] = rows
            if size is not None:
                os.truncate(path, size)  # no half line
            self.complain(name, f"{path} could not be written: {error}; training goes on, its lines follow later")

    def complain(self, topic, message):
        """Says what went wrong without ending the run; once, until it goes well again."""
        if topic not in self.complaints:
            tqdm.write(f"Warning: {message}")
            self.complaints.add(topic)

    def well_again(self, topic):
        """Has the next complaint about a topic be said again."""
        self.complaints.discard(topic)


def new_folder(constants):
    """The path of a folder that is made for a new run. Raises InputError if it cannot be."""
    parent, name = Path(constants.OUTPUT_DIR), f"{constants.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        for number in range(1, 1000):  # two runs may start in the same second
            folder = parent / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                if not parent.is_dir():
                    raise
    except OSError as error:
        raise InputError(f"OUTPUT_DIR = {str(parent)!r}: cannot write there ({error}); give another") from None


def finite(value):
    """A value as JSON can hold it: None in place of numbers that are not finite, within lists and dicts, too."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(row, indent=None):
    return json.dumps(finite(row), indent=indent, allow_nan=False)


def _rows(path):
    """The rows of a log that can be read."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows += [row] if row["step"] >= 0 else []
    return rows


def sha256_of_rewards():
    """The digest of rewards.py as it is now."""
    return hashlib.sha256((configs.HERE / "rewards.py").read_bytes()).hexdigest()


def describe_machine(repository):
    """What a reader of the run needs to repeat it."""
    commit = None
    if shutil.which("git"):
        describe = ["git", "-C", str(repository), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "numpy")
    return {
        "rewards_sha256": sha256_of_rewards(),
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
