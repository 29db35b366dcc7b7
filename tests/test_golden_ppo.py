"""ppo.py and cispo.py against what verl, OpenRLHF, NeMo-RL and TRL compute on the same inputs, in float64.

tests/golden/ppo-*.json says in its `about` what each block is, and in `by` who gave its numbers.
"""

import json
from pathlib import Path

import pytest
import torch

import cispo
import ppo
import vapo

GOLDEN = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("ppo-*.json"))]
over_golden = pytest.mark.parametrize("golden", GOLDEN, ids=["ppo-11", "ppo-12"])


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def inputs(golden, *names):
    found = [tensor(golden["inputs"][name]) for name in names]
    return *found, torch.tensor(golden["inputs"]["completion_mask"], dtype=torch.bool)


def close(actual, expected):
    torch.testing.assert_close(actual.detach(), tensor(expected), rtol=1e-6, atol=1e-9)


def loss_and_gradient(function, variable, *rest):
    variable = variable.clone().requires_grad_()
    loss, stats = function(variable, *rest)
    return loss, torch.autograd.grad(loss, variable)[0], stats


@over_golden
def test_the_kl_in_the_rewards_equals_the_peers(golden):
    block = golden["kl_in_reward"]
    scores, old_logps, ref_logps, mask = inputs(golden, "scores", "old_logps", "ref_logps")
    ppo.KL_COEF = block["beta"]
    close(ppo.compute_token_rewards(scores, old_logps, ref_logps, mask), block["k1"]["token_rewards"])
    clipped = ppo.compute_token_rewards(scores.clamp(-0.5, 0.5), old_logps, ref_logps, mask)
    close(clipped, block["k1, score clipped to +-0.5"]["token_rewards"])
    close(ppo.compute_token_rewards(scores, old_logps, ref_logps, mask, kl_coef=0.0).sum(1), scores.tolist())


@over_golden
def test_advantages_returns_and_whitening_equal_the_peers(golden):
    scores, old_logps, ref_logps, values, mask = inputs(golden, "scores", "old_logps", "ref_logps", "values")
    ppo.KL_COEF = golden["kl_in_reward"]["beta"]
    cases = [case for name, case in golden["gae"].items() if name != "about"]
    assert len(cases) == 5
    for case in cases:
        ppo.GAMMA, ppo.LAMBDA = case["gamma"], case["lam"]
        reference = ref_logps if case["rewards"] == "k1" else None
        rewards = ppo.compute_token_rewards(scores, old_logps, reference, mask)
        advantages, returns = ppo.compute_gae(rewards, values, mask)
        close(advantages, case["advantages"])
        close(returns, case["returns"])
        close(ppo.whiten(advantages, mask), case["whitened"])


@over_golden
def test_advantages_and_returns_equal_trl_over_its_longer_mask(golden):
    """TRL has a value one place after the last token, so its mask is longer by one where there is room."""
    _, mask = inputs(golden, "scores")
    (values,), longer = inputs(golden, "values")[:1], torch.tensor(golden["inputs"]["mask_p1"], dtype=torch.bool)
    compared = 0
    for name, case in golden["gae_trl"].items():
        if name == "about":
            continue
        ppo.GAMMA, ppo.LAMBDA = case["gamma"], case["lam"]
        advantages, returns = ppo.compute_gae(tensor(case["token_rewards"]), values, longer)
        close(advantages, case["advantages"])
        close(returns, case["returns"])
        close(ppo.whiten(advantages, mask), case["whitened"])
        compared += 1
    assert compared == 4


@over_golden
def test_the_value_loss_and_its_gradient_equal_the_peers(golden):
    new_values, values, mask = inputs(golden, "new_values", "values")
    returns, compared = tensor(golden["gae"]["gamma 1.0 lam 0.95 scores"]["returns"]), 0
    for case in golden["value_loss"].values():
        if not isinstance(case, dict) or case.get("aggregate") != "token-mean":
            continue  # ppo.py has no mean over sequences
        ppo.VALUE_CLIP = case["clip"]
        loss, grad, stats = loss_and_gradient(ppo.compute_value_loss, new_values, values, returns, mask)
        close(loss, case["loss"])
        close(grad, case["grad"])
        close(stats["value_clip_fraction"], case["clip_fraction"])
        compared += 1
    assert compared == 3


