"""Tests of GSPO alone: how its levels of the ratio relate to each other."""

import torch
from variants import loss_and_grad, random_batch

import gspo


def test_with_one_token_gspo_is_token_level_ppo():
    logps, old_logps, advantages, _ = random_batch(tokens=2)
    first = [x[:, :1] for x in (logps.detach(), old_logps)]
    mask = torch.ones(len(logps), 1, dtype=torch.bool)
    gspo.CLIP_LOW = gspo.CLIP_HIGH = 0.1
    sequence = loss_and_grad(gspo.compute_policy_loss_sequence_level, *first, advantages, mask)
    gspo.RATIO_LEVEL = "token"
    token = loss_and_grad(gspo.compute_policy_loss_token_level, *first, advantages, mask)
    torch.testing.assert_close(sequence, token)


def test_gspo_token_is_gspo_with_one_advantage_per_sequence():
    gspo.CLIP_LOW, gspo.CLIP_HIGH = 0.05, 0.1
    batch = random_batch()
    expected = loss_and_grad(gspo.compute_policy_loss, *batch)
    gspo.RATIO_LEVEL = "sequence_token"
    torch.testing.assert_close(loss_and_grad(gspo.compute_policy_loss, *batch), expected)  # and the statistics


def test_gspo_token_gives_each_token_its_own_advantage():
    gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = "sequence_token", 0.9, 9.0
    logps, old_logps, _, mask = random_batch()
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, grad, _ = loss_and_grad(gspo.compute_policy_loss, logps, old_logps, advantages, mask)
    ratio = gspo.compute_sequence_ratio(logps, old_logps, mask).detach()
    expected = -(ratio / mask.sum(1) / len(mask))[:, None] * advantages * mask  # d s_it / d logp_it = s_i
    torch.testing.assert_close(grad, expected)
