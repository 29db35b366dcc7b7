"""Tests of CISPO alone: weights that are held, gradients that are not dropped, and rare tokens."""

import math

import pytest
import torch
from conftest import shrink
from test_run import read_jsonl
from variants import loss_and_grad, random_batch

import cispo
import grpo


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("log_ratio", "weight"), [(0.5, 1.2), (0.01, math.exp(0.01)), (-0.5, 0.7), (-3.0, 0.7)])
def test_each_token_has_a_gradient_with_a_weight_within_the_bounds(log_ratio, weight, advantage):
    cispo.CLIP_LOW, cispo.CLIP_HIGH = 0.3, 0.2
    old_logps, mask = torch.full((1, 4), -1.0, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    batch = old_logps + log_ratio, old_logps, torch.tensor([advantage]).double(), mask
    loss, grad, stats = loss_and_grad(cispo.compute_policy_loss, *batch)
    torch.testing.assert_close(grad, torch.full_like(grad, -weight * advantage / 4))
    assert loss.item() == pytest.approx(-weight * advantage * (-1.0 + log_ratio))
    assert stats["clip_fraction"] == (log_ratio != 0.01)
    grpo.CLIP_LOW, grpo.CLIP_HIGH = 0.3, 0.2
    if advantage * log_ratio > 0.1:  # where GRPO drops the gradient
        assert not loss_and_grad(grpo.compute_policy_loss, *batch)[1].any()


def test_a_low_clip_of_one_is_no_lower_bound():
    cispo.CLIP_LOW, cispo.CLIP_HIGH = 1.0, 1e6
    logps, old_logps, advantages, mask = random_batch(spread=3.0)
    _, grad, stats = loss_and_grad(cispo.compute_policy_loss, logps, old_logps, advantages, mask)
    expected = -(logps.detach() - old_logps).exp() * advantages[:, None] * mask / mask.sum()
    torch.testing.assert_close(grad, expected)
    assert stats["clip_fraction"] == 0


def test_the_share_of_rare_tokens_in_the_gradient_is_that_of_its_entries():
    cispo.CLIP_HIGH, cispo.RARE_BELOW = 0.5, 0.2
    logps, old_logps, advantages, mask = random_batch(seed=2)
    _, grad, stats = loss_and_grad(cispo.compute_policy_loss, logps, old_logps, advantages, mask)
    rare = mask & (old_logps.exp() < 0.2)
    assert 0 < rare.sum() < mask.sum()
    assert stats["rare_gradient"].item() == pytest.approx((grad[rare].abs().sum() / grad.abs().sum()).item())
    assert stats["rare_tokens"].item() == pytest.approx((rare.sum() / mask.sum()).item())
    _, _, stats = loss_and_grad(cispo.compute_policy_loss, logps, old_logps, torch.zeros_like(advantages), mask)
    assert stats["rare_gradient"] == 0  # not NaN, if no completion has an advantage


def test_a_step_logs_rare_tokens_and_penalises_long_completions(tmp_path):
    shrink(cispo, tmp_path)
    cispo.OVERLONG_CACHE = cispo.MAX_COMPLETION_TOKENS  # so each token costs
    trainer = cispo.CISPOTrainer()
    trainer.train()
    rows, samples = (read_jsonl(trainer.run.folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    assert all(0 <= row["rare_gradient"] <= 1 and 0 <= row["rare_tokens"] <= 1 for row in rows[1:])
    for sample in samples:
        right = sample["completion"].rpartition("#")[2].strip() == sample["answer"] and "#" in sample["completion"]
        assert sample["reward"] == pytest.approx(right - sample["tokens"] / cispo.MAX_COMPLETION_TOKENS)
