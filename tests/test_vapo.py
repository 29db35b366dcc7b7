"""Tests of VAPO alone: its two λ, the positive loss, value pre-training, and that each part can be turned off."""

import math
import shutil

import pytest
import torch
from conftest import keep_weights, shrink
from test_ppo import ragged
from test_run import read_jsonl, timeless
from variants import naive_loss

import configs
import plotting
import ppo
import vapo


def test_the_lambda_grows_with_the_length_and_is_never_negative():
    vapo.ALPHA = 0.05
    lengths = torch.tensor([1, 10, 20, 40, 1000])
    assert vapo.length_adaptive_lambda(lengths).tolist() == pytest.approx([0, 0, 0, 0.5, 0.98])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_advantages_and_returns_have_a_lambda_each(alpha):
    """Against the double sum of the paper, for each completion alone."""
    vapo.GAMMA, vapo.ALPHA, vapo.LAMBDA, vapo.LAMBDA_CRITIC = 0.9, alpha, 0.8, 0.97
    rewards, values, mask = ragged()
    advantages, returns = vapo.compute_gae(rewards, values, mask)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()
    for i, n in enumerate(mask.sum(1).tolist()):
        of_policy = max(0.0, 1 - 1 / (alpha * n)) if alpha else 0.8
        r, v = rewards[i, :n].tolist(), [*values[i, :n].tolist(), 0.0]
        delta = [r[u] + 0.9 * v[u + 1] - v[u] for u in range(n)]
        for t in range(n):
            expected = [sum((0.9 * lam) ** (u - t) * delta[u] for u in range(t, n)) for lam in (of_policy, 0.97)]
            assert advantages[i, t].item() == pytest.approx(expected[0])
            assert returns[i, t].item() == pytest.approx(expected[1] + v[t])


