"""Whatever happens to a run, nothing finished is lost, and a resumed run ends like an uninterrupted one."""

import contextlib
import errno
import functools
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from stat import S_ISDIR
from threading import Event

import pytest
import torch
from conftest import FEW, SCRIPTS, Forked, as_a_program, scores_while_training, shrink, trainer_of
from safetensors.torch import load_file, save_file
from test_run import read_jsonl, timeless

import configs
import dapo
import grpo
import gspo
from bookkeeping import checkpoints, progress, saving
from bookkeeping import folder as run_folders
from bookkeeping import run as runs
from bookkeeping.run import Run
from engine import sampling

FOUR_STEPS = {"MAX_STEPS": 4, "SAVE_EVERY": 2, "EVAL_EVERY": 3, "TENSORBOARD": False}


def named(value):
    return getattr(value, "__name__", None)


class Crash(BaseException):
    """Ends a run as a kill would, without the kill."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns a function that gives the metrics, samples and weights of an uninterrupted run of four steps."""
    done = {}

    def run(script, **constants):
        key = (script.__name__, *constants)
        if key not in done:
            before = configs.constant_values(vars(script))
            shrink(script, tmp_path_factory.mktemp("whole"))
            vars(script).update(FOUR_STEPS | constants)
            trainer = trainer_of(script)
            trainer.train()
            done[key] = what_it_left(trainer)
            vars(script).update(before)
        return done[key]

    return run


def what_it_left(trainer):
    folder = trainer.run.folder
    weights = {name: value.detach().clone() for name, value in trainer.policy.named_parameters()}
    return timeless(read_jsonl(folder / "metrics.jsonl")), read_jsonl(folder / "samples.jsonl"), weights


def assert_the_same(found, expected):
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert found[2].keys() == expected[2].keys()
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])


def set_up(script, tmp_path, **constants):
    shrink(script, tmp_path)
    vars(script).update(FOUR_STEPS | constants)
    return trainer_of(script)


def resumed(script, folder):
    script.RESUME = str(folder)
    trainer = trainer_of(script)
    trainer.train()
    assert trainer.run.folder == folder
    return what_it_left(trainer)


def crashing(trainer, at):
    """Returns the trainer, which dies in the updates of a step, when some of its weights have moved."""
    train_step, update = trainer.train_step, trainer.update

    def dying(step):
        if step == at:
            updates = []
            trainer.update = lambda *a: updates.append(1) or update(*a) if not updates else (_ for _ in ()).throw(Crash)
        return train_step(step)

    trainer.train_step = dying
    return trainer


# ---- Resuming


@pytest.mark.parametrize(
    ("script", "at"), [(gspo, 1), (gspo, 2), (gspo, 4), (grpo, 4), (dapo, 2), (dapo, 4)], ids=named
)
def test_a_resumed_run_is_the_run_it_would_have_been(tmp_path, whole, script, at):
    trainer = crashing(set_up(script, tmp_path), at)
    with pytest.raises(Crash):
        trainer.train()
    assert_the_same(resumed(script, trainer.run.folder), whole(script))


@pytest.mark.parametrize("script", [gspo, dapo], ids=named)
def test_a_state_that_is_too_large_to_copy_is_written_without_a_copy(tmp_path, whole, script, monkeypatch):
    expected = whole(script)
    monkeypatch.setattr(saving, "LARGE", 0)
    monkeypatch.setattr(saving, "copy_of", None)
    trainer = crashing(set_up(script, tmp_path), 4)
    with pytest.raises(Crash):
        trainer.train()
    assert_the_same(resumed(script, trainer.run.folder), expected)


def test_a_resumed_run_with_lora_bfloat16_and_a_schedule_is_the_same_too(tmp_path, whole):
    constants = {"LORA_RANK": 2, "POLICY_DTYPE": "bfloat16", "LR_SCHEDULE": "cosine", "KL_COEF": 0.1}
    constants["MAX_COMPLETION_TOKENS"] = 12  # few, because bfloat16 is slow on many CPUs
    expected = whole(grpo, **constants)
    trainer = crashing(set_up(grpo, tmp_path, **constants), 4)
    with pytest.raises(Crash):
        trainer.train()
    assert_the_same(resumed(grpo, trainer.run.folder), expected)


