"""Tests of DAPO alone: dynamic sampling, surplus groups, the overlong penalty and filter, and its figure."""

import pytest
import torch
from conftest import shrink

import configs
import dapo
import gspo
import plotting
from bookkeeping.metrics import Clock
from engine.rollouts import Rollouts


@pytest.fixture
def small(tmp_path):
    return shrink(dapo, tmp_path)


def rewards_from(answers):
    """Returns a stand-in for the rule. Each prompt has its rewards by its place in the order of sampling."""
    answers = iter(answers)
    return lambda rollouts: torch.tensor([next(answers) for _ in range(len(rollouts.texts) // 4)]).flatten()


RIGHT, WRONG, MIXED = [1.0] * 4, [0.0] * 4, [1.0, 0.0, 0.0, 1.0]


def group_of(rollouts, number):
    return rollouts.select(torch.arange(4) + 4 * number)


def test_dead_groups_are_dropped_the_batch_is_refilled_and_surplus_opens_the_next(small, monkeypatch):
    sampled, trainer = [], small.DAPOTrainer()
    sample_in_turn = trainer.sampler.sample_in_turn
    monkeypatch.setattr(
        trainer.sampler, "sample_in_turn", lambda *a: (sampled.append(sample_in_turn(*a)), sampled[-1])[1]
    )
    rounds = [[RIGHT, MIXED, WRONG, MIXED], [MIXED, WRONG, MIXED, MIXED], [MIXED, MIXED, MIXED, RIGHT]]
    trainer.compute_rewards = rewards_from([group for groups in rounds for group in groups])
    first, second = (trainer.generate_responses_with_group_sampling(step) for step in (1, 2))
    alive = [
        group_of(rollouts, number)
        for rollouts, groups in zip(sampled, rounds, strict=True)
        for number, group in enumerate(groups)
        if group is MIXED
    ]
    assert first.texts + second.texts == [text for group in alive for text in group.texts]  # in order, none lost
    assert first.prompts + second.prompts == [row for group in alive for row in group.prompts]
    assert (first.rewards == torch.tensor(MIXED * 4)).all() and (second.rewards == torch.tensor(MIXED * 4)).all()
    assert not first.carried.any() and second.carried.tolist() == [True] * 4 + [False] * 12
    assert not trainer.surplus and trainer.rounds == 3
    prompts = [row["prompt"] for rollouts in sampled for row in rollouts.prompts[::4]]
    in_order = [
        row["prompt"]
        for step in (1, 2, 3)
        for row in dapo.prompts_of_step(trainer.train_rows, step, dapo.BATCH_SIZE, dapo.generator_of)
    ]
    assert prompts == in_order  # no prompt skipped, none twice


def test_completions_survive_being_taken_apart_and_joined(small):
    trainer = small.DAPOTrainer()
    small.DYNAMIC_SAMPLING = False
    rollouts = trainer.generate_responses_with_group_sampling(1)
    longer = trainer.generate_responses_with_group_sampling(2)
    joined = Rollouts.join([group_of(rollouts, 2), group_of(longer, 1)])
    for batch, number, place in ((rollouts, 2, 0), (longer, 1, 4)):
        for i in range(4):
            there, here = group_of(batch, number), joined
            n, p = int(there.completion_lengths[i]), int(there.prompt_lengths[i])
            assert int(here.completion_lengths[place + i]) == n == int(here.completion_mask[place + i].sum())
            assert here.completion_mask[place + i, :n].all()
            assert torch.equal(here.input_ids[place + i, : p + n], there.input_ids[i, : p + n])
            assert torch.equal(here.sampled_logps[place + i, :n], there.sampled_logps[i, :n])
            assert here.texts[place + i] == there.texts[i] and here.prompts[place + i] == there.prompts[i]


def test_a_surplus_group_keeps_the_policy_that_sampled_it_as_old(small):
    small.GROUP_SIZE = 8
    trainer = small.DAPOTrainer()
    history = []
    for step in range(1, 7):  # until a step has surplus groups from the one before
        before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
        carried_from, surplus = before if step == 1 else history[-1], trainer.surplus
        trainer.train_step(step)
        history.append(before)
        if surplus:
            break
    assert surplus
    trainer.surplus = surplus
    metrics = trainer.train_step(step + 1)
    assert metrics["carried_over"] > 0 and metrics["first_ratio_min"] is metrics["first_ratio_max"] is None
    trainer.surplus = surplus
    rollouts = trainer.generate_responses_with_group_sampling(7)
    small.OVERLONG_FILTER = False
    trainer.sampler.exact = False  # as in bfloat16, where the trainer computes π_old
    trainer.add_scores(rollouts, 7, Clock(trainer.policy_device))
    rollouts.advantages = torch.ones(len(rollouts.texts))
    trainer.add_old_logps(rollouts, 7)
    old_logps = rollouts.old_logps
    now = trainer.compute_log_probs(trainer.policy, rollouts)
    trainer.policy.load_state_dict(carried_from)
    then = trainer.compute_log_probs(trainer.policy, rollouts)
    carried = rollouts.carried
    assert carried.any() and not carried.all()
    torch.testing.assert_close(old_logps[carried], then[carried], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(old_logps[~carried], now[~carried])
    assert (now[carried] - then[carried]).abs().max() > 1e-2


def test_a_surplus_group_keeps_the_experts_that_sampled_it_under_r2(small):
    small.POLICY_MODEL, small.ROUTING_REPLAY, small.OVERLONG_FILTER = "data/models/arithmetic-moe", "r2", False
    small.DYNAMIC_SAMPLING = False
    trainer = small.DAPOTrainer()
    trainer.sampler.exact = False  # as in bfloat16
    rollouts = trainer.generate_responses_with_group_sampling(1)
    carried = rollouts.carried = torch.arange(len(rollouts.texts)) < small.GROUP_SIZE
    with torch.no_grad():
        for parameter in trainer.policy.parameters():  # as a step would, so that other experts are chosen
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampled = rollouts.experts.clone()
    trainer.add_scores(rollouts, 1, Clock(trainer.policy_device))
    rollouts.advantages = torch.ones(len(rollouts.texts))
    trainer.add_old_logps(rollouts, 1)
    assert torch.equal(rollouts.experts[carried], sampled[carried])
    assert torch.equal(rollouts.old_logps[carried], rollouts.sampled_logps[carried])
    assert (rollouts.experts != sampled)[~carried].any()
    small.ROUTING_REPLAY = ""  # without replay the policy chooses the same experts as in the pass for π_old
    now = trainer.compute_log_probs(trainer.policy, rollouts)
    torch.testing.assert_close(rollouts.old_logps[~carried], now[~carried], rtol=1e-4, atol=1e-4)


def test_without_dynamic_sampling_the_rollouts_are_those_of_gspo(small, tmp_path):
    small.DYNAMIC_SAMPLING = False
    trainer, other = small.DAPOTrainer(), shrink(gspo, tmp_path).GSPOTrainer()
    for step in (1, 2):
        rollouts, expected = (t.generate_responses_with_group_sampling(step) for t in (trainer, other))
        assert rollouts.texts == expected.texts and torch.equal(rollouts.sampled_logps, expected.sampled_logps)
        metrics = trainer.sampling_metrics(rollouts)
        assert metrics["resampled"] == metrics["carried_over"] == 0
        assert metrics["sampled_completions"] == len(expected.texts)
        assert metrics["completion_tokens"] == int(expected.completion_lengths.sum())


@pytest.mark.drawn
def test_at_the_cap_the_run_stops_with_one_line_and_the_model_is_kept(small, monkeypatch, capsys):
    small.MAX_RESAMPLES, small.SAVE_EVERY = 2, 1
    compute_rewards = small.DAPOTrainer.compute_rewards

    def rewards(trainer, rollouts):
        return compute_rewards(trainer, rollouts) if len(trainer.metrics_history) < 2 else torch.ones(16)

    monkeypatch.setattr(small.DAPOTrainer, "compute_rewards", rewards)
    with pytest.raises(SystemExit) as exit_:
        small.main([])
    err = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    for words in ("error: step 2: 3 x 4 prompts", "100% of the completions were right",
                  "--max-resamples", "--no-dynamic-sampling", "checkpoints/step-1"):  # fmt: skip
        assert words in err
    (model,) = (configs.HERE / small.OUTPUT_DIR).glob("dapo-*/checkpoints/step-1/model.safetensors")
    assert model.stat().st_size > 1e6 and (model.parents[2] / "metrics.png").is_file()


# ---- Overlong completions


def test_the_overlong_penalty_is_that_of_the_paper():
    dapo.MAX_COMPLETION_TOKENS, dapo.OVERLONG_CACHE = 20480, 4096  # the paper's
    lengths = torch.tensor([1, 16383, 16384, 16385, 18432, 20479, 20480])
    expected = [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    assert dapo.overlong_penalty(lengths).tolist() == pytest.approx(expected)
    dapo.MAX_COMPLETION_TOKENS = 1024  # a cache larger than the limit is the whole of it
    assert dapo.overlong_penalty(torch.tensor([512, 1024])).tolist() == [-0.5, -1]
    dapo.OVERLONG_CACHE = 0
    assert dapo.overlong_penalty(lengths).tolist() == [0] * 7


def test_the_penalty_comes_on_top_of_the_task_reward_and_cannot_revive_a_dead_group(small):
    small.MAX_COMPLETION_TOKENS, small.OVERLONG_CACHE = 8, 6
    trainer = small.DAPOTrainer()
    trainer.compute_rewards = rewards_from([WRONG, RIGHT, WRONG, RIGHT, MIXED, MIXED, MIXED, MIXED])
    rollouts = trainer.generate_responses_with_group_sampling(1)
    assert (rollouts.rewards.view(-1, 4) == torch.tensor(MIXED)).all()
    rewards = trainer.score(rollouts)
    expected = [
        r - min(max(n - 2, 0), 6) / 6 for r, n in zip(MIXED * 4, rollouts.completion_lengths.tolist(), strict=True)
    ]
    assert rewards.tolist() == pytest.approx(expected) and trainer.compute_ref_logps(rollouts) is None
    dropped = trainer.drawn[0].completion_lengths.view(4, 4)
    assert (dropped.amax(1) != dropped.amin(1)).any()  # the penalty alone would have told them apart


@pytest.mark.parametrize("filtered", [True, False])
def test_the_filter_leaves_truncated_completions_out_of_the_loss(small, monkeypatch, filtered):
    small.MAX_COMPLETION_TOKENS, small.OVERLONG_FILTER, small.BATCH_SIZE = 12, filtered, 8
    trainer, updated = small.DAPOTrainer(), []
    update = trainer.update
    monkeypatch.setattr(
        trainer, "update", lambda batch, *on_policy: (updated.append(batch), update(batch, *on_policy))[1]
    )
    generate, generated = trainer.generate_responses_with_group_sampling, []
    monkeypatch.setattr(
        trainer,
        "generate_responses_with_group_sampling",
        lambda step: (generated.append(generate(step)), generated[0])[1],
    )
    trainer.train_step(1)
    (rollouts,) = generated
    assert 0 < rollouts.truncated.sum() < len(rollouts.texts)
    kept = rollouts.select(
        (~rollouts.truncated if filtered else torch.ones_like(rollouts.truncated)).nonzero().squeeze(1)
    )
    seen = [ids.tolist() for batch in updated for ids in batch.input_ids]
    assert sorted(seen) == sorted(kept.input_ids.tolist())  # and all others, once


@pytest.mark.drawn
def test_a_step_without_a_completion_in_the_loss_changes_nothing_and_the_run_goes_on(small):
    small.MAX_COMPLETION_TOKENS, small.DYNAMIC_SAMPLING, small.REWARDS = 2, False, "exact_match"
    trainer = small.DAPOTrainer()
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    history = trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    assert [row["step"] for row in history] == [0, 1, 2]
    assert history[2]["truncated"] == 1 and history[2]["clip_fraction"] is None and history[2]["policy_loss"] == 0
    assert (trainer.run.folder / "metrics.png").is_file()


# ---- Metrics and figure


def test_clip_fractions_count_each_side(small):
    small.CLIP_LOW, small.CLIP_HIGH = 0.2, 0.28
    old_logps, mask = torch.zeros(2, 4), torch.tensor([[True] * 4, [True] * 3 + [False]])
    ratio = torch.tensor([[1.3, 1.25, 0.7, 1.0], [1.3, 0.7, 0.79, 0.1]])
    _, stats = small.compute_policy_loss(ratio.log(), old_logps, torch.tensor([1.0, -1.0]), mask)
    assert stats["clip_fraction_high"].item() == pytest.approx(1 / 7)  # 1.3 with A > 0
    assert stats["clip_fraction_low"].item() == pytest.approx(2 / 7)  # 0.7, 0.79 with A < 0
    assert stats["clip_fraction"].item() == pytest.approx(3 / 7)


def test_metrics_tell_what_was_drawn_dropped_and_kept(small):
    trainer = small.DAPOTrainer()
    trainer.compute_rewards = rewards_from([RIGHT, MIXED, WRONG, MIXED, MIXED, WRONG, MIXED, MIXED])
    metrics = trainer.sampling_metrics(trainer.generate_responses_with_group_sampling(1))
    assert metrics["sampled_completions"] == 32 and metrics["accuracy"] == (4 + 2 * 5) / 32
    assert metrics["dead_groups_drawn"] == 3 / 8 and metrics["resampled"] == 0.5 and metrics["carried_over"] == 0
    assert metrics["completion_tokens"] == sum(int(part.completion_lengths.sum()) for part in trainer.drawn)
    trainer.compute_rewards = rewards_from([MIXED] * 4)
    assert trainer.sampling_metrics(trainer.generate_responses_with_group_sampling(2))["carried_over"] == 0.25


@pytest.mark.drawn
def test_its_own_figure_is_drawn_with_the_expected_share_of_dead_groups(small):
    trainer = small.DAPOTrainer()
    trainer.train()
    rows, _ = plotting.load_metrics(trainer.run.folder)
    figure = plotting.plot_metrics(rows, small.PANELS, constants={"GROUP_SIZE": 4})
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert len(axes) == 8 and all(axis.get_xlabel() and axis.get_ylabel() for axis in axes.values())
    measured, expected = axes["Dead groups before resampling"].lines
    assert list(measured.get_ydata()) == [row["dead_groups_drawn"] for row in rows]
    p = rows[1]["accuracy"]
    assert expected.get_ydata()[1] == pytest.approx(p**4 + (1 - p) ** 4)
    before = (trainer.run.folder / "metrics.png").stat().st_size
    (trainer.run.folder / "metrics.png").unlink()
    assert plotting.draw_run(trainer.run.folder).stat().st_size == before
