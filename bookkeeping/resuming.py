"""Resumes a run: finds its folder and checkpoint, sets its constants, and checks its prompts and models."""

import contextlib
import hashlib
import json
from pathlib import Path

import torch

from bookkeeping import checkpoints
from bookkeeping.folder import sha256_of_rewards
from configs import KINDS, InputError, as_saved, constants_in, expand_home
from engine.processes import from_first
from engine.sharding import whole
from engine.steps import learning_rate_at

# Constants that may change when a run is resumed: how long, how often, where, and how much at once. A script names more
# in its `may_change`.
MAY_CHANGE = (
    *("MAX_STEPS", "EVAL_EVERY", "SAVE_EVERY", "KEEP_CHECKPOINTS", "SAMPLE_GROUPS", "TENSORBOARD", "WANDB_PROJECT"),
    *("OUTPUT_DIR", "RESUME", "MICRO_BATCH_TOKENS", "SAMPLED_AT_ONCE", "SAMPLER_MEMORY", "LOGITS_AT_ONCE"),
    *("GRADIENT_CHECKPOINTING", "MERGE_LORA", "PROFILE", "PANELS", "SHARD"),
)
# These may change, too, if the run has fingerprints of their content. So the files may move, but not change.
MADE_FROM = ("PROMPTS", "EVAL_PROMPTS", "POLICY_MODEL", "REWARD_MODEL", "CRITIC_MODEL")


# -- The constants of the run


def constants_of_run(script, constants, given, may_change):
    """Returns the constants of the run to continue, {name: value}. Raises InputError if others are asked for.

    A constant is asked for by a flag, or by an edit of the file since the run began. script: the path of the script.
    constants: {name: value} as the file has them now. given: those that flags set. may_change: names of the script's
    own constants that may differ from the run's.
    """
    folder = _run_folder(*(given.get(name, constants[name]) for name in ("RESUME", "OUTPUT_DIR")), script)
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        saved = {**run["constants"]}
        before = (folder / script.name).read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: {_no_run(folder, script, error)}") from None
    text = script.read_text(encoding="utf-8")
    sources, sources_before = ({name: one.source for name, one in constants_in(t).items()} for t in (text, before))
    as_here = {  # edited, or of a type that config.json cannot give back
        name: value
        for name, value in constants.items()
        if sources[name] != sources_before.get(name) or type(value) not in KINDS
    }
    asked = {**as_here, **given}
    _refuse_others(folder, run, asked, may_change)
    changed = [script.name] if _without_constants(text) != _without_constants(before) else []
    if run.get("rewards_sha256", sha256_of_rewards()) != sha256_of_rewards():
        changed.append("rewards.py")
    if changed:
        verb = "have" if changed[1:] else "has"
        print(f"Warning: {' and '.join(changed)} {verb} changed since the run began; {folder} keeps what it began with")
    here = as_saved(constants)
    kept = {
        name for name, value in saved.items() if name in here and not name.endswith("_DEVICE") and here[name] != value
    }
    return constants | {name: saved[name] for name in kept} | asked | {"RESUME": str(folder)}


def run_to_resume(constants):
    """Returns the folder of the run that RESUME names.

    Raises InputError if the constants differ from the run's, as they can if they were set from Python.
    """
    folder = _run_folder(constants.RESUME, constants.OUTPUT_DIR, constants.path)
    try:
        run = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _refuse_others(folder, run, constants.values(), constants.may_change)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume {folder}: {_no_run(folder, constants.path, error)}") from None
    return folder


def _refuse_others(folder, run, asked, may_change):
    """Raises InputError if a constant is asked for that differs from the run's and may not change."""
    saved, may_change = run["constants"], {*MAY_CHANGE, *may_change, *(MADE_FROM if "fingerprints" in run else ())}
    asked = as_saved(asked)
    fixed = {name for name in saved if name not in may_change and not name.endswith("_DEVICE")}
    changed = [name for name in asked if name in fixed and asked[name] != saved[name]]
    if changed:
        raise InputError(
            f"--resume {folder}: the run was made with "
            + ", ".join(f"{name} = {saved[name]!r}, not {asked[name]!r}" for name in changed)
            + "; leave that as it was, or start a new run"
        )


def _run_folder(name, output_dir, script):
    """Returns the folder of the run that --resume names.

    "latest" is the run of this script that logged last. Of several processes, process 0 finds it, because a shared disk
    may show each machine other times. Raises InputError if there is no such folder.
    """
    for constant, value in (("RESUME", name), ("OUTPUT_DIR", output_dir)):  # not validated yet
        if not isinstance(value, str):
            flag = "--" + constant.lower().replace("_", "-")
            raise InputError(f"{constant} = {value!r} must be {KINDS[str]}; edit it or give {flag}")
    if name != "latest":
        why = ""
        try:
            folder = Path(name).expanduser()
            if folder.is_dir():
                return folder
        except (OSError, RuntimeError, ValueError) as error:  # as in find_path; ValueError: the name holds NUL
            why = f" ({getattr(error, 'strerror', None) or error})"
        raise InputError(f'--resume {name:.200}: no such folder{why}; give that of a run, or "latest"')
    return Path(from_first("the latest run", lambda: str(_latest(expand_home("OUTPUT_DIR", output_dir), script))))