@pytest.mark.parametrize("script", [grpo, dapo], ids=named)
def test_a_resumed_run_of_a_mixture_with_routing_replay_is_the_same_too(tmp_path, whole, script):
    constants = {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r3", "ROUTER_AUX_COEF": 0.01}
    constants |= {"MAX_COMPLETION_TOKENS": 24, "EVAL_SIZE": 2}
    expected = whole(script, **constants)
    trainer = crashing(set_up(script, tmp_path, **constants), 4)
    with pytest.raises(Crash):
        trainer.train()
    assert_the_same(resumed(script, trainer.run.folder), expected)


@pytest.mark.parametrize("constants", [{}, {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r3"}])
def test_dapo_carries_surplus_groups_and_rounds_over_the_checkpoint(tmp_path, constants):
    trainer = set_up(dapo, tmp_path, GROUP_SIZE=8, **constants)
    for step in range(1, 9):  # until a step has surplus groups
        trainer.train_step(step)
        if trainer.surplus:
            break
    again = trainer_of(dapo)
    saving.load_state(again, checkpoints.copy_to_cpu(saving.state_of(trainer)))
    assert again.rounds == trainer.rounds > 0 and len(again.surplus) == len(trainer.surplus) > 0
    if constants:
        for mine, other in zip(trainer.surplus, again.surplus, strict=True):
            assert torch.equal(mine["experts"], other["experts"]) and mine["experts"].any()
    again.policy.load_state_dict(trainer.policy.state_dict())
    one, other = (t.generate_responses_with_group_sampling(step + 1) for t in (trainer, again))
    assert one.carried.any() and torch.equal(one.carried, other.carried)
    assert one.texts == other.texts and torch.equal(one.sampled_logps, other.sampled_logps)
    assert [row["prompt"] for row in one.prompts] == [row["prompt"] for row in other.prompts]


def test_a_run_of_two_gpus_resumes_on_the_cpu(tmp_path, whole):
    """On the disk, only config.json names devices.

    Every tensor of a checkpoint is on the CPU.
    """
    trainer = crashing(set_up(grpo, tmp_path), 4)
    with pytest.raises(Crash):
        trainer.train()
    folder = trainer.run.folder
    config = json.loads((folder / "config.json").read_text())
    assert config["constants"]["POLICY_DEVICE"] == "cpu"
    config["constants"] |= {"POLICY_DEVICE": "cuda:0", "REF_DEVICE": "cuda:1", "REWARD_DEVICE": "cuda:1"}
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(checkpoints.newest(folder) / "state.pt", weights_only=True)  # not moved to another device
    assert {value.device.type for value in tensors_of(state)} == {"cpu"}
    assert_the_same(resumed(grpo, folder), whole(grpo))


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def test_a_longer_run_goes_on_where_the_shorter_ended(tmp_path, whole):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=3, SAVE_EVERY=1, LR_SCHEDULE="constant")
    trainer.train()
    gspo.MAX_STEPS = 4
    found = resumed(gspo, trainer.run.folder)
    assert [row["step"] for row in found[0]] == [0, 1, 2, 3, 4]
    assert not (trainer.run.folder / "final.old").exists()


def test_resuming_a_complete_run_says_so_and_changes_nothing(tmp_path, capsys):
    trainer = set_up(gspo, tmp_path)
    trainer.train()
    before = what_it_left(trainer)
    assert_the_same(resumed(gspo, trainer.run.folder), before)
    assert "The run is complete" in capsys.readouterr().out


def resume(capsys, script, *argv):
    """Returns the exit code and stderr's last line of `python script --resume ...`, run in this process."""
    with pytest.raises(SystemExit) as exit_:
        script.main([str(word) for word in argv])
    return exit_.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_constants_come_from_the_run_and_others_are_named(tmp_path, capsys):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=2, SAVE_EVERY=1, LEARNING_RATE=2e-3)
    trainer.train()
    folder = trainer.run.folder
    gspo.LEARNING_RATE = 1e-3  # as shipped, but the run's own 2e-3 counts
    gspo.main(["--resume", str(folder), "--max-steps", "3", "--eval-every", "1"])
    assert gspo.LEARNING_RATE == 2e-3 and len(read_jsonl(folder / "metrics.jsonl")) == 4
    code, line = resume(capsys, gspo, "--resume", folder, "--group-size", 16, "--seed", 3)
    assert code == 2 and "GROUP_SIZE = 4, not 16" in line and "SEED = 0, not 3" in line
    copy = (folder / "gspo.py").read_text()
    (folder / "gspo.py").write_text(copy.replace("CLIP_LOW = 0.03 ", "CLIP_LOW = 0.05 "))  # as if edited since
    config = json.loads((folder / "config.json").read_text())
    config["constants"]["CLIP_LOW"] = 0.05
    (folder / "config.json").write_text(json.dumps(config))
    gspo.CLIP_LOW = 0.03
    code, line = resume(capsys, gspo, "--resume", folder)
    assert code == 2 and "CLIP_LOW = 0.05, not 0.03" in line


def test_python_cannot_continue_a_run_with_other_constants_either(run_of_four, tmp_path):
    logged = (run_of_four / "config.json").read_bytes()
    trainer = set_up(gspo, tmp_path, RESUME=str(run_of_four), MAX_STEPS=5, LEARNING_RATE=2e-3, SEED=1)
    with pytest.raises(configs.InputError, match="LEARNING_RATE = 0.001, not 0.002, SEED = 0, not 1; leave that"):
        trainer.train()
    assert (run_of_four / "config.json").read_bytes() == logged


@pytest.mark.parametrize("changed", ["PROMPTS", "EVAL_PROMPTS", "POLICY_MODEL", "REWARD_MODEL"])
def test_a_run_is_not_continued_with_other_prompts_or_models(tmp_path, capsys, changed):
    shrink(gspo, tmp_path)
    copies = {name: tmp_path / name for name in ("PROMPTS", "EVAL_PROMPTS", "POLICY_MODEL", "REWARD_MODEL")}
    for name, copy in copies.items():
        source = configs.HERE / getattr(gspo, name)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    trainer = set_up(gspo, tmp_path, MAX_STEPS=1, **{name: str(copy) for name, copy in copies.items()})
    trainer.train()
    folder, path = trainer.run.folder, tmp_path / changed
    logged = (folder / "metrics.jsonl").read_bytes()
    if path.is_dir():
        tensors = load_file(path / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    else:
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    code, line = resume(capsys, gspo, "--resume", folder, "--max-steps", 2)
    assert code == 2 and f"other content of {changed} = '{path}'; put back" in line
    assert (folder / "metrics.jsonl").read_bytes() == logged


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "no such folder"), ("latest", "holds no run of gspo.py"), ("empty", "cannot read a run")],
)
def test_what_cannot_be_resumed(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    name = tmp_path / name if name != "latest" else name
    code, line = resume(capsys, gspo, "--resume", name, "--output-dir", tmp_path / "outputs")
    assert code == 2 and words in line and "Traceback" not in line


# ---- Checkpoints


@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "metrics.jsonl", "config.json", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run_of_four, file, how, capsys):
    path = run_of_four / "checkpoints/step-4" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    if file == "checkpoint.json" and how == "flipped" and checkpoints.newest(run_of_four).name == "step-4":
        return  # a bit of its spaces
    assert checkpoints.newest(run_of_four).name == "step-2"
    out = capsys.readouterr().out
    assert "step-4 is damaged" in out and "left out" in out


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    before = configs.constant_values(vars(gspo))
    trainer = set_up(gspo, tmp_path_factory.mktemp("four"))
    trainer.train()
    vars(gspo).update(before)
    return trainer.run.folder


