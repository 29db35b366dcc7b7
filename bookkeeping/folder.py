"""The folder of a run: its lock, its files and how they are written, and a warning, said once, if the disk refuses.

outputs/gspo-20260131-101500/
    gspo.py          a copy of the script
    rewards.py       a copy of the rules
    config.json      resolved constants, fingerprints of prompts and models, command, git commit, versions, hardware
    metrics.jsonl    one object per training step; step 0 holds the evaluation before training
    metrics.png      the 4x2 figure, redrawn while training runs
    samples.jsonl    prompts, completions, rewards, advantages, answers
    samples.html     the samples as a page, by sample_page.py
    checkpoints/step-N/    the whole state after step N, see bookkeeping/checkpoints.py
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
    """The folder of a run, new or resumed. A lock keeps other processes from writing it.

    constants: those of the run. resumed: the path of the run to continue, or None for a new one. path: the folder.
    Raises InputError if the folder cannot be written.
    """

    def __init__(self, constants, resumed=None):
        self.is_new = resumed is None
        self.path = resumed or new_folder(constants)
        self.complaints, self.unwritten = set(), {}
        self._lock()

    def _lock(self):
        """Keeps a second process out of the folder. A crash releases the lock."""
        try:
            self.lock = open(self.path / "lock", "w")  # noqa: SIM115, because the run holds it
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
        """Removes the folder of a run that could not begin."""
        if self.is_new:
            self.unlock()
            shutil.rmtree(self.path, ignore_errors=True)

    # -- The run's description

    def config(self):
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    def run_id(self):
        return self.config().get("id", self.path.name)  # older runs have no id

    def begin(self, constants, saved, fingerprints):
        """Writes the first files of a new run. saved: the constants in the form that config.json holds."""
        script = constants.path
        (self.path / script.name).write_text(constants.text, encoding="utf-8")
        shutil.copy(configs.HERE / "rewards.py", self.path)
        for name in (script.name, "rewards.py"):
            sync(self.path / name)
        run_id = f"{self.path.name}-{secrets.token_hex(4)}"  # runs in other folders may have the same name
        about = {"id": run_id, "constants": saved, "fingerprints": fingerprints}
        self.write("config.json", about | describe_machine(script.resolve().parent))
        sync(self.path)

    def cut_logs(self, history, done, in_part):
        """Cuts the logs back to what the run had written by the checkpoint. Later and half-written rows go.

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
        """Writes a file of the folder, whole or not at all.

        The file is JSON lines if its name ends in l, and one JSON document otherwise.
        """
        indent = None if name.endswith("l") else 2
        beside = self.path / f"{name}.part"
        beside.write_text("".join(_json(row, indent) + "\n" for row in rows), encoding="utf-8")
        sync(beside)
        os.replace(beside, self.path / name)

    def append(self, name, rows):
        """Adds JSON lines to a file of the folder. If the disk refuses, they are added with the next ones."""
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
        """Prints a warning without ending the run. A topic is warned about once, until well_again(topic)."""
        if topic not in self.complaints:
            tqdm.write(f"Warning: {message}")
            self.complaints.add(topic)

    def well_again(self, topic):
        """Lets the next complaint about a topic be printed again."""
        self.complaints.discard(topic)


def new_folder(constants):
    """Makes the folder of a new run, and returns its path. Raises InputError if it cannot."""
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
    """Returns a value with None for each number that is not finite, also in lists and dicts, as JSON needs it."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(row, indent=None):
    return json.dumps(finite(row), indent=indent, allow_nan=False)


def _rows(path):
    """Returns the rows of a log that can be read."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows += [row] if row["step"] >= 0 else []
    return rows


def sha256_of_rewards():
    """Returns the digest of rewards.py as it is now."""
    return hashlib.sha256((configs.HERE / "rewards.py").read_bytes()).hexdigest()


def describe_machine(repository):
    """Returns what a reader needs to repeat the run: command, commit, versions and hardware."""
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