@over_golden
def test_the_policy_loss_and_its_gradient_equal_the_peers(golden):
    logps, old_logps, advantages, mask = inputs(golden, "logps", "old_logps", "token_advantages")
    compared = 0
    for case in golden["policy_loss"].values():
        if not isinstance(case, dict) or case["aggregate"] != "token-mean":
            continue
        ppo.CLIP_LOW, ppo.CLIP_HIGH, ppo.DUAL_CLIP = case["clip_low"], case["clip_high"], case["dual_clip"]
        loss, grad, stats = loss_and_gradient(ppo.compute_policy_loss, logps, old_logps, advantages, mask)
        close(loss, case["loss"])
        close(grad, case["grad"])
        close(stats["clip_fraction"], case["clip_fraction"])
        compared += 1
    assert compared == 5


@over_golden
def test_the_policy_loss_by_sequences_equals_the_peers(golden):
    logps, old_logps, advantages, mask = inputs(golden, "logps", "old_logps", "token_advantages")
    compared = 0
    for case in golden["policy_loss"].values():
        if not isinstance(case, dict):
            continue
        vapo.CLIP_LOW, vapo.CLIP_HIGH, vapo.DUAL_CLIP = case["clip_low"], case["clip_high"], case["dual_clip"]
        vapo.LOSS_AGGREGATION = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}[case["aggregate"]]
        loss, grad, _ = loss_and_gradient(vapo.compute_policy_loss, logps, old_logps, advantages, mask)
        close(loss, case["loss"])
        close(grad, case["grad"])
        compared += 1
    assert compared == 7


def set_lambdas(case):
    vapo.ALPHA, vapo.LAMBDA_CRITIC = case["alpha"], case["lam_value"]
    vapo.LAMBDA = vapo.LAMBDA if case["lam_policy"] is None else case["lam_policy"]


@over_golden
def test_vapos_lambda_advantages_and_returns_equal_nemo_rl(golden):
    block = golden["vapo"]
    rewards, values, mask = inputs(block, "rewards", "values")
    assert len(block["gae"]) == 4
    for case in block["gae"].values():
        set_lambdas(case)
        if case["alpha"]:
            close(vapo.length_adaptive_lambda(mask.sum(1)), case["lambdas"])
        token_rewards = vapo.compute_token_rewards(rewards, values, None, mask)
        advantages, returns = vapo.compute_gae(token_rewards, values, mask)
        close(advantages, case["advantages"])
        close(returns, case["returns"])
        close(vapo.whiten(advantages, mask), case["whitened"])


@over_golden
def test_vapos_loss_with_right_completions_equals_nemo_rl(golden):
    block = golden["vapo"]
    rewards, values, old_logps, logps, mask = inputs(block, "rewards", "values", "old_logps", "logps")
    correct = rewards > 0
    assert len(block["loss"]) == 3
    for case in block["loss"].values():
        set_lambdas(block["gae"][case["advantages"]])
        vapo.CLIP_LOW, vapo.CLIP_HIGH, vapo.DUAL_CLIP = case["clip_low"], case["clip_high"], case["dual_clip"]
        token_rewards = vapo.compute_token_rewards(rewards, values, None, mask)
        advantages, _ = vapo.compute_gae(token_rewards, values, mask)
        close(vapo.compute_positive_loss(logps, correct, mask), case["nll"])

        def loss_of(logps, *rest, weight=case["nll_weight"]):
            loss, stats = vapo.compute_policy_loss(logps, *rest)
            return loss + weight * vapo.compute_positive_loss(logps, correct, mask), stats

        loss, grad, _ = loss_and_gradient(loss_of, logps, old_logps, advantages, mask)
        close(loss, case["loss"])
        close(grad, case["grad"])


@over_golden
def test_cispo_equals_the_peers(golden):
    logps, old_logps, advantages, mask = inputs(golden, "logps", "old_logps", "sequence_advantages")
    how, compared = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}, 0
    for case in golden["cispo"].values():
        if not isinstance(case, dict):
            continue
        cispo.CLIP_LOW, cispo.CLIP_HIGH = 1 - max(case["weight_min"], 0.0), case["weight_max"] - 1
        cispo.LOSS_AGGREGATION = how[case["aggregate"]]
        loss, grad, stats = loss_and_gradient(cispo.compute_policy_loss, logps, old_logps, advantages, mask)
        close(loss, case["loss"])
        close(grad, case["grad"])
        close(stats["clip_fraction"], case["clipped"])
        compared += 1
    assert compared == 8
