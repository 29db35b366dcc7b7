"""Tests of several processes, as torchrun starts them: they do the work of one, and end in order."""

import datetime
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import psutil
import pytest
import torch
from conftest import SCRIPTS, Forked, shrink, trainer_of
from safetensors.torch import load_file
from variants import over_variants

import configs
from bookkeeping import checkpoints, resuming, run
from engine import processes, sharding


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_processes(count, work, folder, on_one_machine=None):
    """Forks processes with torchrun's environment. Each runs work()."""
    port, here = free_port(), on_one_machine or count

    def as_one(rank):
        numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        configs.ALONE = 1
        work()

    return [Forked(functools.partial(as_one, rank), folder) for rank in range(count)]


def run_processes(count, work, folder, on_one_machine=None):
    """Runs work() in several processes, and returns their exit codes and what they printed."""
    started = start_processes(count, work, folder, on_one_machine)
    texts = ["".join(one.communicate(timeout=300)) for one in started]
    return [one.returncode for one in started], texts


def train_and_save(script, folder):
    """Trains, and saves metrics and weights under this process's number."""
    with configs.one_line_errors():
        trainer = trainer_of(script)
        trainer.train()
    weights = {name: value.detach() for name, value in trainer.policy.named_parameters()}
    critic = (
        {f"critic {name}": value.detach() for name, value in trainer.critic.trained().items()}
        if "critic" in trainer.beside
        else {}
    )
    rank = os.environ.get("RANK", "alone")
    torch.save(weights | critic, folder / f"weights-{rank}.pt")
    (folder / f"metrics-{rank}.json").write_text(json.dumps(trainer.metrics_history))


def of(folder, rank):
    """Returns what a process saved: its metrics, but for times and what a process measures of itself, and weights."""
    rows = json.loads((folder / f"metrics-{rank}.json").read_text())
    own = ("seconds", "tokens_per", "peak_memory")
    rows = [{name: value for name, value in row.items() if not name.startswith(own)} for row in rows]
    return rows, torch.load(folder / f"weights-{rank}.pt")


def close(value):
    return value if value is None else pytest.approx(value, rel=1e-3, abs=2e-5)


