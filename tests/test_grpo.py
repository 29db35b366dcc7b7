"""Tests of GRPO alone: the gradients of its KL estimators, and the dual clip."""

import math

import pytest
import torch
from conftest import shrink

import grpo


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "ratio_k3"])
def test_kl_estimators_have_the_stated_gradients(estimator):
    """Expectations are exact: a distribution of four tokens, and one completion of one token for each."""
    grpo.KL_ESTIMATOR = estimator
    parameters = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    log_p, log_ref = parameters.log_softmax(0), torch.tensor([1.0, 0.1, -0.4, 0.3], dtype=torch.float64).log_softmax(0)
    old = log_p.detach()
    one = torch.ones(1, 1, dtype=torch.bool)
    terms = [grpo.compute_kl_loss(log_p[i].view(1, 1), old[i].view(1, 1), log_ref[i].view(1, 1), one) for i in range(4)]
    gradient = torch.autograd.grad((old.exp() * torch.stack(terms)).sum(), parameters, retain_graph=True)[0]
    reverse = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), parameters, retain_graph=True)[0]
    forward = torch.autograd.grad((log_ref.exp() * (log_ref - log_p)).sum(), parameters)[0]
    stated = {"k1": torch.zeros_like(reverse), "k2": reverse, "k3": forward, "ratio_k3": reverse}
    torch.testing.assert_close(gradient, stated[estimator])


@pytest.mark.parametrize(("log_ratio", "advantage", "bounded"), [(2.0, -1.0, True), (1.0, -1.0, False)])
def test_the_dual_clip_bounds_the_loss_of_negative_advantages(log_ratio, advantage, bounded):
    grpo.DUAL_CLIP = 3.0
    old_logps = torch.full((1, 4), -1.0, dtype=torch.float64)
    logps = (old_logps + log_ratio).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, _ = grpo.compute_policy_loss(logps, old_logps, torch.tensor([advantage]).double(), mask)
    assert loss.item() == pytest.approx(3.0 if bounded else math.exp(log_ratio))
    assert bool((torch.autograd.grad(loss, logps)[0] == 0).all()) == bounded


def test_the_logged_kl_is_a_mean_per_token_with_any_divisor(tmp_path):
    shrink(grpo, tmp_path).LEARNING_RATE = 1e-12
    trainer = grpo.GRPOTrainer()
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rollouts.old_logps, rollouts.advantages = rollouts.sampled_logps, torch.zeros(len(rollouts.texts))
    rollouts.ref_logps = rollouts.sampled_logps + 0.5
    for grpo.LOSS_AGGREGATION, grpo.LOSS_DIVISOR in (("constant", 1000), ("token_mean", 64), ("sequence_mean", 64)):
        kl = trainer.update(rollouts.select(torch.arange(len(rollouts.texts))))["kl_divergence"]
        assert kl.item() == pytest.approx(math.exp(0.5) - 1.5, rel=1e-4)