@pytest.fixture
def run_of_four(four, tmp_path):
    shutil.copytree(four, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_cut_at_any_file_is_damaged(run_of_four):
    files = [path for path in (run_of_four / "checkpoints/step-4").iterdir() if path.stat().st_size > 0]
    assert len(files) > 6  # tokenizer and all
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert checkpoints.newest(run_of_four).name == "step-2", path
        path.write_bytes(content)
    assert checkpoints.newest(run_of_four).name == "step-4"


def test_half_a_checkpoint_is_no_checkpoint(run_of_four, capsys):
    shutil.copytree(run_of_four / "checkpoints/step-4", run_of_four / "checkpoints/step-6.part")
    shutil.copytree(run_of_four / "checkpoints/step-4", run_of_four / "checkpoints/step-8")
    (run_of_four / "checkpoints/step-8/checkpoint.json").unlink()
    assert checkpoints.newest(run_of_four).name == "step-4"
    assert "step-6.part is half written, and left out" in capsys.readouterr().out


def test_a_checkpoint_that_was_moved_aside_for_its_successor_is_not_lost(run_of_four, monkeypatch):
    target, real = run_of_four / "checkpoints/step-4", os.replace
    target.rename(target.with_name("step-4.old"))  # as a kill leaves it before the successor is in place
    assert checkpoints.newest(run_of_four) == target

    def fail(source, place):
        if str(source).endswith(".part"):
            raise OSError("no space")
        real(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.write_folder(target, lambda folder: (folder / "file").touch())
    assert checkpoints.newest(run_of_four) == target and len(list(target.parent.iterdir())) == 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    trainer, write_state, later, waited = set_up(gspo, tmp_path, MAX_STEPS=3), checkpoints.write_state, Event(), []

    def slow(*arguments):
        if arguments[1] > 0:  # not the trial before the first step
            waited.append(later.wait(60))  # of step 2, until step 3 has begun
        write_state(*arguments)

    monkeypatch.setattr(checkpoints, "write_state", slow)
    train_step = trainer.train_step
    trainer.train_step = lambda step: (later.set() if step == 3 else None, train_step(step))[1]
    trainer.train()
    assert waited == [True, True] and checkpoints.newest(trainer.run.folder).name == "step-3"


def test_a_run_without_a_whole_checkpoint_does_not_start_over(run_of_four, tmp_path, capsys):
    for path in run_of_four.glob("checkpoints/*/state.pt"):
        path.unlink()
    logged = (run_of_four / "metrics.jsonl").read_bytes()
    set_up(gspo, tmp_path)
    code, line = resume(capsys, gspo, "--resume", run_of_four)
    assert code == 2 and "none of its checkpoints is as it was written" in line and "remove them all" in line
    assert (run_of_four / "metrics.jsonl").read_bytes() == logged


def test_a_marker_that_cannot_be_read_stops_no_run(run_of_four, tmp_path):
    (run_of_four / "checkpoints/step-2/checkpoint.json").write_text("{")
    set_up(gspo, tmp_path, MAX_STEPS=8, SAVE_EVERY=1)
    resumed(gspo, run_of_four)
    left = {path.name for path in run_of_four.glob("checkpoints/*")}
    assert {"step-2", "step-7", "step-8"} <= left and "step-5" not in left  # neither counted nor touched


def test_the_final_model_of_a_complete_run_is_that_of_its_last_step(run_of_four, tmp_path):
    """An older final/ may lie there if a longer run was killed, or met a full disk, before it wrote its own."""
    expected = (run_of_four / "final/model.safetensors").read_bytes()
    weights = load_file(run_of_four / "final/model.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, run_of_four / "final/model.safetensors")
    set_up(gspo, tmp_path)
    resumed(gspo, run_of_four)
    assert (run_of_four / "final/model.safetensors").read_bytes() == expected


def test_changes_of_a_resumed_run_hold_when_it_is_resumed_again(run_of_four, tmp_path):
    set_up(gspo, tmp_path)
    gspo.main(["--resume", str(run_of_four), "--max-steps", "5", "--sample-groups", "1"])
    gspo.MAX_STEPS, gspo.SAMPLE_GROUPS = 80, 2  # as shipped
    gspo.main(["--resume", str(run_of_four)])
    assert gspo.MAX_STEPS == 5 and gspo.SAMPLE_GROUPS == 1
    assert len(read_jsonl(run_of_four / "metrics.jsonl")) == 6


def test_weights_that_do_not_fit_are_an_error_and_no_random_tensor(run_of_four, tmp_path):
    trainer = set_up(gspo, tmp_path)
    path = run_of_four / "checkpoints/step-4"
    weights = load_file(path / "model.safetensors")
    for change in (
        lambda w: {name: value for name, value in w.items() if "q_proj" not in name},
        lambda w: w | {"model.more": torch.zeros(2)},
        lambda w: w | {"model.norm.weight": torch.zeros(7)},
    ):
        save_file(change(dict(weights)), path / "model.safetensors", {"format": "pt"})
        with pytest.raises(configs.InputError, match="do not fit|cannot be loaded"):
            checkpoints.load(path, trainer.policy, None)


def test_nothing_in_a_checkpoint_is_executed(run_of_four, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = run_of_four / "checkpoints/step-4"
    torch.save({"trainer": Evil()}, path / "state.pt")
    with pytest.raises(configs.InputError, match="cannot be continued from"):
        checkpoints.load(path, set_up(gspo, tmp_path).policy, None)
    assert not (tmp_path / "executed").exists()


def test_the_last_ones_and_the_best_stay(tmp_path, monkeypatch):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=5, SAVE_EVERY=1, EVAL_EVERY=1, KEEP_CHECKPOINTS=2)
    accuracies = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5])
    trainer.eval_texts = []
    trainer.evaluate = lambda: {"eval_accuracy": next(accuracies), "eval_accuracy_greedy": 0.0}
    trainer.train()
    left = sorted(path.name for path in (trainer.run.folder / "checkpoints").iterdir())
    assert left == ["step-2", "step-4", "step-5"]


# ---- What a file system, a terminal or a cluster does not give


def test_without_locks_and_folder_syncs_a_run_warns_once_and_goes_on(tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(run_folders.fcntl, "flock", refused)
    monkeypatch.setattr(os, "fsync", lambda handle: refused() if S_ISDIR(os.fstat(handle).st_mode) else fsync(handle))
    checkpoints._warn_once.cache_clear()
    trainer = set_up(gspo, tmp_path, MAX_STEPS=1)
    assert trainer.train()[-1]["step"] == 1
    out = capsys.readouterr().out
    assert out.count("has no locks") == 1 and out.count("cannot sync folders") == 1


def test_closed_or_ascii_output_ends_no_run_and_a_log_gets_a_line_per_step(tmp_path):
    rows = [{"prompt": f"{a}+{a}=", "answer": f"zwölf {a}"} for a in range(20, 26)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--preset",
        "smoke",
        "--rewards",
        "exact_match",
        "--prompts",
        str(tmp_path / "rows.jsonl"),
        "--no-tensorboard",
    ]
    argv += ["--output-dir", str(tmp_path / "outputs"), "--save-every", "0", "--kl-coef", "0"]

    def in_ascii():
        sys.stdout, sys.stderr = (open(number, "w", encoding="ascii", closefd=False) for number in (1, 2))
        gspo.main(argv)

    def closed():
        os.close(1)
        sys.stdout = None  # Python sets it so if stdout is closed
        gspo.main(argv)

    shown = []
    for work in (in_ascii, closed):
        run = Forked(work, tmp_path)
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
        shown.append(out)
    assert "zw\\xf6lf" in shown[0] and "Held-out accuracy" not in shown[1]
    assert [line.split(":")[0] for line in shown[0].splitlines() if " step " in line] == [
        "gspo step 1/2",
        "gspo step 2/2",
    ]


def test_saving_the_final_model_is_tried_before_training(tmp_path, monkeypatch, capsys):
    shrink(gspo, tmp_path)

    def broken(*_, **__):
        raise AttributeError("'Experts' object has no attribute 'weight'")

    monkeypatch.setattr(saving, "save_merged", broken)
    code, line = resume(capsys, gspo, "--lora-rank", 2)
    assert code == 2 and "cannot be saved: AttributeError: 'Experts' object has no" in line and "--lora-targets" in line
    assert not list((tmp_path / "outputs").iterdir())


# ---- Constants and objects as people have them


def test_constants_of_any_type_are_saved_and_those_of_several_lines_compared_whole(tmp_path):
    text = (configs.HERE / "gspo.py").read_text()
    more = 'SEED = 0  # of everything random\nHOME = Path("/data")\nNAMES = {"b", "a"}\nTYPE = torch.bfloat16  # mine\n'
    more += 'LONG = (\n    "one "\n    "two"\n)  # over lines\n'
    (tmp_path / "mine.py").write_text(text.replace("SEED = 0  # of everything random\n", more))
    namespace = vars(gspo) | {"__file__": str(tmp_path / "mine.py"), "HOME": Path("/data"), "NAMES": {"b", "a"}}
    namespace |= {"TYPE": torch.bfloat16, "LONG": "one two"}
    constants = configs.read_constants(namespace)
    assert constants["LONG"] == ("one two", "over lines", "Run") and constants["TYPE"][1] == "mine"
    saved = configs.as_saved(configs.constant_values(namespace) | {"F": named, "PAIR": (1, 2), "BAD": float("nan")})
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved
    assert (saved["HOME"], saved["NAMES"], saved["TYPE"]) == ("PosixPath('/data')", "['a', 'b']", "torch.bfloat16")
    assert (saved["F"], saved["PAIR"], saved["BAD"], saved["SEED"]) == ("<function named>", [1, 2], "nan", 0)
    folder = tmp_path / "outputs/mine-1"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "mine.py", folder)
    (folder / "config.json").write_text(json.dumps({"constants": saved}))
    configs.apply_overrides(namespace, ["--resume", str(folder)], Run.constants_to_resume)
    assert namespace["HOME"] == Path("/data") and namespace["TYPE"] is torch.bfloat16
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace('"two"', '"three"'))
    namespace["LONG"] = "one three"
    with pytest.raises(configs.InputError, match="LONG = 'one two', not 'one three'"):
        configs.apply_overrides(namespace, ["--resume", str(folder)], Run.constants_to_resume)
    namespace |= {"LONG": "one two", "HOME": Path("/other")}  # which no line of the file says
    with pytest.raises(configs.InputError, match="HOME = \"PosixPath\\('/data'\\)\", not \"PosixPath\\('/other'\\)\""):
        configs.apply_overrides(namespace, ["--resume", str(folder)], Run.constants_to_resume)


