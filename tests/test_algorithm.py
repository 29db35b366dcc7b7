"""What every script's algorithm must do, at each setting of its loss: against naive loops and closed forms."""

import math
import statistics

import pytest
import torch
from conftest import SCRIPTS
from variants import loss_and_grad, naive_loss, naive_mean, over_clipped_losses, over_variants, random_batch

over_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
GROUPED = [script for script in SCRIPTS if hasattr(script, "compute_relative_advantages")]
over_grouped = pytest.mark.parametrize("script", GROUPED, ids=lambda script: script.__name__)


@over_variants
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradient_and_clip_fraction_equal_the_naive_loop(script, constants, seed):
    vars(script).update(constants, CLIP_LOW=0.1, CLIP_HIGH=0.15)
    batch = random_batch(seed)
    expected, clip_fraction = naive_loss(script, *batch)
    expected_grad = torch.autograd.grad(expected, batch[0])[0]
    loss, grad, stats = loss_and_grad(script.compute_policy_loss, *batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    assert stats["clip_fraction"] == pytest.approx(clip_fraction)
    assert clip_fraction > 0
    assert stats["ratio_min"] <= stats["ratio_mean"] <= stats["ratio_max"]


@over_variants
def test_padding_and_order_of_the_batch_change_nothing(script, constants):
    vars(script).update(constants)
    logps, old_logps, advantages, mask = random_batch()
    loss, grad, stats = loss_and_grad(script.compute_policy_loss, logps, old_logps, advantages, mask)
    garbage = torch.full((len(logps), 3), float("nan"), dtype=torch.float64)
    padded = [torch.cat([x.detach().masked_fill(~mask, math.inf), garbage], 1) for x in (logps, old_logps)]
    order = torch.randperm(len(logps), generator=torch.Generator().manual_seed(1))
    wide_mask = torch.cat([mask, torch.zeros_like(garbage, dtype=torch.bool)], 1)
    other, other_grad, other_stats = loss_and_grad(
        script.compute_policy_loss, padded[0][order], padded[1][order], advantages[order], wide_mask[order]
    )
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_grad[:, : mask.shape[1]], grad[order])
    assert (other_grad[:, mask.shape[1] :] == 0).all()
    for name in stats:
        torch.testing.assert_close(other_stats[name], stats[name])


@over_variants
def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(script, constants):
    vars(script).update(constants)
    logps, _, advantages, mask = random_batch()
    _, grad, stats = loss_and_grad(script.compute_policy_loss, logps, logps.detach().clone(), advantages, mask)
    assert stats["ratio_min"] == stats["ratio_mean"] == stats["ratio_max"] == 1
    assert stats["clip_fraction"] == 0
    terms = [list(advantages[i] * logps[i][mask[i]]) for i in range(len(mask))]  # REINFORCE: −mean A log π
    if not getattr(script, "LENGTH_NORMALIZED_RATIO", True):
        terms = [[sum(sequence)] for sequence in terms]
    expected = torch.autograd.grad(-naive_mean(script, terms), logps)[0]
    torch.testing.assert_close(grad, expected)


@over_clipped_losses
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "passes"),
    [
        (0.5, 1.0, False),
        (0.3, -1.0, True),  # 1.35, which DUAL_CLIP = 1.5 leaves alone
        (-0.5, 1.0, True),
        (-0.5, -1.0, False),
        (0.01, 1.0, True),
        (0.01, -1.0, True),
    ],
)
def test_the_clip_removes_the_gradient_on_the_right_side_only(script, constants, log_ratio, advantage, passes):
    vars(script).update(constants, CLIP_LOW=0.2, CLIP_HIGH=0.2)
    tokens = 4 if getattr(script, "LENGTH_NORMALIZED_RATIO", True) else 1
    old_logps = torch.full((1, tokens), -1.0, dtype=torch.float64)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    _, grad, stats = loss_and_grad(
        script.compute_policy_loss, old_logps + log_ratio, old_logps, torch.tensor([advantage]).double(), mask
    )
    assert (grad != 0).all() == passes
    assert (grad == 0).all() == (not passes)
    assert stats["clip_fraction"] == (not passes)


@over_variants
def test_parts_of_a_batch_add_up_by_their_weights(script, constants):
    vars(script).update(constants)
    values, _, _, mask = random_batch(seed=4)
    values = values.detach()
    whole = naive_mean(script, [list(values[i][mask[i]]) for i in range(len(mask))])
    torch.testing.assert_close(script.aggregate(values, mask), whole)
    empty_row = torch.cat([mask, torch.zeros_like(mask[:1])])  # a row without a token is none
    torch.testing.assert_close(script.aggregate(torch.cat([values, values[:1]]), empty_row), whole)
    assert script.token_weights(empty_row)[1] == script.token_weights(mask)[1]
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    shares = [script.token_weights(mask[part])[1] / script.token_weights(mask)[1] for part in parts]
    sums = [share * script.aggregate(values[part], mask[part]) for share, part in zip(shares, parts, strict=True)]
    torch.testing.assert_close(sum(sums), whole)


