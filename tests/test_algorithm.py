"""The algorithm's pure functions against naive loops, closed forms, and what verl and TRL compute."""

import json
import math
from pathlib import Path

import pytest
import torch

import gspo

GOLDEN = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("losses-*.json"))]


def random_batch(seed=0, batch=6, tokens=9, spread=0.6):
    """logps (with gradient), old_logps, advantages, completion_mask, in float64; the first row has a single token."""
    generator = torch.Generator().manual_seed(seed)
    old_logps = -torch.rand(batch, tokens, dtype=torch.float64, generator=generator) * 3
    logps = old_logps + spread * torch.randn(batch, tokens, dtype=torch.float64, generator=generator)
    advantages = torch.randn(batch, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 1, tokens
    return logps.requires_grad_(), old_logps, advantages, torch.arange(tokens) < lengths[:, None]


def loss_and_grad(logps, *rest, loss=None):
    logps = logps.detach().clone().requires_grad_()
    value, stats = (loss or gspo.compute_policy_loss)(logps, *rest)
    value.backward()
    return value.detach(), logps.grad, stats


def naive(logps, old_logps, advantages, completion_mask, level):
    """The objective as the paper writes it: one sequence and one token after the other. Returns loss, clip share."""
    total, clipped, terms = 0.0, 0, 0
    for i in range(len(logps)):
        tokens = [t for t in range(logps.shape[1]) if completion_mask[i, t]]
        log_ratios = [logps[i, t] - old_logps[i, t] for t in tokens]
        log_s = sum(log_ratios) / (len(tokens) if gspo.LENGTH_NORMALIZED_RATIO else 1)
        ratios = [log_s.exp()] if level == "sequence" else [log_ratio.exp() for log_ratio in log_ratios]
        value = 0.0
        for ratio in ratios:
            a = advantages[i]
            bounded = min(max(ratio, 1 - gspo.CLIP_LOW), 1 + gspo.CLIP_HIGH)
            value = value + min(ratio * a, bounded * a)
            clipped += bool(a > 0 and ratio > 1 + gspo.CLIP_HIGH or a < 0 and ratio < 1 - gspo.CLIP_LOW)
            terms += 1
        total = total - value / len(ratios)
    return total / len(logps), clipped / terms


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_clip_fraction_equal_the_naive_loop(level, normalized, seed):
    gspo.RATIO_LEVEL, gspo.LENGTH_NORMALIZED_RATIO, gspo.CLIP_LOW, gspo.CLIP_HIGH = level, normalized, 0.1, 0.15
    batch = random_batch(seed)
    expected, clip_fraction = naive(*batch, level)
    expected_grad = torch.autograd.grad(expected, batch[0])[0]
    loss, grad, stats = loss_and_grad(*batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    assert stats["clip_fraction"] == pytest.approx(clip_fraction)
    assert clip_fraction > 0
    assert stats["ratio_min"] <= stats["ratio_mean"] <= stats["ratio_max"]


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "token"])
def test_padding_and_order_of_the_batch_change_nothing(level):
    gspo.RATIO_LEVEL = level
    logps, old_logps, advantages, mask = random_batch()
    loss, grad, stats = loss_and_grad(logps, old_logps, advantages, mask)
    garbage = torch.full((len(logps), 3), float("nan"), dtype=torch.float64)
    padded = [torch.cat([x.detach().masked_fill(~mask, math.inf), garbage], 1) for x in (logps, old_logps)]
    order = torch.randperm(len(logps), generator=torch.Generator().manual_seed(1))
    wide_mask = torch.cat([mask, torch.zeros_like(garbage, dtype=torch.bool)], 1)
    other, other_grad, other_stats = loss_and_grad(
        padded[0][order], padded[1][order], advantages[order], wide_mask[order]
    )
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_grad[:, : mask.shape[1]], grad[order])
    assert (other_grad[:, mask.shape[1] :] == 0).all()
    for name in stats:
        torch.testing.assert_close(other_stats[name], stats[name])


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "token"])
def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(level):
    gspo.RATIO_LEVEL = level
    logps, _, advantages, mask = random_batch()
    _, grad, stats = loss_and_grad(logps, logps.detach().clone(), advantages, mask)
    assert stats["ratio_min"] == stats["ratio_mean"] == stats["ratio_max"] == 1
    assert stats["clip_fraction"] == 0
    # REINFORCE: minus the mean over sequences of the advantage times the gradient of the mean log-prob
    expected = -(advantages / mask.sum(1) / len(mask))[:, None] * mask
    torch.testing.assert_close(grad, expected.to(grad.dtype))


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "token"])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "passes"),
    [
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (-0.5, 1.0, True),
        (-0.5, -1.0, False),
        (0.01, 1.0, True),
        (0.01, -1.0, True),
    ],
)
def test_the_clip_removes_the_gradient_on_the_right_side_only(level, log_ratio, advantage, passes):
    gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = level, 0.2, 0.2
    old_logps = torch.full((1, 4), -1.0, dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    _, grad, stats = loss_and_grad(old_logps + log_ratio, old_logps, torch.tensor([advantage]).double(), mask)
    assert (grad != 0).all() == passes
    assert (grad == 0).all() == (not passes)
    assert stats["clip_fraction"] == (not passes)


def test_with_one_token_gspo_is_token_level_ppo():
    logps, old_logps, advantages, _ = random_batch(tokens=2)
    first = [x[:, :1] for x in (logps.detach(), old_logps)]
    mask = torch.ones(len(logps), 1, dtype=torch.bool)
    gspo.CLIP_LOW = gspo.CLIP_HIGH = 0.1
    sequence = loss_and_grad(*first, advantages, mask, loss=gspo.compute_policy_loss_sequence_level)
    gspo.RATIO_LEVEL = "token"
    token = loss_and_grad(*first, advantages, mask, loss=gspo.compute_policy_loss_token_level)
    torch.testing.assert_close(sequence, token)


def test_gspo_token_is_gspo_with_one_advantage_per_sequence():
    gspo.CLIP_LOW, gspo.CLIP_HIGH = 0.05, 0.1
    batch = random_batch()
    expected = loss_and_grad(*batch)
    gspo.RATIO_LEVEL = "sequence_token"
    torch.testing.assert_close(loss_and_grad(*batch), expected)  # loss, gradient and statistics


def test_gspo_token_gives_each_token_its_own_advantage():
    gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = "sequence_token", 0.9, 9.0
    logps, old_logps, _, mask = random_batch()
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, grad, _ = loss_and_grad(logps, old_logps, advantages, mask)
    ratio = gspo.compute_sequence_ratio(logps, old_logps, mask).detach()
    expected = -(ratio / mask.sum(1) / len(mask))[:, None] * advantages * mask  # d s_it / d logp_it = s_i
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_functions_keep_the_dtype_they_are_given(dtype):
    logps, old_logps, advantages, mask = random_batch()
    loss, _ = gspo.compute_policy_loss(logps.detach().to(dtype), old_logps.to(dtype), advantages.to(dtype), mask)
    assert loss.dtype == dtype and loss.isfinite()
    assert gspo.compute_kl(logps.to(dtype), old_logps.to(dtype)).dtype == dtype
    assert gspo.compute_relative_advantages(torch.rand(8).to(dtype), 4).dtype == dtype


# ---- Advantages, KL and its controller


@pytest.mark.parametrize("kind", ["relative", "normalized"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 1 / 3, 1e-8, 1e8])
def test_dead_groups_are_exactly_zero(kind, reward):
    gspo.ADVANTAGE_TYPE = kind
    rewards = torch.tensor([reward] * 8 + [0.0, 1.0] * 4)
    advantages = gspo.compute_relative_advantages(rewards, 8)
    assert (advantages[:8] == 0).all()
    assert (advantages[8:] != 0).all()


def test_advantages_equal_the_naive_loop():
    rewards = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("relative", "normalized"):
        gspo.ADVANTAGE_TYPE = kind
        expected = []
        for group in rewards.view(3, 4).tolist():
            mean = sum(group) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
            expected += [(r - mean) / (std + 1e-6 if kind == "normalized" else 1) for r in group]
        assert gspo.compute_relative_advantages(rewards, 4).tolist() == pytest.approx(expected)


def test_whole_number_rewards_are_not_cut_to_whole_number_advantages():
    assert gspo.compute_relative_advantages(torch.tensor([1, 0, 0, 1]), 4).tolist() == [0.5, -0.5, -0.5, 0.5]


def test_kl_is_never_negative_and_unbiased_with_the_gradient_of_the_forward_kl():
    policy = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = policy.log_softmax(0)
    log_ref = torch.tensor([1.0, 0.1, -0.4, 0.3], dtype=torch.float64).log_softmax(0)
    k3 = gspo.compute_kl(log_p, log_ref)
    assert (k3 >= 0).all()
    assert gspo.compute_kl(log_p, log_p).abs().max() == 0
    exact = (log_p.exp() * (log_p - log_ref)).sum()
    torch.testing.assert_close((log_p.exp().detach() * k3).sum(), exact)
    forward = (log_ref.exp() * (log_ref - log_p)).sum()
    expected = torch.autograd.grad(forward, policy, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((log_p.exp().detach() * k3).sum(), policy)[0], expected)


@pytest.mark.parametrize(
    ("coef", "kl", "expected"),
    [
        (0.1, 0.021, 0.15),  # above twice the target
        (0.1, 0.02, 0.1),  # at twice: unchanged
        (0.1, 0.005, 0.1),  # at half: unchanged
        (0.1, 0.0049, 0.05),  # below half
        (0.9, 1.0, 1.0),  # held at the upper bound
        (0.015, 0.0, 0.01),  # and at the lower
    ],
)
def test_kl_controller(coef, kl, expected):
    gspo.TARGET_KL = 0.01
    assert gspo.next_kl_coef(coef, kl) == pytest.approx(expected)


def test_aggregate_is_the_mean_over_tokens_then_over_sequences():
    values, _, _, mask = random_batch()
    expected = sum(values[i][mask[i]].mean() for i in range(len(mask))) / len(mask)
    torch.testing.assert_close(gspo.aggregate(values, mask), expected)
    empty_row = torch.cat([mask, torch.zeros_like(mask[:1])])
    torch.testing.assert_close(gspo.aggregate(torch.cat([values, values[:1]]), empty_row), expected)
    assert gspo.loss_weight(empty_row) == len(mask)


# ---- Golden numbers of verl and TRL, float64


def golden_inputs(golden):
    names = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps", "advantages")
    tensors = [torch.tensor(golden[name], dtype=torch.float64) for name in names]
    return *tensors, torch.tensor(golden["completion_mask"], dtype=torch.bool)


def assert_equals_golden(loss, logps, case):
    grad = torch.autograd.grad(loss, logps)[0]
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, torch.tensor(case["grad"], dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("golden", GOLDEN)
def test_loss_and_gradient_equal_verl(golden):
    logps, old_logps, _, advantages, mask = golden_inputs(golden)
    cases = {"sequence": [], "token": []}
    for name, case in golden["policy_loss"].items():
        if case["algo"] == "gspo":
            cases["sequence"].append(case)
        elif case["algo"] == "token" and case["dual_clip"] > 1e8 and name.endswith("seq-mean-token-mean"):
            cases["token"].append(case)
    assert len(cases["sequence"]) >= 3 and len(cases["token"]) >= 2
    for level in cases:
        for case in cases[level]:
            gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = level, case["clip_low"], case["clip_high"]
            leaf = logps.clone().requires_grad_()
            loss, stats = gspo.compute_policy_loss(leaf, old_logps, advantages, mask)
            assert_equals_golden(loss, leaf, case)
            if level == "token":  # verl adds 1e-8 to its denominator, and counts GSPO's clip per token
                assert stats["clip_fraction"].item() == pytest.approx(case["stats"]["actor/pg_clipfrac"], rel=1e-6)


@pytest.mark.parametrize("golden", GOLDEN)
def test_loss_and_gradient_equal_trl(golden):
    logps, old_logps, ref_logps, advantages, mask = golden_inputs(golden)
    cases = [case for case in golden["trl"].values() if case["loss_type"] == "grpo" and case["delta"] is None]
    assert len(cases) >= 4
    for case in cases:
        gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = case["level"], case["clip_low"], case["clip_high"]
        leaf = logps.clone().requires_grad_()
        loss, _ = gspo.compute_policy_loss(leaf, old_logps, advantages, mask)
        loss = loss + case["beta"] * gspo.aggregate(gspo.compute_kl(leaf, ref_logps), mask)
        assert_equals_golden(loss, leaf, case)


@pytest.mark.parametrize("golden", GOLDEN)
def test_advantages_and_kl_equal_verl(golden):
    rewards = torch.tensor(golden["rewards"], dtype=torch.float64)
    for kind, name in (("normalized", "std"), ("relative", "no_std")):
        gspo.ADVANTAGE_TYPE = kind
        expected = torch.tensor(golden["group_advantages"][name], dtype=torch.float64)
        actual = gspo.compute_relative_advantages(rewards, golden["group_size"])
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    logps, _, ref_logps, _, _ = golden_inputs(golden)
    expected = torch.tensor(golden["kl"]["k3"], dtype=torch.float64)
    torch.testing.assert_close(gspo.compute_kl(logps, ref_logps), expected, rtol=1e-6, atol=1e-9)