def test_sets_within_others_are_saved_in_one_order():
    program = "import configs; print(configs.as_saved({'X': {'k': [{'a', 'b', 'c', 'd'}, {frozenset('ab')}]}}))"
    says = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            cwd=configs.HERE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(says) == 1


def test_a_banner_within_a_text_ends_nothing_and_constants_set_together_are_refused(tmp_path):
    text = (configs.HERE / "gspo.py").read_text()

    def constants(more):
        (tmp_path / "mine.py").write_text(text.replace("SEED = 0 ", more + "\nSEED = 0 "))
        return configs.read_constants(vars(gspo) | {"__file__": str(tmp_path / "mine.py"), "PAGE": "x"})

    assert list(constants('PAGE = """\n# ---- Notes\n"""')) == list(constants('PAGE = "x"'))
    for more in ("Z, Y = 3, 4", "if True:\n    Z = 3", "Y = Z = 3", "SEED += 1"):
        with pytest.raises(configs.InputError, match="line [0-9]+ sets the constant [A-Z]+ together with others"):
            constants(more)


def test_the_file_may_be_edited_while_models_load_and_the_copy_is_what_ran(tmp_path, monkeypatch):
    """People edit the next run's constants while one runs."""
    text = (configs.HERE / "gspo.py").read_text()
    (tmp_path / "gspo.py").write_text(text)
    monkeypatch.setitem(vars(gspo), "__file__", str(tmp_path / "gspo.py"))
    trainer = set_up(gspo, tmp_path, MAX_STEPS=1, SAVE_EVERY=0)
    (tmp_path / "gspo.py").write_text(text.replace("SEED = 0  #", "NEW = 1  # not there at first\nSEED = 7  #"))
    trainer.train()
    folder = trainer.run.folder
    assert (folder / "gspo.py").read_text() == text
    assert json.loads((folder / "config.json").read_text())["constants"].keys() == trainer.constants.values().keys()
    with pytest.raises(AttributeError, match="SEED cannot be set"):
        trainer.constants.SEED = 1
    assert "NEW" not in vars(gspo) and trainer_of(gspo).constants.SEED == 0  # nor does it stop the next trainer here