def assert_like_one(script, tmp_path, count, **constants):
    """Trains in one process and in several, and compares metrics and weights."""
    shrink(script, tmp_path)
    # With AdamW a weight whose gradient is but rounding may move by as much as the rate, so the rate is small.
    vars(script).update({"MAX_STEPS": 5, "LEARNING_RATE": 1e-4, "EVAL_EVERY": 2, "SAVE_EVERY": 0, "TENSORBOARD": False})
    vars(script).update(constants)
    work = functools.partial(train_and_save, script, tmp_path)
    work()
    codes, texts = run_processes(count, work, tmp_path)
    assert codes == [0] * count, texts
    assert not any(texts[1:]), texts[1:]  # one process prints
    expected, weights = of(tmp_path, "alone")
    found = [of(tmp_path, rank) for rank in range(count)]
    for name, value in weights.items():
        assert all(torch.equal(one[1][name], found[0][1][name]) for one in found), name
        torch.testing.assert_close(found[0][1][name], value, rtol=0, atol=1e-5)
    assert len(found[0][0]) == len(expected)
    for row, right in zip(found[0][0], expected, strict=True):
        assert row.keys() == right.keys()
        for name, value in right.items():
            assert row[name] == close(value), (row["step"], name)
    (two,) = {path for path in (tmp_path / "outputs").iterdir() if path.name.startswith(script.__name__)} - {
        min((tmp_path / "outputs").iterdir(), key=lambda path: path.stat().st_mtime)
    }
    assert (two / "final/model.safetensors").is_file() and len((two / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_several_processes_do_the_work_of_one(script, count, tmp_path):
    assert_like_one(script, tmp_path, count)


KINDS = {
    "lora": {"LORA_RANK": 2, "MICRO_BATCH_TOKENS": 100},
    "uneven": {"BATCH_SIZE": 3, "EVAL_SIZE": 5, "WHOLE_GROUPS": True},
    "replay": {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r3", "ROUTER_AUX_COEF": 0.01},
    "recorded": {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r2", "MINI_BATCHES": 1},
    "no kl": {"KL_COEF": 0.0, "ENTROPY_COEF": 0.0, "REWARDS": "exact_match", "MINI_BATCHES": 4, "BATCH_SIZE": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)
def test_several_processes_do_the_work_of_one_in_other_ways_of_training(script, kind, tmp_path):
    """Among them mini-batches of which a process has nothing, because its groups are dead or elsewhere."""
    assert_like_one(script, tmp_path, 2, **KINDS[kind])
    if kind == "no kl":  # each process has one of the two groups
        assert any(row.get("dead_groups") == 0.5 for row in of(tmp_path, "alone")[0])


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("script", SCRIPTS[-2:], ids=lambda script: script.__name__)
def test_several_processes_train_the_adapters_of_a_policy_and_its_critic(script, shard, tmp_path):
    """Adapters stay whole with SHARD, too."""
    assert_like_one(script, tmp_path, 2, **KINDS["lora"], SHARD=shard)


def test_a_share_is_whole_prompts_of_about_as_many_tokens(monkeypatch):
    tokens, numbers = [5, 5, 9, 1, 1, 1, 8, 8], [0, 0, 1, 2, 2, 2, 3, 3]
    monkeypatch.setattr(processes, "size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.own_rows(tokens, numbers))
    assert shares == [[3, 4, 5, 6, 7], [0, 1, 2]]
    monkeypatch.setattr(processes, "size", lambda: 3)
    parts = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(processes.own(list(range(7))))
    assert sum(parts, []) == list(range(7)) and sorted(map(len, parts)) == [2, 2, 3]


def stop_in_step(script, number, do, method="add_scores"):
    """Lets process `number` call do() when a method is called the third time, after a rollout."""
    (trainer_class,) = (cls for name, cls in vars(script).items() if name.endswith("Trainer"))
    original, calls = getattr(trainer_class, method), []

    def stopped(self, *arguments, **others):
        calls.append(None)
        if len(calls) == 3 and os.environ["RANK"] == str(number):
            do()
        return original(self, *arguments, **others)

    setattr(trainer_class, method, stopped)


def wait_for_steps(tmp_path, count):
    """Waits until the only run has so many steps."""
    for _ in range(600):
        if len([1 for path in tmp_path.glob("outputs/*/metrics.jsonl") for _ in path.open()]) > count:
            break
        time.sleep(0.1)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_killed_ends_the_others_in_a_line_that_names_it(small, number, tmp_path):
    vars(small).update(MAX_STEPS=4, SAVE_EVERY=1, TENSORBOARD=False)

    def work():
        stop_in_step(small, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        small.main([])

    codes, texts = run_processes(2, work, tmp_path)
    assert codes[number] == -signal.SIGKILL and codes[1 - number] == 2
    last = texts[1 - number].strip().splitlines()[-1]
    assert "error:" in last and "Traceback" not in texts[1 - number]
    assert f"process {number} did not come to" in last or "cannot be reached" in last
    (folder,) = (tmp_path / "outputs").iterdir()
    assert checkpoints.problem_of(checkpoints.newest(folder)) is None


def test_a_process_that_hangs_is_waited_for_and_then_named(small, tmp_path, monkeypatch):
    vars(small).update(MAX_STEPS=4, SAVE_EVERY=1, TENSORBOARD=False)
    monkeypatch.setattr(processes, "PATIENCE", datetime.timedelta(seconds=15))

    def work():
        stop_in_step(small, 1, lambda: time.sleep(1000))
        small.main([])

    first, second = start_processes(2, work, tmp_path)
    text = "".join(first.communicate(timeout=100))
    second.kill()
    last = text.strip().splitlines()[-1]
    assert first.returncode == 2 and "Traceback" not in text
    assert "error: step" in last and "process 1 did not come to" in last and "was last seen at" in last
    (folder,) = (tmp_path / "outputs").iterdir()
    assert checkpoints.problem_of(checkpoints.newest(folder)) is None


def test_all_processes_that_are_killed_leave_a_run_that_goes_on(small, tmp_path):
    vars(small).update(MAX_STEPS=40, SAVE_EVERY=1, EVAL_EVERY=0, TENSORBOARD=False)
    started = start_processes(2, lambda: small.main([]), tmp_path)
    wait_for_steps(tmp_path, 2)
    (folder,) = (tmp_path / "outputs").iterdir()
    while checkpoints.newest(folder) is None:
        time.sleep(0.1)
    for one in started:
        os.kill(one.pid, signal.SIGKILL)
        one.join()
    done = int(checkpoints.newest(folder).name.removeprefix("step-"))
    small.MAX_STEPS = done + 1
    codes, texts = run_processes(2, lambda: small.main(["--resume", str(folder)]), tmp_path)
    assert codes == [0, 0] and f"after step {done}" in texts[0], texts


def test_processes_that_were_not_started_alike_say_so(small, tmp_path):
    def work():
        small.main(["--learning-rate", "0.5"] if os.environ["RANK"] == "1" else [])

    codes, texts = run_processes(2, work, tmp_path)
    line = f"process 1 has LEARNING_RATE = 0.5, not {small.LEARNING_RATE!r}, unlike process 0; start all with the same"
    assert codes == [2, 2] and all(line in text and "Traceback" not in text for text in texts), texts
    assert not list((tmp_path / "outputs").iterdir())


def test_process_0_finds_the_latest_run_for_all(small, tmp_path):
    for second, name in enumerate(("gspo-1", "gspo-2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (second, second))

    def work():
        if os.environ["RANK"] == "1":
            resuming._latest = lambda *_: pytest.fail("process 1 looked for it")
        print(resuming._run_folder("latest", str(tmp_path), configs.HERE / "gspo.py"))
        time.sleep(1)  # process 0 holds the store

    codes, texts = run_processes(2, work, tmp_path)
    assert codes == [0, 0] and texts == [f"{tmp_path / 'gspo-2'}\n"] * 2, texts


def test_a_process_alone_that_resumes_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "TOGETHER", datetime.timedelta(seconds=3))

    def work():
        if os.environ["RANK"] == "0":
            processes.find()  # it holds the store
            time.sleep(8)
        else:
            small.main(["--resume", "latest"])

    (_, code), (_, text) = run_processes(2, work, tmp_path)
    assert code == 2 and "process 0 has not told the latest run; start all processes with the same flags" in text


def test_a_stop_keeps_its_checkpoint_if_the_store_has_gone(small, tmp_path):
    vars(small).update(MAX_STEPS=40, SAVE_EVERY=0, EVAL_EVERY=0, TENSORBOARD=False)

    def work():
        def stop():
            processes.Meetings.places = mock.Mock(set=mock.Mock(side_effect=RuntimeError("gone"))), 0, 2
            os.kill(os.getpid(), signal.SIGTERM)

        stop_in_step(small, 0, stop)
        small.main([])

    codes, texts = run_processes(2, work, tmp_path)
    assert codes[0] == 143 and "Stopped by SIGTERM: the state after step 2" in texts[0], texts


def test_a_folder_that_a_machine_does_not_see_is_a_warning(small, tmp_path):
    vars(small).update(MAX_STEPS=1, TENSORBOARD=False, OUTPUT_DIR="outputs")

    def work():
        here = tmp_path / f"machine-{os.environ['RANK']}"
        here.mkdir()
        os.chdir(here)
        small.main([])

    codes, texts = run_processes(2, work, tmp_path)
    assert codes == [0, 0], texts
    assert "is not there for process 1, so the run cannot be resumed; give an --output-dir that all" in texts[0]


def test_a_signal_to_all_ends_them_with_one_checkpoint(small, tmp_path):
    """Even if it comes twice, as from Slurm and from torchrun."""
    vars(small).update(MAX_STEPS=40, SAVE_EVERY=0, EVAL_EVERY=0, TENSORBOARD=False)
    started = start_processes(2, lambda: small.main([]), tmp_path)
    wait_for_steps(tmp_path, 2)
    for _ in range(2):
        for one in started:
            os.kill(one.pid, signal.SIGTERM)
        time.sleep(0.05)
    texts = ["".join(one.communicate(timeout=60)) for one in started]
    assert [one.returncode for one in started] == [143, 143], texts
    (folder,) = (tmp_path / "outputs").iterdir()
    assert len(list(folder.glob("checkpoints/step-*/checkpoint.json"))) == 1


def test_a_run_goes_on_with_another_number_of_processes(small, tmp_path):
    vars(small).update(MAX_STEPS=4, LR_SCHEDULE="constant", LEARNING_RATE=1e-4, EVAL_EVERY=3, SAVE_EVERY=1)
    work = functools.partial(train_and_save, small, tmp_path)
    work()
    expected, weights = of(tmp_path, "alone")
    (alone,) = (tmp_path / "outputs").iterdir()
    for count, steps in ((2, 2), (1, 3), (3, 4)):
        small.MAX_STEPS = steps
        codes, texts = run_processes(count, work, tmp_path)
        assert codes == [0] * count, texts
        (folder,) = set((tmp_path / "outputs").iterdir()) - {alone}
        small.RESUME = str(folder)
    rows, found = of(tmp_path, 0)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for name in ("reward", "completion_tokens", "kl_divergence"):
        assert [row.get(name) for row in rows] == [close(row.get(name)) for row in expected], name
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-4) for name, value in weights.items())


def test_memory_that_runs_out_in_one_process_alone_changes_nothing(small, tmp_path):
    vars(small).update(MAX_STEPS=2, SAVE_EVERY=0, TENSORBOARD=False)
    work = functools.partial(train_and_save, small, tmp_path)
    work()

    def little():
        completion_logps = small.completion_logps

        def in_memory(model, rollouts, **k):
            if os.environ["RANK"] == "1" and len(rollouts.texts) > 2:
                raise torch.OutOfMemoryError("no room")
            return completion_logps(model, rollouts, **k)

        small.completion_logps = in_memory
        work()

    codes, texts = run_processes(2, little, tmp_path)
    assert codes == [0, 0], texts
    (_, weights), (_, found) = of(tmp_path, "alone"), of(tmp_path, 1)
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-5) for name, value in weights.items())


def test_what_cannot_be_shared_out_is_one_line(small, tmp_path):
    def work():
        small.main(["--batch-size", "1"])

    codes, texts = run_processes(2, work, tmp_path)
    assert codes == [2, 2] and "2 processes have no prompt each; raise --batch-size" in texts[0]


# ---- Sharded weights


def train_sharded(script, folder):
    """Trains, and saves the metrics, and which share of the policy's numbers this process had."""
    with configs.one_line_errors():
        trainer = trainer_of(script)
        numbers = [
            value.to_local().numel() if sharding.is_sharded(trainer.policy) else value.numel()
            for value in trainer.trained
        ]
        share = sum(numbers) / sum(value.numel() for value in trainer.trained)
        trainer.train()
    rank = os.environ.get("RANK", "alone")
    (folder / f"metrics-{rank}.json").write_text(json.dumps(trainer.metrics_history))
    (folder / f"share-{rank}").write_text(str(share))


def finals(folder):
    """Returns the weights of final/, and of final-critic/ if there is one."""
    files = sorted(folder.glob("final*/model.safetensors"))
    assert files
    return {f"{path.parent.name} {name}": value for path in files for name, value in load_file(path).items()}


def run_folders(tmp_path):
    return sorted((tmp_path / "outputs").iterdir(), key=lambda path: path.stat().st_ctime)


def assert_sharded_like_one(script, tmp_path, count=2, on_one_machine=None, **constants):
    """Trains in one process and in several that share the weights out, and compares metrics and weights."""
    shrink(script, tmp_path)
    vars(script).update({"MAX_STEPS": 5, "LEARNING_RATE": 1e-4, "EVAL_EVERY": 2, "SAVE_EVERY": 2, "TENSORBOARD": False})
    vars(script).update(constants)
    work = functools.partial(train_sharded, script, tmp_path)
    work()
    (alone,) = run_folders(tmp_path)
    script.SHARD = True
    codes, texts = run_processes(count, work, tmp_path, on_one_machine)
    assert codes == [0] * count, texts
    assert not any(texts[1:]), texts[1:]
    (sharded,) = set(run_folders(tmp_path)) - {alone}
    of_several, of_one = finals(sharded), finals(alone)
    assert of_several.keys() == of_one.keys()
    for name, value in of_one.items():
        torch.testing.assert_close(of_several[name], value, rtol=0, atol=1e-5)
    assert json.loads((sharded / "final/config.json").read_text()) == json.loads(
        (alone / "final/config.json").read_text()
    )
    rows, expected = ([json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (sharded, alone))
    own = ("seconds", "tokens_per", "peak_memory")
    for row, right in zip(rows, expected, strict=True):
        assert row.keys() == right.keys()
        for name, value in right.items():
            assert name.startswith(own) or row[name] == close(value), (row["step"], name)
    shares = [float((tmp_path / f"share-{rank}").read_text()) for rank in range(count)]
    copies = count // (on_one_machine or count)
    assert sum(shares) == pytest.approx(copies) and max(shares) < 1.2 * copies / count


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_sharded_weights_train_as_whole_ones_do(script, tmp_path):
    assert_sharded_like_one(script, tmp_path)


SHARDED = {
    "two machines": {"count": 4, "on_one_machine": 2},
    "three processes": {"count": 3, "MICRO_BATCH_TOKENS": 60},
    "no kl": {"KL_COEF": 0.0, "ENTROPY_COEF": 0.0, "REWARDS": "exact_match", "MINI_BATCHES": 4, "BATCH_SIZE": 2},
    "replay": {"POLICY_MODEL": "data/models/arithmetic-moe", "ROUTING_REPLAY": "r3", "ROUTER_AUX_COEF": 0.01},
    "recorded": {**KINDS["recorded"], "GRADIENT_CHECKPOINTING": True},
}


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)
def test_sharded_weights_train_as_whole_ones_do_in_other_ways(script, kind, tmp_path):
    """Among them processes with fewer passes than others, which take part in theirs."""
    assert_sharded_like_one(script, tmp_path, **SHARDED[kind])


def save_gradients(script, folder):
    """Takes a step whose updates keep the weights, and saves the gradient of each of them."""
    with configs.one_line_errors():
        trainer, found = trainer_of(script), []
        script.set_up_process(trainer.policy_device)
        models = {"policy": trainer.policy} | {name: one.model for name, one in trainer.beside.items()}
        optimizers = [trainer.optimizer, *(one.optimizer for one in trainer.beside.values())]

        def keep(model):
            gradients = {name: sharding.whole(weight.grad).clone() for name, weight in model.named_parameters()}
            found.append(gradients)

        for model, optimizer in zip(models.values(), optimizers, strict=True):
            optimizer.step = functools.partial(keep, model)
        trainer.train_step(1)
        processes.end()
    torch.save(found, folder / f"gradients-{os.environ.get('RANK', 'alone')}.pt")


@over_variants
def test_gradients_are_those_of_one_process(script, constants, tmp_path):
    """Of all updates of a step on completions of unequal lengths, with whole and with sharded weights."""
    shrink(script, tmp_path)
    vars(script).update(constants | {"MAX_GRAD_NORM": 1e9})
    work = functools.partial(save_gradients, script, tmp_path)
    work()
    expected = torch.load(tmp_path / "gradients-alone.pt")
    for count, script.SHARD in ((2, False), (4, False), (2, True)):
        codes, texts = run_processes(count, work, tmp_path)
        assert codes == [0] * count, texts
        for rank in range(count):
            found = torch.load(tmp_path / f"gradients-{rank}.pt")
            for gradients, right in zip(found, expected, strict=True):
                difference = torch.cat([(gradients[name] - value).flatten() for name, value in right.items()])
                size = torch.cat([value.flatten() for value in right.values()]).norm()
                assert gradients.keys() == right.keys()
                assert difference.abs().max() < 1e-6 and difference.norm() < 3e-6 * size, (count, script.SHARD, rank)


def train_in_processes(script, tmp_path, count, steps, resume="", shard=True):
    """Trains to a step, from the start or from where a run's folder has come to, and returns the run's folder."""
    vars(script).update(MAX_STEPS=steps, RESUME=str(resume), SHARD=shard and count > 1)
    codes, texts = run_processes(count, functools.partial(train_sharded, script, tmp_path), tmp_path)
    assert codes == [0] * count, texts
    return max((tmp_path / "outputs").iterdir(), key=lambda path: (path / "metrics.jsonl").stat().st_mtime)


@pytest.mark.parametrize("script", SCRIPTS[:1] + SCRIPTS[-1:], ids=lambda script: script.__name__)
def test_a_sharded_run_goes_on_to_the_bit_and_with_another_number_of_processes(script, tmp_path):
    shrink(script, tmp_path)
    vars(script).update(LR_SCHEDULE="constant", LEARNING_RATE=1e-4, EVAL_EVERY=0, SAVE_EVERY=2, TENSORBOARD=False)
    if script.__name__ == "vapo":
        vars(script).update(VALUE_PRETRAIN_STEPS=1, CRITIC_LR_SCHEDULE="constant", CRITIC_LEARNING_RATE=1e-4)
    whole = train_in_processes(script, tmp_path, 2, 4)
    begun = train_in_processes(script, tmp_path, 2, 2)
    shutil.copytree(begun, tmp_path / "copy")
    resumed = train_in_processes(script, tmp_path, 2, 4, begun)
    assert resumed == begun
    expected = finals(whole)
    for name, value in finals(resumed).items():
        assert torch.equal(value, expected[name]), name
    other = train_in_processes(script, tmp_path, 1, 3, tmp_path / "copy")
    other = train_in_processes(script, tmp_path, 3, 4, other)
    for name, value in finals(other).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def test_a_run_goes_on_to_the_bit_with_as_many_processes(small, tmp_path):
    vars(small).update(LR_SCHEDULE="constant", LEARNING_RATE=1e-4, EVAL_EVERY=0, SAVE_EVERY=2, TENSORBOARD=False)
    whole = train_in_processes(small, tmp_path, 2, 4, shard=False)
    begun = train_in_processes(small, tmp_path, 2, 2, shard=False)
    assert train_in_processes(small, tmp_path, 2, 4, begun, shard=False) == begun
    expected = finals(whole)
    assert all(torch.equal(value, expected[name]) for name, value in finals(begun).items())


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_rest_weights_stay_and_ratios_are_one(small, dtype, shard, tmp_path):
    vars(small).update(MAX_STEPS=10, LEARNING_RATE=1e-30, COMPUTE_DTYPE=dtype, SAVE_EVERY=0, TENSORBOARD=False)
    folder = train_in_processes(small, tmp_path, 2, 10, shard=shard)
    before = load_file(configs.HERE / small.POLICY_MODEL / "model.safetensors")
    after = load_file(folder / "final/model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()][1:]
    for row in rows:
        assert row["ratio_min"] == pytest.approx(1, abs=1e-5) and row["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["sampler_gap"] < (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("shard", [False, True])
def test_a_signal_to_one_process_stops_all_after_the_step(small, shard, tmp_path, monkeypatch):
    """The others get it too, but late, while the checkpoint is written."""
    vars(small).update(MAX_STEPS=40, SAVE_EVERY=0, EVAL_EVERY=0, TENSORBOARD=False, SHARD=shard)
    checkpoint = run.Run.checkpoint

    def late(self):
        for one in (os.getpid(), int((tmp_path / "pid-1").read_text())):
            os.kill(one, signal.SIGTERM)
        return checkpoint(self)

    monkeypatch.setattr(run.Run, "checkpoint", late)

    def work():
        (tmp_path / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        small.main([])

    started = start_processes(2, work, tmp_path)
    wait_for_steps(tmp_path, 2)
    os.kill(started[1].pid, signal.SIGTERM)
    texts = ["".join(one.communicate(timeout=60)) for one in started]
    assert [one.returncode for one in started] == [143, 143], texts
    (folder,) = (tmp_path / "outputs").iterdir()
    (path,) = folder.glob("checkpoints/step-*/checkpoint.json")
    logged = len((folder / "metrics.jsonl").read_text().splitlines()) - 1
    assert path.parent.name in (f"step-{logged}", f"step-{logged + 1}")  # a step may be trained and not yet logged
    assert not checkpoints.problem_of(path.parent)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_of_a_sharded_run_that_is_killed_ends_the_others_in_a_line_that_names_it(small, number, tmp_path):
    vars(small).update(MAX_STEPS=4, SAVE_EVERY=1, TENSORBOARD=False, SHARD=True)

    def work():
        in_update = "compute_gradient" if number else "add_scores"
        stop_in_step(small, number, lambda: os.kill(os.getpid(), signal.SIGKILL), in_update)
        small.main([])

    codes, texts = run_processes(2, work, tmp_path)
    assert codes[number] == -signal.SIGKILL and codes[1 - number] == 2, texts
    last = texts[1 - number].strip().splitlines()[-1]
    assert "error:" in last and "Traceback" not in texts[1 - number], texts
    assert f"process {number} did not come to" in last or "cannot be reached" in last
    (folder,) = (tmp_path / "outputs").iterdir()
    assert checkpoints.problem_of(checkpoints.newest(folder)) is None


def torchrun(script, tmp_path, **environment):
    """Starts two processes of a script with small steps under torchrun, which print to tmp_path / "printed"."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    flags = ["--max-steps", "40", "--save-every", "1", "--eval-size", "4", "--batch-size", "4", "--group-size", "4"]
    flags += ["--output-dir", str(tmp_path / "outputs")]
    with open(tmp_path / "printed", "w") as printed:
        settings = {"cwd": configs.HERE, "env": os.environ | environment, "stdout": printed, "stderr": printed}
        return subprocess.Popen([*command, *flags], **settings)


def assert_it_goes_on(tmp_path):
    """Resumes the only run for a step, in one process."""
    (folder,) = (tmp_path / "outputs").iterdir()
    done = int(checkpoints.newest(folder).name.removeprefix("step-"))
    resumed = [sys.executable, "gspo.py", "--resume", str(folder), "--max-steps", str(done + 1)]
    assert subprocess.run(resumed, cwd=configs.HERE, capture_output=True).returncode == 0


def test_a_run_outlives_the_end_of_torchrun_itself(tmp_path):
    """Its processes end soon, in a line, and the run goes on from its newest checkpoint."""
    parent = torchrun("gspo.py", tmp_path)
    wait_for_steps(tmp_path, 2)
    processes_of_run = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(processes_of_run, timeout=60)
    assert not alive
    assert "cannot be reached" in (tmp_path / "printed").read_text()
    assert_it_goes_on(tmp_path)


def test_a_signal_to_torchrun_stops_the_run_with_a_checkpoint(tmp_path):
    parent = torchrun("gspo.py", tmp_path)
    wait_for_steps(tmp_path, 2)
    parent.terminate()
    parent.wait(60)
    printed = (tmp_path / "printed").read_text()
    assert printed.count("SIGTERM: stopping") == 1 and printed.count("Stopped by SIGTERM: the state after step") == 1
    assert_it_goes_on(tmp_path)


def test_a_mistake_in_a_script_is_shown_once(tmp_path):
    text = (configs.HERE / "gspo.py").read_text()
    line = "def compute_kl(logps, ref_logps):\n"
    assert text.count(line) == 1
    (tmp_path / "gspo.py").write_text(text.replace(line, line + "    raise ValueError('a mistake')\n"))
    assert torchrun(tmp_path / "gspo.py", tmp_path, PYTHONPATH=str(configs.HERE)).wait(120) == 1
    printed = (tmp_path / "printed").read_text()
    assert printed.count("ValueError: a mistake") == 1, printed


@pytest.mark.skipif(shutil.which("ip") is None, reason="no command ip")
def test_two_hosts_with_addresses_of_their_own_train_together(tmp_path):
    flags = ["--max-steps", "1", "--eval-size", "4", "--batch-size", "4", "--output-dir", str(tmp_path)]
    command = ["benchmarks/two_hosts.sh", "gspo.py", *flags]
    result = subprocess.run(command, cwd=configs.HERE, env=os.environ | {"PYTHON": sys.executable}, capture_output=True)
    if result.returncode == 77:
        pytest.skip("no right to make network namespaces")
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = tmp_path.glob("gspo-*")
    assert (folder / "final/model.safetensors").is_file()