def _latest(parent, script):
    """Returns the folder of the run of a script in parent that logged last. Raises InputError if there is none."""
    runs = [path for path in Path(parent).glob(f"{script.stem}-*") if (path / "config.json").is_file()]
    if not runs:
        raise InputError(f"--resume latest: {parent} holds no run of {script.name}; give the run's folder")
    logs = ("config.json", "metrics.jsonl")  # not pictures, which may be drawn again
    return max(runs, key=lambda run: max((run / log).stat().st_mtime for log in logs if (run / log).is_file()))


def _no_run(folder, script, error):
    """Returns why a folder cannot be resumed, and what to give instead."""

    def script_of(place):
        """Returns the script whose run is in a folder, or "". A run has a copy of its script."""
        copies = [path.name for path in place.glob("*.py") if path.name != "rewards.py"]
        copies = [name for name in copies if (script.parent / name).is_file()]
        return copies[0] if copies and (place / "config.json").is_file() else ""

    with contextlib.suppress(OSError):  # an unreadable folder tells no more than the error does
        whole = folder.resolve()
        for outer in whole.parents[:2]:  # from checkpoints/step-N and from final/
            if script_of(outer):
                return f"that is a part of a run, which is resumed as a whole; give {outer}"
        if script_of(whole) not in ("", script.name):
            return f"that is a run of {script_of(whole)}; use python {script_of(whole)}"
        if script_of(whole):
            where = f"--policy-model {folder / 'checkpoints'}/step-N"
            return f"cannot read its config.json ({error}); put it back, or start a new run, perhaps with {where}"
        if runs := sorted(path.name for path in whole.iterdir() if script_of(path) == script.name):
            return f"that is a folder of runs; give one of them, such as {folder / runs[-1]}, or latest"
    return f"cannot read a run of {script.name} there ({error}); give the folder of a run, or start anew"


def _without_constants(text):
    lines = text.splitlines()
    for constant in reversed(constants_in(text).values()):
        del lines[constant.lines]
    return lines


# -- The prompts and models of the run


def fingerprints(trainer):
    """Returns {constant: digits} for the prompts and the weights as loaded. The digits change if these do.

    Prompts count as they were in the data, because a template may print the day's date. The template counts as part of
    the policy. Weights count as bfloat16, because one device may load them so and another may not. They count by the
    exact sum of their bits.
    """
    reward_model = trainer.rewards.reward_model and trainer.rewards.reward_model.model
    content = {
        "PROMPTS": [(row["messages"], row["begun"], row["answer"]) for row in trainer.train_rows],
        "EVAL_PROMPTS": [(row["messages"], row["begun"], row["answer"]) for row in trainer.eval_rows],
        "POLICY_MODEL": (trainer.tokenizer.chat_template, _sums_of_bits(trainer.policy)),
        "REWARD_MODEL": _sums_of_bits(reward_model) if reward_model else None,
    } | {f"{name.upper()}_MODEL": _sums_of_bits(one.model) for name, one in trainer.beside.items()}
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in content.items()}


@torch.no_grad()
def _sums_of_bits(model):
    weights = {name: value for name, value in model.named_parameters() if ".lora_" not in name}
    bits = ((name, whole(value).bfloat16().view(torch.int16)) for name, value in weights.items())
    return [(name, value.sum(dtype=torch.long).item()) for name, value in bits]


def check_fingerprints(files, constants, found):
    """Raises InputError if prompts or models differ from those that the run began with.

    files: the RunFolder. found: the fingerprints now.
    """
    expected = files.config().get("fingerprints", found)  # older runs have none
    changed = [f"{name} = {getattr(constants, name)!r}" for name in found if found[name] != expected.get(name)]
    if changed:
        raise InputError(
            f"{files.path} began with other content of {', '.join(changed)}; put back what was there, or begin a "
            "new run"
        )


# -- The checkpoint


def checkpoint_to_resume(folder):
    """Returns the newest checkpoint of a run, or None if it has none.

    Raises InputError if the run has checkpoints, but none of them is whole.
    """
    path = checkpoints.newest(folder)
    if path is None and any(folder.glob("checkpoints/step-*[0-9]")):
        remedy = "copy one back, or remove them all to begin the run again"
        raise InputError(f"{folder}: none of its checkpoints is as it was written; {remedy}")
    return path


def say_what_the_rate_will_do(constants, steps_before, done, history):
    """Prints how the learning rate goes on if MAX_STEPS has changed and the schedule falls over it.

    steps_before: MAX_STEPS of the run so far. done, history: those of the resumed run.
    """
    steps, schedule = constants.MAX_STEPS, constants.LR_SCHEDULE
    if schedule != "constant" and steps_before not in (None, steps) and 0 < done < steps and history[1:]:
        last, then = history[-1]["learning_rate"], learning_rate_at(done + 1, constants)
        print(
            f"MAX_STEPS is {steps} now and was {steps_before}, and LR_SCHEDULE = {schedule!r} falls over them: "
            f"the learning rate goes from {last:.2g} in step {done} to {then:.2g} in step {done + 1}"
        )