@over_variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_functions_keep_the_dtype_they_are_given(script, constants, dtype):
    vars(script).update(constants)
    logps, old_logps, advantages, mask = random_batch()
    loss, _ = script.compute_policy_loss(logps.detach().to(dtype), old_logps.to(dtype), advantages.to(dtype), mask)
    assert loss.dtype == dtype and loss.isfinite()
    assert script.compute_kl(logps.to(dtype), old_logps.to(dtype)).dtype == dtype
    if script in GROUPED:
        assert script.compute_relative_advantages(torch.rand(8).to(dtype), 4).dtype == dtype


# ---- Advantages, KL and its controller


@over_grouped
@pytest.mark.parametrize("kind", ["relative", "normalized"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 1 / 3, 1e-8, 1e8])
def test_dead_groups_are_exactly_zero(script, kind, reward):
    script.ADVANTAGE_TYPE = kind
    rewards = torch.tensor([reward] * 8 + [0.0, 1.0] * 4)
    advantages = script.compute_relative_advantages(rewards, 8)
    assert (advantages[:8] == 0).all()
    assert (advantages[8:] != 0).all()


@over_grouped
def test_advantages_equal_the_naive_loop(script):
    rewards = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("relative", "normalized"):
        script.ADVANTAGE_TYPE = kind
        expected = []
        for group in rewards.view(3, 4).tolist():
            mean = sum(group) / 4
            std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
            expected += [(r - mean) / (std + 1e-6 if kind == "normalized" else 1) for r in group]
        assert script.compute_relative_advantages(rewards, 4).tolist() == pytest.approx(expected)


@over_grouped
def test_whole_number_rewards_are_not_cut_to_whole_number_advantages(script):
    script.ADVANTAGE_TYPE = "relative"
    assert script.compute_relative_advantages(torch.tensor([1, 0, 0, 1]), 4).tolist() == [0.5, -0.5, -0.5, 0.5]


@over_scripts
def test_kl_is_never_negative_and_unbiased_with_the_gradient_of_the_forward_kl(script):
    policy = torch.tensor([0.3, -0.2, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    log_p = policy.log_softmax(0)
    log_ref = torch.tensor([1.0, 0.1, -0.4, 0.3], dtype=torch.float64).log_softmax(0)
    k3 = script.compute_kl(log_p, log_ref)
    assert (k3 >= 0).all()
    assert script.compute_kl(log_p, log_p).abs().max() == 0
    exact = (log_p.exp() * (log_p - log_ref)).sum()
    torch.testing.assert_close((log_p.exp().detach() * k3).sum(), exact)
    forward = (log_ref.exp() * (log_ref - log_p)).sum()
    expected = torch.autograd.grad(forward, policy, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((log_p.exp().detach() * k3).sum(), policy)[0], expected)


@over_scripts
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
def test_kl_controller(script, coef, kl, expected):
    script.TARGET_KL = 0.01
    assert script.next_kl_coef(coef, kl) == pytest.approx(expected)


# ---- Rewards per token


@over_grouped
@pytest.mark.parametrize("kind", ["relative", "normalized"])
def test_token_advantages_are_the_groups_returns_to_go_less_their_mean(script, kind):
    script.ADVANTAGE_TYPE = kind
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 3, 4, 5])[:, None]
    rewards[3:] = 0.0  # a group without signal
    found = script.compute_token_advantages(rewards.masked_fill(~mask, float("nan")), mask, 3)
    returns = [[sum(row[t:n].tolist()) for t in range(n)] for row, n in zip(rewards, mask.sum(1).tolist(), strict=True)]
    group = [value for row in returns[:3] for value in row]
    scale = statistics.stdev(group) + 1e-6 if kind == "normalized" else 1.0
    for i, row in enumerate(returns[:3]):
        assert found[i, : len(row)].tolist() == pytest.approx([(v - statistics.mean(group)) / scale for v in row])
    assert (found[~mask] == 0).all() and (found[3:] == 0).all()
    one = torch.zeros(6, 5, dtype=torch.float64)
    one[:, 0] = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 3.0])  # one token each: the advantages of whole completions
    first = script.compute_token_advantages(one, torch.arange(5) < torch.ones(6, 1), 3)[:, 0]
    torch.testing.assert_close(first, script.compute_relative_advantages(one[:, 0], 3))
