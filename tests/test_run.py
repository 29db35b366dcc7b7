"""Whole runs at a small size: the files that they write, the rows that they learn from, and those left out."""

import itertools
import json
import math
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from conftest import SCRIPTS, keep_weights, trainer_of
from variants import naive_loss, naive_mean

import configs
import gspo
import plotting
from bookkeeping import checkpoints, progress
from bookkeeping import folder as run_folders
from bookkeeping.run import Run, Trainer
from engine import batch, memory
from inputs import load

METRICS = (
    "step policy_loss entropy_loss kl_loss reward relative_advantage kl_divergence kl_coef avg_response_length "
    "reward_std entropy clip_fraction ratio_mean ratio_min ratio_max grad_norm dead_groups truncated sampler_gap "
    "learning_rate completion_tokens tokens_per_second seconds_rollout seconds_reward seconds_logps "
    "seconds_update seconds_log peak_memory_gb"
).split()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith("seconds_") and k != "tokens_per_second"} for row in rows]


@pytest.mark.drawn
def test_a_run_writes_every_file_moves_every_parameter_and_reports(small_script, capsys):
    script, algorithm = small_script, small_script.__name__
    script.SAVE_EVERY, script.EVAL_EVERY = 1, 1
    trainer = trainer_of(script)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    history = trainer.train()
    for name, parameter in trainer.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} did not move"

    folder = trainer.run.folder
    assert folder.parent.name == "outputs" and folder.name.startswith(f"{algorithm}-")
    assert (folder / f"{algorithm}.py").read_text() == (configs.HERE / f"{algorithm}.py").read_text()
    assert (folder / "rewards.py").read_text() == (configs.HERE / "rewards.py").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert config["constants"]["GROUP_SIZE"] == 4 and config["constants"]["OUTPUT_DIR"] == script.OUTPUT_DIR
    assert {"git_commit", "versions", "hardware", "command"} <= config.keys()
    assert read_jsonl(folder / "metrics.jsonl") == history
    assert_metrics(trainer, history)
    assert_samples(read_jsonl(folder / "samples.jsonl"), hasattr(script, "compute_relative_advantages"))
    for name in ("checkpoints/step-1", "checkpoints/step-2", "final"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        inputs = tokenizer(["47+85="], return_tensors="pt")
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs.input_ids.shape[1]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(trainer.policy.named_parameters())[name])
    assert (folder / "metrics.png").stat().st_size > 10_000 and "</html>" in (folder / "samples.html").read_text()
    assert not list(folder.rglob("*.part*"))
    assert_summary(capsys.readouterr().out, history, folder)


def assert_metrics(trainer, rows):
    assert [row["step"] for row in rows] == [0, 1, 2]
    evaluated = {f"{name}{end}" for name in ("eval_accuracy", "eval_pass_at_k") for end in ("", "_low", "_high")}
    assert set(rows[0]) == {"step", "eval_accuracy_greedy"} | evaluated
    for row in rows[1:]:
        assert set(METRICS) <= set(row) and {"eval_accuracy", "eval_accuracy_greedy"} <= set(row)
        unknown = {name for name in METRICS if row[name] is None}
        assert unknown == {"peak_memory_gb"} | ({"kl_divergence"} if trainer.reference is None else set())
        assert all(math.isfinite(row[name]) for name in set(METRICS) - unknown)
        assert row["sampler_gap"] < 1e-4
        assert row["ratio_min"] <= row["ratio_mean"] <= row["ratio_max"]
        assert (row["entropy_loss"] < 0) == (trainer.constants.ENTROPY_COEF > 0)
    if trainer.reference is not None:
        assert all(row["kl_divergence"] > 0 and row["kl_coef"] > 0 for row in rows[1:])


def assert_samples(samples, relative):
    assert len(samples) == 2 * 2 * 4
    assert {"step", "prompt", "completion", "reward", "advantage", "answer"} <= set(samples[0])
    assert all(len(row["token_texts"]) == len(row["logp_change"]) == row["tokens"] for row in samples)
    assert any(change for row in samples for change in row["logp_change"])
    assert len({sample["prompt"] for sample in samples[:4]}) == 1
    assert not relative or sum(sample["advantage"] for sample in samples[:4]) == pytest.approx(0, abs=1e-5)