def test_a_preset_set_from_python_is_refused_with_what_to_call(tmp_path, monkeypatch):
    shrink(gspo, tmp_path)
    monkeypatch.setitem(vars(gspo), "__preset__", "")  # whatever tests before this one have run
    gspo.PRESET = "smoke"
    with pytest.raises(
        configs.InputError, match="PRESET = 'smoke' changes nothing when it is set from Python.*--preset"
    ):
        trainer_of(gspo)
    configs.apply_overrides(vars(gspo), ["--preset", "smoke"])
    assert trainer_of(gspo).constants.PRESET == "smoke"


def test_a_longer_run_under_a_falling_schedule_says_what_the_rate_will_do(tmp_path, capsys):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=2, SAVE_EVERY=1, LR_SCHEDULE="linear")
    trainer.train()
    with pytest.raises(configs.InputError, match="this trainer has trained already; make a new one"):
        trainer.train()
    capsys.readouterr()
    gspo.MAX_STEPS = 3
    resumed(gspo, trainer.run.folder)
    out = capsys.readouterr().out
    assert "MAX_STEPS is 3 now and was 2" in out and "from 0.0005 in step 2 to 0.00033 in step 3" in out


def test_ten_steps_without_a_signal_are_warned_about_once_and_the_clip_is_not_blamed(tmp_path, capsys, monkeypatch):
    scores_while_training(monkeypatch, lambda name, texts: [(0.0, None)] * len(texts))
    monkeypatch.setattr(progress, "IDLE_STEPS", 2)
    constants = {"MAX_STEPS": 4, "REWARDS": "exact_match", "ENTROPY_COEF": 0.0, "KL_COEF": 0.0}
    set_up(gspo, tmp_path, **constants).train()
    out = capsys.readouterr().out
    assert out.count("in 2 steps no group had a signal") == 1 and "lower CLIP_LOW" not in out


# ---- Signals