def test_with_every_part_off_the_losses_and_advantages_are_ppos():
    vapo.ALPHA, vapo.LAMBDA_CRITIC, vapo.CLIP_HIGH = 0.0, vapo.LAMBDA, vapo.CLIP_LOW
    rewards, values, mask = ragged(4)
    for ours, theirs in zip(
        vapo.compute_gae(rewards, values, mask), ppo.compute_gae(rewards, values, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    logps, old_logps = (torch.randn(mask.shape, dtype=torch.float64) for _ in range(2))
    inputs = (logps, old_logps, values.masked_fill(~mask, 0.0), mask)
    assert torch.equal(vapo.compute_policy_loss(*inputs)[0], ppo.compute_policy_loss(*inputs)[0])


def test_the_positive_loss_is_the_mean_over_the_tokens_of_right_completions():
    _, logps, mask = ragged(5)
    logps = logps.masked_fill(~mask, math.nan).requires_grad_()
    correct = torch.tensor([False, True, False, True, False])
    loss = vapo.compute_positive_loss(logps, correct, mask)
    counted = [-logps[i, t].item() for i in range(5) if correct[i] for t in range(mask.shape[1]) if mask[i, t]]
    assert loss.item() == pytest.approx(sum(counted) / len(counted))
    grad = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(grad, -(mask & correct[:, None]).double() / len(counted))
    assert vapo.compute_positive_loss(logps, torch.zeros(5, dtype=torch.bool), mask) == 0


def test_what_is_right_is_what_the_rule_says_and_not_a_reward_above_zero(tmp_path):
    shrink(vapo, tmp_path)
    trainer = vapo.VAPOTrainer()
    trainer.compute_rewards = lambda rollouts: torch.ones(len(rollouts.texts))  # as a bonus that wrong answers get, too
    rollouts = trainer.generate_responses_with_group_sampling(1)
    assert (trainer.score(rollouts) > 0).all()
    right = torch.tensor(trainer.eval_reward(rollouts.prompts, rollouts.texts)) == 1
    assert torch.equal(rollouts.correct, right) and right.any() and not right.all()
    vapo.POSITIVE_COEF = 0.0
    again = trainer.generate_responses_with_group_sampling(1)
    trainer.score(again)
    assert again.correct is None


def test_the_positive_loss_does_not_depend_on_how_a_batch_is_split(tmp_path):
    """Its mean is over the right completions of the optimizer step, and a micro-batch may hold none of them."""
    gradients = []
    for tokens in (10**6, 60):
        shrink(vapo, tmp_path)
        vapo.POSITIVE_COEF, vapo.MICRO_BATCH_TOKENS = 1.0, tokens
        trainer = vapo.VAPOTrainer()
        rollouts = trainer.generate_responses_with_group_sampling(1)
        rollouts.old_logps, rollouts.ref_logps = rollouts.sampled_logps, None
        rollouts.advantages = torch.zeros(rollouts.completion_mask.shape)  # so that nothing else moves
        rollouts.correct = torch.arange(len(rollouts.texts)) % 3 == 0
        _, stats = trainer.compute_gradient(rollouts, tokens)
        gradients.append({name: p.grad.clone() for name, p in trainer.policy.named_parameters()})
        mean = -(rollouts.sampled_logps * rollouts.completion_mask)[rollouts.correct].sum()
        mean = mean / rollouts.completion_lengths[rollouts.correct].sum()
        assert stats["positive_loss"].item() == pytest.approx(mean.item(), rel=1e-4) and stats["policy_loss"] == 0
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-3, atol=1e-6)
    assert any(gradient.any() for gradient in gradients[0].values())


def trained(tmp_path, **constants):
    shrink(vapo, tmp_path)
    vars(vapo).update(constants)
    trainer = vapo.VAPOTrainer()
    trainer.train()
    return trainer


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("tokens", [10**6, 60])
def test_an_update_takes_the_gradient_of_both_terms(tmp_path, how, tokens):
    """−J and POSITIVE_COEF · the mean of −log π over right completions, computed here from whole logits, row by row."""
    shrink(vapo, tmp_path)
    vapo.POSITIVE_COEF, vapo.LOSS_AGGREGATION, vapo.MICRO_BATCH_TOKENS, vapo.MAX_GRAD_NORM = 0.3, how, tokens, 1e9
    trainer = vapo.VAPOTrainer()
    keep_weights(trainer)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    mask, generator = rollouts.completion_mask, torch.Generator().manual_seed(0)
    rollouts.old_logps, rollouts.ref_logps = rollouts.sampled_logps + 0.1, None
    rollouts.advantages = torch.randn(len(mask), generator=generator)
    rollouts.correct = torch.arange(len(mask)) % 3 == 0
    stats = trainer.update(rollouts)
    logps, right = torch.zeros(mask.shape), []
    for i, (start, end) in enumerate(zip(rollouts.prompt_lengths.tolist(), rollouts.lengths.tolist(), strict=True)):
        ids = rollouts.input_ids[i : i + 1, :end]
        log_probs = trainer.policy(ids).logits[0, start - 1 : end - 1].log_softmax(-1)
        logps[i, : end - start] = log_probs.gather(1, ids[0, start:, None])[:, 0]
        right += [-x for x in logps[i, : end - start]] if rollouts.correct[i] else []
    loss, _ = naive_loss(vapo, logps, rollouts.old_logps, rollouts.advantages, mask)
    positive = 0.3 * sum(right) / len(right)
    trainer.policy.zero_grad()
    (loss + positive).backward()
    torch.testing.assert_close(stats["positive_loss"], positive.detach(), rtol=1e-4, atol=1e-6)
    for name, parameter in trainer.policy.named_parameters():
        torch.testing.assert_close(trainer.gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_pre_training_is_as_many_steps_as_the_constant_says(tmp_path, steps):
    trainer = trained(tmp_path, MAX_STEPS=3, VALUE_PRETRAIN_STEPS=steps, WARMUP_STEPS=1, LR_SCHEDULE="constant")
    rows = trainer.metrics_history[1:]
    assert [row["updates"] > 0 for row in rows] == [step > steps for step in (1, 2, 3)]
    assert [row["critic_grad_norm"] > 0 for row in rows] == [True] * 3
    rates = [row["learning_rate"] for row in rows]  # the warm-up begins once the policy trains
    assert rates == [0.0] * steps + [vapo.LEARNING_RATE] * (3 - steps)


def test_pre_training_learns_monte_carlo_returns_whatever_lambda_is(tmp_path):
    shrink(vapo, tmp_path)
    vapo.VALUE_PRETRAIN_STEPS, vapo.LAMBDA_CRITIC = 1, 0.5
    trainer = vapo.VAPOTrainer()
    learned, update_critic = [], trainer.update_critic
    trainer.update_critic = lambda batch: (learned.append(batch), update_critic(batch))[1]
    trainer.critic.model.score.bias.data.fill_(0.3)  # values that returns at a λ below 1 would hold
    for step in (1, 2):
        trainer.train_step(step)
    monte_carlo = [torch.equal(b.returns, b.rewards[:, None] * b.completion_mask) for b in learned]
    assert monte_carlo == [True] * vapo.MINI_BATCHES + [False] * vapo.MINI_BATCHES


@pytest.mark.drawn
def test_the_log_the_picture_and_resuming_say_which_steps_were_pre_training(tmp_path, capsys):
    first = trained(tmp_path, MAX_STEPS=3, VALUE_PRETRAIN_STEPS=2, SAVE_EVERY=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vapo step")]
    assert ["the policy rests" in line for line in lines] == [True, True, False]
    steps, _ = plotting.load_metrics(first.run.folder)
    figure = plotting.plot_metrics(steps, vapo.PANELS, title="a run")
    assert "a run (the policy rests in steps 1 to 2)" in figure.get_suptitle()
    assert all(any(patch.get_gid() == "rests" for patch in axis.patches) for axis in figure.axes[:8])
    trained(tmp_path, MAX_STEPS=4, VALUE_PRETRAIN_STEPS=2, RESUME=str(first.run.folder))
    assert "after step 3; the policy rested in steps 1 to 2" in capsys.readouterr().out


def test_a_run_resumed_within_pre_training_ends_as_the_whole_one(tmp_path, capsys):
    constants = {"MAX_STEPS": 4, "VALUE_PRETRAIN_STEPS": 2, "SAVE_EVERY": 1, "KEEP_CHECKPOINTS": 5}
    whole = trained(tmp_path / "whole", **constants)
    part = trained(tmp_path / "part", **constants)
    for step in (2, 3, 4):  # as if it had been killed within pre-training
        shutil.rmtree(part.run.folder / "checkpoints" / f"step-{step}")
    resumed = trained(tmp_path / "part", RESUME=str(part.run.folder), **constants)
    assert "after step 1; the policy rested in steps 1 to 1" in capsys.readouterr().out
    rows = [timeless(read_jsonl(trainer.run.folder / "metrics.jsonl")) for trainer in (whole, resumed)]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    for first, second in ((whole.policy, resumed.policy), (whole.critic.model, resumed.critic.model)):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"ALPHA": 0.02}, "ALPHA = 0.02 makes λ zero"),
        ({"VALUE_PRETRAIN_STEPS": 2}, "VALUE_PRETRAIN_STEPS = 2 leaves the policy no step of MAX_STEPS = 2"),
    ],
)
def test_constants_that_leave_nothing_to_learn_are_refused(tmp_path, constants, message):
    shrink(vapo, tmp_path)
    vars(vapo).update(constants)
    with pytest.raises(configs.InputError, match=message):
        vapo.VAPOTrainer()