def assert_summary(out, rows, folder):
    assert f"{rows[0]['eval_accuracy']:.3f} before, {rows[2]['eval_accuracy']:.3f} after" in out
    assert str(folder / "metrics.png") in out and out.count("    before ") == out.count("    after ") == 3
    parts = ("rollout", "reward", "logps", "update", "log")
    seconds = [sum(row[f"seconds_{part}"] for row in rows[1:]) for part in parts]
    shares = re.search(" s in 2 steps: " + ", ".join(rf"{part} (\d+)%" for part in parts), out).groups()
    assert [float(share) for share in shares] == pytest.approx([100 * s / sum(seconds) for s in seconds], abs=0.5)


def test_a_group_sampled_in_parts_for_lack_of_memory_has_the_same_completions(small, monkeypatch):
    trainer, sizes = small.GSPOTrainer(), []
    expected = trainer.generate_responses_with_group_sampling(1)
    go_on = batch.Batch.go_on
    monkeypatch.setattr(batch.Batch, "go_on", lambda self, *a: (sizes.append(len(self.place)), go_on(self, *a))[1])
    steps = []
    for trainer.sampler.at_once in (1, 3, 12):
        sizes.clear()
        found = trainer.generate_responses_with_group_sampling(1)
        assert max(sizes) == trainer.sampler.at_once
        assert found.texts == expected.texts and found.prompts == expected.prompts
        steps.append(len(sizes))
    lengths = expected.completion_lengths
    assert steps[0] == int(lengths.sum()) - 16  # one after the other; the last token need not go through
    assert steps[1] < sum(int(some.max()) for some in lengths.split(3))  # who waits enters before the slowest has ended


def test_as_many_are_sampled_at_once_as_free_memory_has_room_for(small, monkeypatch):
    trainer, sizes = small.GSPOTrainer(), []
    rows = trainer.train_rows[:4]
    tokens = max(len(row["prompt_ids"]) for row in rows) + small.MAX_COMPLETION_TOKENS
    made = sum(layer.self_attn.k_proj.out_features * 2 for layer in trainer.policy.model.layers)
    of_one = 4 * made * tokens + 16 * trainer.policy.config.vocab_size  # keys and values, and logits
    monkeypatch.setattr(trainer.sampler, "sample_in_turn", lambda *arguments: sizes.append(arguments[-1]))
    for room, at_once in ((17, 16), (15, 8), (7, 4), (0.1, 1)):
        monkeypatch.setattr(memory, "free_memory", lambda device, room=room: room * of_one / 0.9)
        trainer.sample(rows, 4, ("test",))
        assert sizes.pop() == at_once and not sizes


def test_scores_of_evaluations_do_not_pile_up(small):
    trainer = small.GSPOTrainer()
    for _ in range(2):
        trainer.evaluate()
    assert trainer.eval_reward.scored == {"exact_match": []} and trainer.eval_reward.failures == []


def clock_that_moves_with_work():
    """Returns [seconds], and timed(seconds, function): the function, which moves the clock by so many seconds."""
    now = [0.0]

    def timed(seconds, work):
        def working(*arguments, **options):
            now[0] += seconds
            return work(*arguments, **options)

        return working

    return now, timed


def test_each_phase_is_timed_where_its_work_is_done_and_nothing_is_left_out(small, monkeypatch):
    """The clock moves only with the work. A pass for reference, sampler_gap or samples.jsonl takes 4 s."""
    trainer, (now, timed) = small.GSPOTrainer(), clock_that_moves_with_work()
    for name, seconds in {"sample": 1, "compute_rewards": 2, "compute_log_probs": 4, "update": 8}.items():
        monkeypatch.setattr(trainer, name, timed(seconds, getattr(trainer, name)))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    metrics = trainer.train_step(1)
    phases = ("rollout", "reward", "logps", "update", "log")
    assert [metrics[f"seconds_{phase}"] for phase in phases] == [1, 2, 4 + 4, 8 * small.MINI_BATCHES, 4]
    assert metrics["tokens_per_second"] == metrics["completion_tokens"] / now[0]


