"""Checkpoints hold the whole state of a run between two steps. A folder that is not complete can be recognised.

checkpoints/step-20/
    config.json, model.safetensors, ...    the policy (or its adapter) and tokenizer, in Hugging Face layout
    state.pt           optimizer, KL coefficient and other state of the trainer; only tensors and plain values
    metrics.jsonl      all rows up to this step
    checkpoint.json    written last: step, and size and SHA-256 of every other file

A checkpoint is written beside its place, and then renamed. It holds no random state, because all randomness is derived
from SEED, step and row.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from bookkeeping.policy_files import load_policy
from configs import InputError
from engine.processes import rank
from engine.sharding import whole

MARKER = "checkpoint.json"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch.save and safetensors raise these on a full disk


def write_folder(target, *writers):
    """Writes a folder beside its place, and then puts it there as a whole. Returns the target.

    writers: functions that write its files; each is called with the path of the folder.
    """
    beside, old = target.with_name(target.name + ".part"), target.with_name(target.name + ".old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for write in writers:
            write(beside)
        sync(beside)
        if target.exists():
            os.replace(target, old)
        os.replace(beside, target)
        sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        put_back(old)
    return target


def put_back(old):
    """Puts back a folder that was moved aside, if nothing took its place. Otherwise removes it.

    old: the path to which the folder was moved.
    """
    if old.is_dir() and not old.with_suffix("").exists():
        os.replace(old, old.with_suffix(""))
    shutil.rmtree(old, ignore_errors=True)


def write_state(folder, step, state, metrics, best=None):
    """Writes the trainer's state, the metrics so far, and a marker with checksums of all files in the folder.

    It must be the last writer of a checkpoint. best: the held-out accuracy at this step, or None.
    """
    torch.save(state, folder / "state.pt")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8")
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            files[str(path.relative_to(folder))] = [path.stat().st_size, _sha256(path)]
    marker = folder / MARKER
    marker.write_text(json.dumps({"step": step, "best": best, "files": files}, indent=1) + "\n", encoding="utf-8")
    sync(marker)


def problem_of(path):
    """Returns what is wrong with a checkpoint's folder, in words, or None if nothing is."""
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in files.items():
            if (path / name).stat().st_size != size or _sha256(path / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    return None


def newest(folder):
    """Returns the path of a run's newest checkpoint that is whole, or None if there is none.

    It prints a line for each damaged or half-written one.
    """
    for path in folder.glob("checkpoints/step-*.old"):
        put_back(path)
    for path in folder.glob("checkpoints/step-*.part"):
        print(f"{path} is half written, and left out")
    paths = [path for path in folder.glob("checkpoints/step-*") if path.is_dir() and _step_of(path) >= 0]
    for path in sorted(paths, key=_step_of, reverse=True):
        if (problem := problem_of(path)) is None:
            return path
        print(f"{path} is damaged, {problem}, and left out")
    return None


def _step_of(path):
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def prune(folder, keep):
    """Removes all complete checkpoints on the disk except the best one and the last `keep`."""
    accuracies = {}
    for path in sorted(folder.glob("checkpoints/step-*"), key=_step_of):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # skips a marker that cannot be read
            accuracies[path] = json.loads((path / MARKER).read_text(encoding="utf-8"))["best"]
    paths = list(accuracies)
    scored = [path for path in paths if accuracies[path] is not None]
    best = max(scored, key=accuracies.get, default=None)
    for path in paths[: max(0, len(paths) - keep)]:
        if path != best:
            (path / MARKER).unlink()  # first, or half a checkpoint could look whole
            shutil.rmtree(path, ignore_errors=True)


def load(path, policy, adapter):
    """Puts a checkpoint's weights into the policy, in place, and returns (step, state, metrics). Nothing is unpickled.

    Raises InputError if a tensor is missing, unexpected or of another shape.
    """
    load_policy(path, policy, adapter)
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        step = json.loads((path / MARKER).read_text(encoding="utf-8"))["step"]
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, UnpicklingError, *WRITE_ERRORS) as error:
        raise InputError(f"{path} cannot be continued from: {error}; remove it to use the one before it") from None
    return step, state, metrics


def copy_to_cpu(value):
    """Returns a copy of a state with its tensors on the CPU, so that a thread can write it.

    Tensors that share memory still share it in the copy. If tensors are sharded, all processes call this, and only
    process 0 keeps what it returns.
    """
    seen = {}

    def copied(value):
        if isinstance(value, torch.Tensor):
            sharded = isinstance(value, DTensor)
            key = id(value) if sharded else (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() == 0 or key not in seen:
                copy = whole(value.detach())
                seen[key] = copy.to("cpu", copy=not sharded) if rank() == 0 else None
            return seen[key]
        if isinstance(value, dict):
            return {name: copied(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item) for item in value)
        return value

    return copied(value)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path):
    """Forces a file, or a folder's list of files, onto the disk before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not Path(path).is_dir():
            raise
        _warn_once(f"this file system cannot sync folders ({error.strerror}): a power failure may cost a checkpoint")
    finally:
        os.close(handle)


@functools.cache
def _warn_once(message):
    print(f"Warning: {message}")