@pytest.mark.parametrize(
    ("script", "moment", "number", "code", "saved"),
    [
        (gspo, "sample", signal.SIGINT, 130, 1),
        (gspo, "update", signal.SIGTERM, 143, 2),
        (gspo, "evaluate", signal.SIGINT, 130, 3),
        (grpo, "update", signal.SIGINT, 130, 2),
        (dapo, "sample", signal.SIGUSR1, 138, 1),  # as Slurm sends it before its limit
    ],
    ids=named,
)
def test_a_signal_ends_the_run_with_a_checkpoint(
    tmp_path, whole, monkeypatch, capsys, script, moment, number, code, saved
):
    trainer, steps, updates = set_up(script, tmp_path), [], []
    train_step = trainer.train_step
    trainer.train_step = lambda step: steps.append(step) or train_step(step)
    original = getattr(trainer, moment)

    def interrupted(*arguments, **options):
        now = bool(steps) and steps[-1] == (3 if moment == "evaluate" else 2) and not trainer.run.signals.received
        updates.extend([1] if now else [])
        if now and (moment != "update" or len(updates) == 2):  # between two updates: the step is ended first
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(trainer, moment, interrupted)
        trainer.train()
    out = capsys.readouterr().out
    assert exit_.value.code == code and f"--resume {trainer.run.folder}" in out and number.name in out
    assert (trainer.run.folder / f"checkpoints/step-{saved}/checkpoint.json").is_file()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert_the_same(resumed(script, trainer.run.folder), whole(script))


def test_a_second_signal_ends_it_at_once(tmp_path):
    trainer = set_up(gspo, tmp_path)
    update = trainer.update

    def hang(*arguments):
        update(*arguments)  # from here on a signal waits
        os.kill(os.getpid(), signal.SIGTERM)
        print("waits", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    trainer.update = hang
    run = Forked(trainer.train, tmp_path)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGTERM and "waits" in out


def test_an_error_that_nobody_foresaw_leaves_a_checkpoint(tmp_path, whole, monkeypatch, capsys):
    trainer = set_up(gspo, tmp_path, SAVE_EVERY=0)
    generate = trainer.generate_responses_with_group_sampling
    broken = [3]

    def fails_once(step):
        if step in broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return generate(step)

    monkeypatch.setattr(trainer, "generate_responses_with_group_sampling", fails_once)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.train()
    assert f"RuntimeError in step 3: the state after step 2 is in {trainer.run.folder}" in capsys.readouterr().out
    assert_the_same(resumed(gspo, trainer.run.folder), whole(gspo))


def test_a_signal_while_a_profile_is_taken(tmp_path, monkeypatch):
    trainer = set_up(gspo, tmp_path, PROFILE=True, MAX_COMPLETION_TOKENS=6)
    sample = trainer.sample

    def interrupted(*arguments, **options):
        if trainer.run.profiler.steps_begun == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments, **options)

    monkeypatch.setattr(trainer, "sample", interrupted)
    with pytest.raises(SystemExit) as exit_:
        trainer.train()
    assert exit_.value.code == 143 and (trainer.run.folder / "profile.json.gz").is_file()
    assert checkpoints.newest(trainer.run.folder).name == "step-2" and trainer.run.profiler.running is None


def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=500, SAVE_EVERY=0)
    child, terminal = pty.fork()
    if child == 0:
        as_a_program(1, 2)
        try:
            trainer.train()
        except SystemExit as exit_:
            os._exit(exit_.code)
        os._exit(0)
    os.set_blocking(terminal, False)
    while not any(path.read_text().count("\n") > 2 for path in tmp_path.glob("outputs/*/metrics.jsonl")):
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)
        time.sleep(0.05)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 129
    (run,) = (tmp_path / "outputs").iterdir()
    steps = len(read_jsonl(run / "metrics.jsonl")) - 1
    assert steps <= int(checkpoints.newest(run).name.removeprefix("step-")) <= steps + 1


# ---- Faults


def test_two_processes_cannot_write_one_run(tmp_path):
    trainer = set_up(gspo, tmp_path, MAX_STEPS=1)
    generate = trainer.generate_responses_with_group_sampling

    def meanwhile(step):
        gspo.RESUME = str(trainer.run.folder)
        with pytest.raises(configs.InputError, match="another process is writing this run"):
            trainer_of(gspo).train()
        gspo.RESUME = ""
        return generate(step)

    trainer.generate_responses_with_group_sampling = meanwhile
    trainer.train()
    assert len(resumed(gspo, trainer.run.folder)[0]) == 2  # and afterwards the lock is free


@pytest.mark.parametrize("tail", ['{"step": 5, "policy_lo', "\0\0\0\0", "{}\n[]\n"])
def test_a_broken_end_of_a_log_is_cut_off(tmp_path, whole, tail):
    trainer = crashing(set_up(gspo, tmp_path), 4)
    with pytest.raises(Crash):
        trainer.train()
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(trainer.run.folder / name, "a") as file:
            file.write(tail)
    assert_the_same(resumed(gspo, trainer.run.folder), whole(gspo))


def test_a_broken_line_in_the_middle_of_a_log_takes_no_other_with_it(tmp_path, whole):
    trainer = crashing(set_up(gspo, tmp_path), 4)
    with pytest.raises(Crash):
        trainer.train()
    path = trainer.run.folder / "samples.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(first + '{"step": 1, "pro\n\0\0\n' + "".join(others))
    assert_the_same(resumed(gspo, trainer.run.folder), whole(gspo))