def test_the_summary_says_where_a_runs_wall_time_went_also_before_it_was_resumed(small, monkeypatch, capsys):
    """The clock moves only with the work: sampling takes 1 s, writing a folder 3 s, and a picture 5 s."""
    now, timed = clock_that_moves_with_work()
    monkeypatch.setattr(small.GSPOTrainer, "sample", timed(1, small.GSPOTrainer.sample))
    monkeypatch.setattr(checkpoints, "write_folder", timed(3, checkpoints.write_folder))
    monkeypatch.setattr(plotting, "draw_run", timed(5, lambda folder: None))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for small.MAX_STEPS, seconds in (
        (1, {"start": 3, "steps": 1, "evaluation": 2 * 2, "saving": 2 * 3, "pictures": 5}),
        (2, {"start": 2 * 3, "steps": 2, "evaluation": 3 * 2, "saving": 2 * 3, "pictures": 5}),  # from a checkpoint
    ):
        trainer = small.GSPOTrainer()
        trainer.train()
        shares = ", ".join(f"{part} {spent / sum(seconds.values()):.0%}" for part, spent in seconds.items())
        assert f"Time:    {sum(seconds.values())} s after loading: {shares}\n" in capsys.readouterr().out
        small.RESUME = str(trainer.run.folder)


def test_the_same_seed_writes_the_same_metrics_and_another_does_not(small_script):
    small_script.MAX_STEPS, runs = 3, []
    for seed in (0, 0, 1):
        small_script.SEED = seed
        trainer = trainer_of(small_script)
        trainer.train()
        runs.append(timeless(read_jsonl(trainer.run.folder / "metrics.jsonl")))
    assert runs[0] == runs[1] != runs[2]


@pytest.fixture
def trainer_with_rollouts(small_script):
    """Returns a trainer off its starting point, with a reference model, and the rollouts that an update needs."""
    small_script.KL_COEF, small_script.MAX_GRAD_NORM = 0.7, 1e9
    trainer = trainer_of(small_script)
    keep_weights(trainer)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rollouts.old_logps = rollouts.sampled_logps + 0.05
    rollouts.ref_logps = trainer.compute_ref_logps(rollouts) - 0.1
    rollouts.advantages = torch.randn(len(rollouts.texts), generator=torch.Generator().manual_seed(0))
    return small_script, trainer, rollouts


SETTINGS = {"gspo": ("RATIO_LEVEL", "token"), "grpo": ("LOSS_AGGREGATION", "constant")}
SETTINGS["dapo"] = ("LOSS_AGGREGATION", "sequence_mean")


@pytest.mark.parametrize("as_shipped", [True, False])
def test_how_a_batch_is_split_cannot_change_loss_or_gradient(trainer_with_rollouts, as_shipped):
    script, trainer, batch = trainer_with_rollouts
    if not as_shipped:
        setattr(script, *SETTINGS.get(script.__name__, ("SEED", 0)))
    results = []
    for budget in (100_000, 200, 1):
        script.MICRO_BATCH_TOKENS = budget
        stats = trainer.update(batch)
        results.append((stats, trainer.gradients))
    for stats, grad in results[1:]:
        torch.testing.assert_close(grad, results[0][1], rtol=1e-3, atol=1e-6)
        for name in stats:
            torch.testing.assert_close(stats[name], results[0][0][name], rtol=1e-4, atol=1e-6)


