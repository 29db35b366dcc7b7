"""Tests of SAMPLER_CORRECTION, against naive loops and against batches without the completions that it leaves out."""

import math

import pytest
import torch
from conftest import keep_weights, trainer_of

from engine.correction import corrected_advantages, correction_metrics, trusted
from engine.rollouts import Rollouts


def completions(lengths, shift, advantages):
    """Returns Rollouts of which correction reads: masks, π_old, and a sampler that is off by shift nats per token."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    torch.manual_seed(0)
    old_logps = -torch.rand(mask.shape, dtype=torch.float64) - 0.1
    sampled_logps = torch.where(mask, old_logps - torch.as_tensor(shift, dtype=torch.float64), math.nan)
    fields = {"texts": [""] * len(lengths), "completion_mask": mask, "sampled_logps": sampled_logps}
    return Rollouts.of(fields | {"old_logps": old_logps, "advantages": torch.tensor(advantages, dtype=torch.float64)})


def test_token_weights_are_the_ratio_up_to_two():
    rollouts = completions([3, 1], [[0.1, 1.0, -0.5], [0.2, 9.0, 9.0]], [2.0, -1.0])
    expected = [[2 * math.exp(0.1), 2 * 2.0, 2 * math.exp(-0.5)], [-math.exp(0.2), -1.0, -1.0]]
    advantages = corrected_advantages(rollouts, "token")
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    assert not advantages.requires_grad
    metrics = correction_metrics(rollouts, "token")
    assert metrics["sampler_capped"] == 0.25
    assert metrics["sampler_weight"] == pytest.approx((math.exp(0.1) + 2 + math.exp(-0.5) + math.exp(0.2)) / 4)
    assert corrected_advantages(rollouts, "") is corrected_advantages(rollouts, "sequence") is rollouts.advantages
    assert correction_metrics(rollouts, "") == {}


def test_a_completion_is_trusted_by_its_geometric_mean():
    rollouts = completions([2, 2, 1], [[0.5, -0.5], [0.02, 0.006], [-0.0102, 9.0]], [1.0, 1.0, 1.0])
    assert trusted(rollouts, "sequence").tolist() == [True, False, False]
    assert trusted(rollouts, "token").all() and trusted(rollouts, "").all()
    assert correction_metrics(rollouts, "sequence") == {"sampler_dropped": pytest.approx(2 / 3)}


def test_a_weighted_token_counts_that_much_in_every_loss(small_script):
    """Against a loop over tokens, each of whose losses is the loss of a batch in which it alone has an advantage."""
    small_script.REWARDS, small_script.ENTROPY_COEF = "exact_match", 0.0
    torch.manual_seed(1)
    lengths, per_token = [3, 5, 2, 4], small_script.__name__ in ("ppo", "vapo")
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    old_logps = -torch.rand(4, 5, dtype=torch.float64)
    logps = (old_logps + 0.3 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_()
    rollouts = completions(
        lengths, torch.randn(4, 5).tolist(), torch.randn(4, 5 if per_token else 1).squeeze(1).tolist()
    )
    weights = corrected_advantages(rollouts, "token") / rollouts.advantages.view(4, -1)
    loss, _ = small_script.compute_policy_loss(logps, old_logps, corrected_advantages(rollouts, "token"), mask)
    (found,) = torch.autograd.grad(loss, logps)
    plain, _ = small_script.compute_policy_loss(logps, old_logps, rollouts.advantages.view(4, -1).expand(4, 5), mask)
    if small_script.__name__ == "gspo":  # one ratio for all tokens, so each token's gradient has the mean weight
        weights = ((weights * mask).sum(1) / mask.sum(1))[:, None]
    (of_plain,) = torch.autograd.grad(plain, logps)
    torch.testing.assert_close(found, of_plain * weights)


@pytest.mark.parametrize("dropped", [[0], [1, 6], list(range(16))])
def test_untrusted_completions_leave_numerator_and_denominator(small_script, dropped):
    small_script.REWARDS, small_script.MINI_BATCHES, small_script.SAMPLER_CORRECTION = "exact_match", 1, "sequence"
    trainer = trainer_of(small_script)
    rows = small_script.prompts_of_step(trainer.train_rows, 1, 16 // small_script.GROUP_SIZE, small_script.generator_of)
    rollouts = trainer.sample(rows, small_script.GROUP_SIZE, ("test",))
    rollouts.old_logps = rollouts.sampled_logps.clone()
    rollouts.rewards, rollouts.carried = torch.rand(16), torch.zeros(16, dtype=torch.bool)
    if hasattr(trainer, "critic"):
        rollouts.values = rollouts.outcomes = torch.zeros(rollouts.completion_mask.shape)
        rollouts.ref_logps = None
    rollouts.advantages = trainer.compute_advantages(rollouts)
    keep = torch.tensor([row for row in range(16) if row not in dropped], dtype=torch.long)
    rollouts.truncated[:] = False
    keep_weights(trainer)
    expected = None
    if len(keep):
        trainer.update(rollouts.select(keep))
        expected = {name: gradient.clone() for name, gradient in trainer.gradients.items()}
    rollouts.sampled_logps[dropped] -= 0.02
    trainer.gradients = None
    updates = trainer.update_policy(rollouts, 1)
    assert len(updates) == (len(keep) > 0)
    if expected:
        for name, gradient in expected.items():
            torch.testing.assert_close(trainer.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_in_bfloat16_with_correction_logs_what_it_did(small_script):
    small_script.COMPUTE_DTYPE, small_script.SAMPLER_CORRECTION, small_script.MAX_STEPS = "bfloat16", "token", 1
    metrics = trainer_of(small_script).train()[1]
    assert 0.9 < metrics["sampler_weight"] < 1.1 and metrics["sampler_weight"] != 1 and metrics["sampler_capped"] == 0