def test_pictures_that_cannot_be_drawn_stop_no_training(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise configs.InputError("no such font")

    monkeypatch.setattr(runs.plotting, "draw_run", refuse)
    assert len(set_up(gspo, tmp_path, MAX_STEPS=2, EVAL_EVERY=1).train()) == 3
    out = "".join(capsys.readouterr())
    assert out.count("the pictures could not be drawn: no such font; training goes on") == 1


def run_with_room_for(size, argv, tmp_path, after="main"):
    """Returns code, stdout and stderr of a run of gspo.py that can write no file above `size` bytes, as on a full disk.

    after: the method of Run after which the disk is full, or "main" for a disk that is full from the start.
    """

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def work():
        if after == "main":
            fill()
        else:
            before = getattr(runs.Run, after)
            setattr(runs.Run, after, lambda *arguments: (before(*arguments), fill())[0])
        gspo.main(argv)

    run = Forked(work, tmp_path)
    out, err = run.communicate(timeout=120)
    return run.returncode, out, err


def test_a_full_disk_stops_no_training_and_says_what_was_not_written(tmp_path):
    argv = ["--preset", "smoke", "--save-every", "1", "--no-tensorboard", "--output-dir", str(tmp_path / "outputs")]
    code, out, err = run_with_room_for(600 * 1024, argv, tmp_path, "_try_to_save")  # the model has 1.2 MB
    assert code == 2 and "Traceback" not in err
    assert "a checkpoint could not be written" in out and "training goes on" in out
    assert "final could not be written" in err and err.count("\n") == 1
    (folder,) = (tmp_path / "outputs").iterdir()
    assert len(read_jsonl(folder / "metrics.jsonl")) == 3 and not list(folder.rglob("*.part"))

    def under_a_full_disk():  # a full disk under stdout stops nothing either
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        gspo.main([*argv, "--resume", "latest"])
        os._exit(0)  # because the stream's last text has nowhere to go

    run = Forked(under_a_full_disk, tmp_path)
    run.communicate(timeout=120)
    assert run.returncode == 0 and (folder / "final/model.safetensors").is_file()


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_the_run_resumes(tmp_path, whole):
    trainer = set_up(gspo, tmp_path, TENSORBOARD=True)
    train_step = trainer.train_step

    def full_from_step_3_on(step):
        if step == 3:
            trainer.run.saver.wait()
            largest = max(path.stat().st_size for path in trainer.run.folder.glob("events*"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        return train_step(step)

    def work():
        trainer.train_step = full_from_step_3_on
        with configs.one_line_errors():
            trainer.train()

    run = Forked(work, tmp_path)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in err
    (folder,) = (tmp_path / "outputs").iterdir()
    assert checkpoints.newest(folder).name == "step-2" and len(read_jsonl(folder / "metrics.jsonl")) < 5
    assert_the_same(resumed(gspo, folder), whole(gspo))


def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(tmp_path):
    argv = ["--preset", "smoke", "--output-dir", str(tmp_path / "outputs")]
    code, _, err = run_with_room_for(20 * 1024, argv, tmp_path)  # the script itself has more
    assert code == 2 and "Traceback" not in err
    assert "cannot write there" in err.splitlines()[-1] and not list((tmp_path / "outputs").iterdir())


def test_lines_that_could_not_be_written_follow_later(tmp_path, monkeypatch, capsys):
    trainer, real = set_up(gspo, tmp_path), os.truncate
    folder = []

    def train_step(step, original=trainer.train_step):
        folder.append(trainer.run.folder)
        path = trainer.run.folder / "metrics.jsonl"
        if step == 2:
            path.rename(path.with_suffix(".away"))
            path.mkdir()  # cannot be opened for writing
        if step == 3:
            path.rmdir()
            path.with_suffix(".away").rename(path)
        return original(step)

    trainer.train_step = train_step
    history = trainer.train()
    assert os.truncate is real and read_jsonl(folder[0] / "metrics.jsonl") == history
    assert "its lines follow later" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("script", "factor", "summand"),
    [(gspo, 1, float("inf")), (grpo, float("nan"), 0), (dapo, float("nan"), 0)],  # the first has a finite gradient
    ids=named,
)
def test_an_update_that_is_not_finite_moves_nothing_and_is_counted(tmp_path, monkeypatch, script, factor, summand):
    trainer, calls = set_up(script, tmp_path, MAX_STEPS=2), []
    compute_policy_loss = script.compute_policy_loss

    def sometimes_nan(*arguments):
        loss, stats = compute_policy_loss(*arguments)
        calls.append(1)
        return (loss * factor + summand if len(calls) == 1 else loss), stats

    monkeypatch.setattr(script, "compute_policy_loss", sometimes_nan)
    before = {name: value.detach().clone() for name, value in trainer.policy.named_parameters()}
    moved, step = [], trainer.optimizer.step
    trainer.optimizer.step = lambda: (moved.append(1), step())
    history = trainer.train()
    text = (trainer.run.folder / "metrics.jsonl").read_text()
    assert history[1]["grad_norm"] is None and "NaN" not in text and "Infinity" not in text  # which JSON does not have
    assert history[1]["skipped_updates"] == 1 and history[2]["skipped_updates"] == 0
    assert len(moved) == history[1]["updates"] + history[2]["updates"] - 1
    assert all(value.isfinite().all() for value in trainer.policy.parameters()) and before
    skipped = read_jsonl(trainer.run.folder / "skipped.jsonl")
    assert len(skipped) == 16 and {"prompt", "completion", "reward", "advantage"} <= set(skipped[0])


def test_a_run_whose_updates_are_never_finite_stops_with_its_batch(tmp_path, monkeypatch, capsys):
    shrink(gspo, tmp_path)
    monkeypatch.setattr(gspo, "bounded_exp", lambda x: x * float("nan"))
    vars(gspo).update(MAX_STEPS=30)
    code, line = resume(capsys, gspo)
    assert code == 2 and "8 updates in steps that follow one another had no finite" in line and "skipped.jsonl" in line
    (folder,) = (tmp_path / "outputs").iterdir()
    assert len(read_jsonl(folder / "metrics.jsonl")) == 5 and (folder / "checkpoints/step-4").is_dir()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_if_memory_runs_out_smaller_parts_give_the_same_result(tmp_path, monkeypatch, script):
    results = []
    for most in (10**9, 100):
        trainer = set_up(script, tmp_path, MICRO_BATCH_TOKENS=2000, SAMPLE_GROUPS=0, TENSORBOARD=False)
        completion_logps, sample_in_turn = script.completion_logps, sampling.Sampler.sample_in_turn

        def in_memory(model, rollouts, most=most, completion_logps=completion_logps, **k):
            if len(rollouts.texts) > 1 and int(rollouts.lengths.sum()) > most:
                raise torch.OutOfMemoryError("no room")
            return completion_logps(model, rollouts, **k)

        def in_memory_too(*a, most=most, sample_in_turn=sample_in_turn):
            if a[-1] > most / 25:
                raise torch.OutOfMemoryError("no room")
            return sample_in_turn(*a)

        with monkeypatch.context() as patch:
            patch.setattr(script, "completion_logps", in_memory)
            if hasattr(script, "completion_values"):
                values = functools.partial(in_memory, completion_logps=script.completion_values)
                patch.setattr(script, "completion_values", values)
            patch.setattr(sampling.Sampler, "sample_in_turn", in_memory_too)
            results.append(trainer.train_step(1))
    plenty, little = results
    assert plenty["memory_halvings"] == 0 and little["memory_halvings"] >= 3
    names = ["reward", "completion_tokens", "policy_loss", "grad_norm", "avg_response_length", "clip_fraction"]
    for name in names + ["value_loss", "critic_grad_norm"] * hasattr(script, "completion_values"):
        assert little[name] == pytest.approx(plenty[name], rel=1e-3, abs=1e-6), name


def test_if_not_even_one_completion_fits_it_is_one_line(tmp_path, monkeypatch, capsys):
    shrink(gspo, tmp_path)

    def never(*_, **__):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(sampling.Sampler, "sample_in_turn", never)
        code, line = resume(capsys, gspo)
    assert code == 2 and "out of memory in sampling with one completion at a time" in line and "--lora-rank" in line
    monkeypatch.setattr(torch.optim.AdamW, "step", never)  # which makes its moments
    code, line = resume(capsys, gspo)
    assert code == 2 and "step 1: out of memory (no room); resume with more memory, or begin a new run" in line
    assert "there is no checkpoint; go on with python gspo.py --resume" in line


def test_a_clock_that_jumps_disturbs_nothing(tmp_path, whole, monkeypatch):
    trainer, jumps = set_up(gspo, tmp_path), random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: jumps.uniform(0, 2e9))
        trainer.train()
    assert_the_same(what_it_left(trainer), whole(gspo))
    assert all(value >= 0 for row in trainer.metrics_history for key, value in row.items() if key[:8] == "seconds_")


def test_a_run_of_local_files_asks_no_network(tmp_path, monkeypatch):
    import socket

    asked, model = [], gspo.POLICY_MODEL

    def refuse(host, *_, **__):
        asked.append(host)
        raise AssertionError("the network was asked")  # not an OSError, because that is retried

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with contextlib.suppress(Exception):
        set_up(gspo, tmp_path, POLICY_MODEL="nobody/nothing")
    assert asked  # the test does see requests
    asked.clear()
    set_up(gspo, tmp_path, MAX_STEPS=1, POLICY_MODEL=model).train()
    assert not asked


MIXTURE = {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r2", "MAX_COMPLETION_TOKENS": 24}


@pytest.mark.parametrize(("at", "constants"), [(7, {}), (17, {}), (17, MIXTURE)], ids=["7", "17", "mixture"])
def test_killed_in_the_middle_of_writing_a_checkpoint(tmp_path, whole, at, constants):
    expected = whole(gspo, **constants)
    trainer, synced, sync = set_up(gspo, tmp_path, **constants), [], checkpoints.sync

    def killed(path):
        synced.extend([path] if "checkpoints" in path.parts else [])
        os.kill(os.getpid(), signal.SIGKILL) if len(synced) == at else sync(path)

    def work():
        checkpoints.sync = killed
        trainer.train()

    run = Forked(work, tmp_path)
    _, errors = run.communicate(timeout=90)
    assert run.returncode == -signal.SIGKILL, errors
    (folder,) = (tmp_path / "outputs").iterdir()
    assert [path.name for path in folder.glob("checkpoints/*.part")]
    assert_the_same(resumed(gspo, folder), expected)


def test_killed_at_random_moments_a_run_still_ends_as_it_would_have(tmp_path, monkeypatch):
    """Does the same as benchmarks/crash.py, with processes that start at once, and shorter runs without pictures."""
    sys.path.insert(0, str(configs.HERE / "benchmarks"))
    import crash

    flags = "--preset smoke --max-steps 4 --save-every 1 --eval-every 3".split()
    flags += ["--prompts", f"{FEW.name}/train.jsonl", "--eval-prompts", f"{FEW.name}/test.jsonl"]

    def start(script, folder):
        resume = ["--resume", "latest"] if list(folder.glob("*/config.json")) else []
        return Forked(lambda: dapo.main([*flags, "--output-dir", str(folder), *resume]), tmp_path)

    monkeypatch.setattr(crash, "start", start)
    (tmp_path / "runs").mkdir()
    at, identical = crash.measure("dapo", kills=3, folder=tmp_path / "runs", seed=1)
    assert len(at) == 3 and identical and all(identical)