def test_an_update_takes_the_gradient_of_the_documented_loss(trainer_with_rollouts):
    """loss = −J + kl_coef · mean k3 − ENTROPY_COEF · mean entropy, computed here from whole logits, row by row."""
    script, trainer, rollouts = trainer_with_rollouts
    old_logps, ref_logps, advantages = rollouts.old_logps, rollouts.ref_logps, rollouts.advantages
    script.ENTROPY_COEF, trainer.kl_coef, script.KL_IN_REWARD = 0.3, 0.7, False  # the last is ppo.py's
    stats = trainer.update(rollouts)
    logps, k3, entropy = torch.zeros(rollouts.completion_mask.shape), [], []
    for i in range(len(rollouts.texts)):
        start, end = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
        ids, n = rollouts.input_ids[i : i + 1, :end], end - start
        log_probs = trainer.policy(ids).logits[0, start - 1 : end - 1].log_softmax(-1)
        logps[i, :n] = log_probs.gather(1, ids[0, start:, None])[:, 0]
        difference = ref_logps[i, :n] - logps[i, :n]
        k3.append(list(difference.exp() - difference - 1))
        entropy.append(list(-(log_probs.exp() * log_probs).sum(-1)))
    total = {"policy_loss": naive_loss(script, logps, old_logps, advantages, rollouts.completion_mask)[0]}
    if "kl_loss" in stats:  # else a KL is in the rewards alone
        total["kl_loss"] = 0.7 * naive_mean(script, k3)
    total["entropy_loss"] = -0.3 * naive_mean(script, entropy)
    trainer.policy.zero_grad()
    sum(total.values()).backward()
    for name, parameter in trainer.policy.named_parameters():
        torch.testing.assert_close(trainer.gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    for name, value in total.items():
        torch.testing.assert_close(stats[name], value.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.drawn
def test_without_a_kl_term_no_reference_model_is_loaded_and_without_entropy_none_is_computed(
    small_script, monkeypatch, capsys
):
    small, loaded, asked = small_script, [], []
    load_model, completion_logps = load.load_model, small.completion_logps
    monkeypatch.setattr(load, "load_model", lambda *a, **k: (loaded.append(a[2]), load_model(*a, **k))[1])
    monkeypatch.setattr(
        small,
        "completion_logps",
        lambda *a, **k: (asked.append(k.get("with_entropy", False)), completion_logps(*a, **k))[1],
    )
    small.KL_COEF, small.ADAPTIVE_KL, small.ENTROPY_COEF, small.REWARDS = 0.0, True, 0.0, "exact_match"
    trainer = trainer_of(small)
    history = trainer.train()
    assert loaded == ["POLICY_MODEL"] and trainer.reference is None and not any(asked)
    assert [row["kl_coef"] for row in history[1:]] == [0.0, 0.0]  # there is nothing to adapt
    assert f", length {history[1]['avg_response_length']:.0f}, clipped " in (out := capsys.readouterr().out)
    assert "KL" not in out
    assert history[1]["kl_divergence"] is None and history[1]["kl_loss"] == history[1]["entropy_loss"] == 0
    figure = plotting.plot_metrics(plotting.load_metrics(trainer.run.folder)[0], small.PANELS)
    assert len(set(titles(figure)[:8])) == 8 and all(axis.lines for axis in figure.axes[:8])  # none is empty


def test_rewards_are_the_weighted_sum_and_the_reward_model_sees_prompt_and_completion(small):
    small.REWARDS = "reward_model 2, exact_match 0.5"
    trainer = small.GSPOTrainer()
    rollouts = trainer.generate_responses_with_group_sampling(1)
    for i, reward in enumerate(trainer.compute_rewards(rollouts).tolist()):
        row, text = rollouts.prompts[i], rollouts.texts[i]
        alone = trainer.rewards.reward_model.tokenizer([row["prompt"] + text], return_tensors="pt")
        with torch.no_grad():
            score = trainer.rewards.reward_model.model(alone.input_ids).logits.item()
        right = float(text.rpartition("#")[2] == row["answer"])
        assert reward == pytest.approx(2 * score + 0.5 * right, abs=1e-4)


@pytest.mark.parametrize("at_once", [4, 8, 9])
def test_sampling_in_parts_samples_the_same(small_script, at_once):
    script = small_script
    trainer = trainer_of(script)
    rows = script.prompts_of_step(trainer.train_rows, 1, script.BATCH_SIZE, script.generator_of)
    whole = trainer.sample(rows, 4, ("rollout", 1))
    script.SAMPLED_AT_ONCE = at_once
    parts = trainer.sample(rows, 4, ("rollout", 1))
    assert parts.texts == whole.texts and parts.prompts == whole.prompts
    assert torch.equal(parts.input_ids, whole.input_ids) and torch.equal(parts.completion_mask, whole.completion_mask)
    torch.testing.assert_close(parts.sampled_logps, whole.sampled_logps, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_and_decays(small):
    small.MAX_STEPS, small.WARMUP_STEPS, small.LEARNING_RATE = 10, 4, 1.0
    rates = {}
    for schedule in ("constant", "linear", "cosine"):
        small.LR_SCHEDULE = schedule
        rates[schedule] = [gspo.learning_rate_at(step, configs.snapshot(vars(gspo))) for step in range(1, 11)]
        assert rates[schedule][:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates["constant"][5:] == [1.0] * 5
    assert rates["linear"][5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates["cosine"][7] == pytest.approx(0.5) and 0 < rates["cosine"][9] < 0.1


def test_a_script_run_through_a_link_says_the_commit_of_the_file_that_it_leads_to(small, tmp_path, monkeypatch):
    (tmp_path / "train.py").symlink_to(configs.HERE / "gspo.py")
    monkeypatch.setitem(vars(gspo), "__file__", str(tmp_path / "train.py"))
    monkeypatch.setattr(run_folders, "describe_machine", lambda repository: {"repository": str(repository)})
    small.MAX_STEPS, small.SAVE_EVERY = 1, 0
    trainer = small.GSPOTrainer()
    trainer.train()
    assert json.loads((trainer.run.folder / "config.json").read_text())["repository"] == str(configs.HERE)
    assert trainer.run.folder.name.startswith("train-") and (trainer.run.folder / "train.py").is_file()


def test_a_run_uses_a_trainer_exactly_as_the_protocol_declares(small):
    declared = {name for name in {**vars(Trainer), **Trainer.__annotations__} if not name.startswith("_")}
    used = set()

    class Watched:
        def __init__(self, trainer):
            vars(self)["trainer"] = trainer

        def __getattr__(self, name):
            used.add(name)
            return getattr(self.trainer, name)

        def __setattr__(self, name, value):
            used.add(name)
            setattr(self.trainer, name, value)

    for small.MAX_STEPS in (1, 2):  # the second run resumes the first
        trainer = small.GSPOTrainer()
        with Run(Watched(trainer)) as run:
            for step in run.steps():
                metrics = run.unfinished or trainer.train_step(step)
                run.keep(step, metrics)
                if run.evaluation_is_due(step):
                    metrics |= trainer.evaluate()
                run.finish_step(step, metrics)
        small.RESUME = str(run.folder)
    assert used - {*trainer.kept} == declared - {"skipped"}  # which is for updates that are not finite


def test_constants_that_cannot_work_are_warned_about(small, capsys, monkeypatch):
    small.GSPO_EPOCHS = small.MINI_BATCHES = 1
    small.TOP_P = 0.9
    small.GSPOTrainer().train()
    out = capsys.readouterr().out
    assert "one update per rollout" in out and "TOP_P = 0.9" in out
    small.MINI_BATCHES, small.TOP_P, small.CLIP_LOW, small.CLIP_HIGH, small.LEARNING_RATE = 2, 1.0, 0.9, 9.0, 1e-5
    small.GSPOTrainer().train()
    captured = capsys.readouterr()
    assert "one update per rollout" not in captured.out
    assert "the clip never acted" not in captured.out + captured.err  # in two steps it need not
    monkeypatch.setattr(progress, "IDLE_STEPS", 2)
    small.GSPOTrainer().train()
    captured = capsys.readouterr()
    assert "in 2 steps the ratio" in captured.out + captured.err and "the clip never acted" in captured.out
    assert progress.idle_clip([{"clip_fraction": 0.1, "updates": 2}]) is None


def test_a_learning_rate_far_above_what_the_policys_size_wants_is_warned_about(small, capsys):
    constants = configs.snapshot(vars(gspo))
    for thousands, rate, lora_rank, warned in (
        (300, 1e-3, 0, ""),  # the embedded policy
        (135_000, 1e-3, 0, "is far too high"),
        (135_000, 1e-5, 0, ""),
        (135_000, 1e-5, 16, "adapters hardly learn at it"),  # --preset smollm2 --lora-rank 16
        (135_000, 1e-4, 16, ""),
        (135_000, 1e-3, 16, ""),
        (600_000, 1e-4, 0, "is far too high"),
        (600_000, 1e-6, 0, ""),
        (70_000_000, 2e-6, 0, ""),
    ):
        vars(constants).update(LEARNING_RATE=rate, LORA_RANK=lora_rank)
        progress.warn_about_learning_rate(constants, torch.nn.Linear(thousands, 1000, bias=False, device="meta"))
        out = capsys.readouterr().out
        assert warned in out and out.count("\n") == bool(warned)
    small.LEARNING_RATE, small.MAX_STEPS = 0.5, 1
    small.GSPOTrainer().train()
    assert "LEARNING_RATE = 0.5 is far too high for 0.3 M weights" in capsys.readouterr().out


def test_an_accuracy_that_falls_below_half_of_the_best_is_said_once_unless_it_may_be_chance(small, capsys, monkeypatch):
    accuracies = [0.2, 0.5, 0.15, 0.1, 0.4, 0.1]

    def evaluate(self):
        accuracy, self.eval_texts = accuracies[self.run.done], []
        return {"eval_accuracy": accuracy, "eval_accuracy_greedy": accuracy}

    monkeypatch.setattr(small.GSPOTrainer, "evaluate", evaluate)
    small.MAX_STEPS, small.EVAL_EVERY, small.SAVE_EVERY, small.MAX_COMPLETION_TOKENS = 5, 1, 1, 4
    for small.EVAL_SIZE, said in ((32, 2), (4, 0)):
        trainer = small.GSPOTrainer()
        trainer.train()
        out, best = capsys.readouterr().out, trainer.run.folder / "checkpoints" / "step-1"
        assert out.count("Warning: held-out accuracy fell from 0.500 after step 1 to ") == said
        assert out.count(f" a new run with a lower --learning-rate; {best} holds the best weights") == said
        assert out.count("to 0.150 after step 2") == out.count("to 0.100 after step 5") == bool(said)


@pytest.mark.parametrize(
    ("dead", "accuracy", "line"),
    [
        ([0.0] * 6 + [0.5, 0.9], 0.9, "Dead:    70% of the groups in the last 2 of 8 steps had equal rewards"),
        ([0.0] * 6 + [0.5, 0.9], 0.2, "give easier prompts, or train with dapo.py"),
        ([1.0] * 6 + [0.5, 0.5], 0.9, None),
        ([1.0], 0.9, "give harder prompts, or train with dapo.py"),
    ],
)
def test_the_summary_says_if_most_groups_were_dead_at_the_end(tmp_path, capsys, dead, accuracy, line):
    rows = [{"step": step, "dead_groups": share, "seconds_log": 1.0} for step, share in enumerate(dead, 1)]
    evaluated = {"eval_accuracy": accuracy, "eval_accuracy_greedy": accuracy}
    history = [{"step": 0} | evaluated, *rows[:-1], rows[-1] | evaluated]
    progress.print_summary(history, {"steps": 1.0}, [], [], [], tmp_path)
    out = capsys.readouterr().out
    assert line in out if line else "Dead:" not in out


def test_the_summary_shows_long_prompts_and_answers_in_brief(small, tmp_path, capsys):
    rows = [{"prompt": f"{i}+{i}=", "answer": "one\nstep\nafter " * 20 + "#### 7"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small.PROMPTS = small.EVAL_PROMPTS = str(tmp_path / "rows.jsonl")
    small.MAX_STEPS, small.REWARDS, small.EVAL_REWARD = 1, "length", "math"
    small.GSPOTrainer().train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "(answer " in line]
    assert len(lines) == 3 and all("(answer one step after one" in line and line.endswith(" ...)") for line in lines)
    assert max(map(len, lines)) < 120
    assert progress.in_brief("字" * 200) == "字" * 76 + " ..." and progress.in_brief("a\n b") == "a b"


# ---- Pictures


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def rows_of(panels, values):
    """Returns steps from 1, whose metrics of those names are values(step, number of the metric)."""
    return [{"step": i} | {name: values(i, k) for k, name in enumerate(panels.split())} for i in range(1, 10)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_picture_has_the_eight_panels_of_the_script_with_axes_named(script):
    rows = rows_of(script.PANELS, lambda step, number: 0.1 * step + number)
    figure = plotting.plot_metrics(rows, script.PANELS)
    axes = figure.axes[:8]  # then those at the right of a panel
    assert len({axis.get_title() for axis in axes}) == 8 and all(axis.get_title() for axis in axes)
    for name, axis in zip(script.PANELS.split(), axes, strict=True):
        assert axis.get_xlabel() and axis.get_ylabel()
        assert list(axis.lines[0].get_ydata()) == [row[name] for row in rows]


def test_any_logged_metric_can_be_a_panel_and_one_that_is_not_says_so(small):
    small.PANELS = "grad_norm learning_rate ratio_max sampler_gap " + "reward " * 3 + "mine"
    trainer = small.GSPOTrainer()
    trainer.train()
    rows, _ = plotting.load_metrics(trainer.run.folder)
    axes = plotting.plot_metrics(rows, plotting.constants_of(trainer.run.folder)["PANELS"]).axes
    assert list(axes[1].lines[0].get_ydata()) == [row["learning_rate"] for row in rows]
    assert axes[1].get_title() == "learning_rate" and axes[7].texts[0].get_text() == "not computed"
    with pytest.raises(configs.InputError, match="PANELS = 'reward kl' must be the names of eight metrics"):
        configs.apply_overrides(vars(gspo), ["--panels", "reward kl"])


def test_a_run_without_a_kl_beside_one_with_a_spike_leaves_the_log_scale(tmp_path):
    folders = [tmp_path / "with", tmp_path / "without"]
    for folder, kls in zip(folders, ([0.1] * 8 + [1e4], [None] * 9), strict=True):
        folder.mkdir()
        rows = rows_of(plotting.PANELS, lambda *_: 0.1)
        rows = [row | {"kl_divergence": kl, "kl_loss": kl or 0.0} for row, kl in zip(rows, kls, strict=True)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scales = {axis.get_title(): axis.get_yscale() for axis in plotting.compare_runs(folders).axes}
    assert scales["KL divergence to the reference"] == scales["KL loss"] == "log"


def test_terms_that_a_run_does_not_have_leave_their_panels_to_others_in_the_same_places():
    logged = " ".join(["policy_loss", "reward", "relative_advantage", "avg_response_length", *plotting.SUBSTITUTES])
    off = {"entropy_loss": 0.0, "kl_loss": 0.0, "kl_divergence": None, "kl_coef": 0.0}
    rows = [row | off for row in rows_of(logged, lambda step, number: 0.1 * step + number)]
    asked = "dead_groups entropy kl_loss kl_coef grad_norm mine clip_fraction reward"
    drawn = "policy_loss entropy clip_fraction reward relative_advantage grad_norm dead_groups avg_response_length"
    stays = "dead_groups entropy ratio_max kl_coef grad_norm mine clip_fraction reward"  # there is one substitute left
    for panels, expected in ((plotting.PANELS, drawn), (asked, stays)):
        expected = [plotting.TITLES.get(name, (name,))[0] for name in expected.split()]
        assert titles(plotting.plot_metrics(rows, panels))[:8] == expected


def test_a_spike_of_the_kl_is_drawn_on_a_log_scale():
    rows = rows_of(plotting.PANELS, lambda step, number: 1e4 if (step, number) == (9, 5) else 0.1)
    scales = [axis.get_yscale() for axis in plotting.plot_metrics(rows).axes[:8]]
    assert scales == ["linear"] * 5 + ["log"] + ["linear"] * 2


@pytest.mark.drawn
def test_runs_are_redrawn_and_compared_with_a_legend(small, capsys):
    trainer = small.GSPOTrainer()
    trainer.train()
    folders = [trainer.run.folder, trainer.run.folder.with_name("another")]
    shutil.copytree(*folders)
    (folders[0] / "metrics.png").unlink()
    plotting.main([str(folders[0])])
    assert (folders[0] / "metrics.png").is_file()
    figure = plotting.compare_runs(folders)
    assert len(figure.axes) == 8 and all(titles(figure))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [folder.name for folder in folders]
    picture = folders[0] / "both.png"
    plotting.main([*map(str, folders), "--output", str(picture)])
    assert picture.is_file()


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no metrics.jsonl"), ("", "no training step"), ('{"step": 1, "policy', "line 1"), ("[]", "line 1")],
)
def test_plotting_what_cannot_be_read_fails_in_one_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        plotting.main([str(tmp_path)])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and words in err and err.count("\n") == 1


def test_on_another_device_rewards_and_reference_overlap_the_policys_own_pass(small, monkeypatch):
    """Each side waits until the other has begun. If one came after the other, this would never end."""
    small.MINI_BATCHES, small.GSPO_EPOCHS = 1, 2
    trainer = small.GSPOTrainer()
    assert not isinstance(trainer.worker, ThreadPoolExecutor)  # one device: in turn
    trainer.sampler.exact = False  # as in bfloat16, so that the policy has a pass of its own
    expected = trainer.train_step(1)
    trainer = small.GSPOTrainer()
    trainer.sampler.exact = False
    trainer.worker = ThreadPoolExecutor(1)
    both, compute = threading.Barrier(2, timeout=30), trainer.compute_log_probs
    turns = itertools.count()  # the first two passes are those of the policy and the reference

    def meet(*arguments):
        if next(turns) < 2:
            both.wait()
        return compute(*arguments)

    monkeypatch.setattr(trainer, "compute_log_probs", meet)
    assert timeless([trainer.train_step(1)]) == timeless([expected])


def looks(**changed):
    row = {"step": 1, "updates": 4, "first_ratio_min": 1.0, "first_ratio_max": 1.0, "sampler_gap": 1e-3}
    return row | {"truncated": 0.1, "dead_groups": 0.5, "entropy": 0.4} | changed


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([looks(first_ratio_max=1.02)], "more than half of the clip at 0.03"),
        ([looks(first_ratio_min=0.97)], "ratios were off by 3.0e-02"),
        ([looks(sampler_gap=0.11)], "0.11 nats per token off the trainer's"),
        ([looks(truncated=0.51)] * 10, "raise --max-completion-tokens"),
        ([looks(dead_groups=0.95)] * 10, "more than 90 % of the groups"),
        ([looks(), looks(entropy=0.81)], "entropy rose from 0.40 in step 1 to 0.81"),
        ([looks(truncated=0.51)] * 9, None),
        ([looks(dead_groups=1.0)] * 10, None),  # another warning is about these
        ([looks(updates=0, first_ratio_min=None, first_ratio_max=None)], None),
        ([looks()] * 20, None),
    ],
)
def test_what_looks_wrong_is_said_once_with_its_remedy(small, capsys, rows, words):
    trainer = small.GSPOTrainer()
    files = run_folders.RunFolder(trainer.constants)
    capsys.readouterr()
    for _ in range(2):
        progress.say_what_looks_wrong([{"step": 0}, *rows], trainer.constants, files)
    lines = capsys.readouterr().out.splitlines()
    assert (words is None and not lines) or (len(lines) == 1 and words in lines[0])


@pytest.mark.parametrize("coefficient", [0.0, 0.001])
def test_if_entropy_rises_the_bonus_is_a_remedy_only_where_there_is_one(small, capsys, coefficient):
    small.ENTROPY_COEF = coefficient
    trainer = small.GSPOTrainer()
    files = run_folders.RunFolder(trainer.constants)
    progress.say_what_looks_wrong([looks(), looks(), looks(entropy=0.9)], trainer.constants, files)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "lower --learning-rate" in line and ("--entropy-coef" in line) == (coefficient > 0)
