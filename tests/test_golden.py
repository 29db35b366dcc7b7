"""Losses, gradients, advantages and KL against what verl and TRL compute on the same inputs, in float64.

Each case names the script and the constants that equal the peer's settings, which is also the table in docs/peers.md.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS

import cispo
import dapo
import grpo
import gspo
import ppo

GOLDEN = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("losses-*.json"))]
OF_VERL = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum": "constant"}
OF_TRL = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "constant"}
over_golden = pytest.mark.parametrize("golden", GOLDEN, ids=["losses-1", "losses-2"])


def equals_of_verl(case):
    """Returns the (script, constants) that equal a case of verl's."""
    clip = {"CLIP_LOW": case["clip_low"], "CLIP_HIGH": case["clip_high"]}
    if case["algo"] == "gspo":
        return [(gspo, {**clip, "RATIO_LEVEL": level}) for level in ("sequence", "sequence_token")]
    if case["algo"] == "cispo":
        return [(cispo, {**clip, "LOSS_AGGREGATION": OF_VERL[case["aggregate"]]})]
    how, dual_clip = OF_VERL[case["aggregate"]], case["dual_clip"] if case["dual_clip"] < 1e8 else 0.0
    equal = [(grpo, {**clip, "LOSS_AGGREGATION": how, "LOSS_DIVISOR": 1, "DUAL_CLIP": dual_clip})]
    if not dual_clip and how != "constant":
        equal.append((dapo, {**clip, "LOSS_AGGREGATION": how}))
    if how == "token_mean":
        equal.append((ppo, {**clip, "DUAL_CLIP": dual_clip}))
    if not dual_clip and how == "sequence_mean":
        equal.append((gspo, {**clip, "RATIO_LEVEL": "token"}))
    return equal


def equals_of_trl(case):
    """Returns the (script, constants) that equal a case of TRL's.

    TRL's delta is a dual clip if it is above 1 + CLIP_HIGH.
    """
    clip = {"CLIP_LOW": case["clip_low"], "CLIP_HIGH": case["clip_high"]}
    if case["loss_type"] == "cispo":  # its bound is absolute, and there is no lower one
        return [(cispo, {"CLIP_LOW": 1.0, "CLIP_HIGH": case["clip_high"] - 1, "LOSS_AGGREGATION": "token_mean"})]
    if case["level"] == "sequence":
        return [(gspo, {**clip, "RATIO_LEVEL": level}) for level in ("sequence", "sequence_token")]
    how, divisor = OF_TRL[case["loss_type"]], case["max_completion_length"]
    grpos = {"LOSS_AGGREGATION": how, "LOSS_DIVISOR": divisor, "DUAL_CLIP": case["delta"] or 0.0}
    equal = [(grpo, {**clip, **grpos})]
    if not case["delta"] and how != "constant":
        equal.append((dapo, {**clip, "LOSS_AGGREGATION": how}))
    if not case["delta"] and how == "sequence_mean":
        equal.append((gspo, {**clip, "RATIO_LEVEL": "token"}))
    return equal


def inputs(golden):
    names = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps", "advantages")
    logps, *others = (torch.tensor(golden[name], dtype=torch.float64) for name in names)
    return logps.requires_grad_(), *others, torch.tensor(golden["completion_mask"], dtype=torch.bool)


def assert_equals(loss, logps, case):
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-9)
    expected = torch.tensor(case["grad"], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], expected, rtol=1e-6, atol=1e-9)


@over_golden
def test_loss_gradient_and_clip_fraction_equal_verl(golden):
    logps, old_logps, _, advantages, mask = inputs(golden)
    compared = []
    for case in golden["policy_loss"].values():
        for script, constants in equals_of_verl(case):
            vars(script).update(constants)
            loss, stats = script.compute_policy_loss(logps, old_logps, advantages, mask)
            assert_equals(loss, logps, case)
            if case["algo"] != "gspo":  # for GSPO, verl counts tokens, and gspo.py sequences
                assert stats["clip_fraction"].item() == pytest.approx(case["stats"]["actor/pg_clipfrac"], rel=1e-6)
            compared.append(script)
    assert [compared.count(script) for script in (gspo, grpo, dapo, cispo, ppo)] == [8, 9, 4, 1, 3]


@over_golden
def test_loss_and_gradient_equal_trl(golden):
    logps, old_logps, ref_logps, advantages, mask = inputs(golden)
    compared = []
    for case in golden["trl"].values():
        for script, constants in equals_of_trl(case):
            vars(script).update(constants)
            loss, _ = script.compute_policy_loss(logps, old_logps, advantages, mask)
            loss = loss + case["beta"] * script.compute_kl_loss(logps, old_logps, ref_logps, mask)
            assert_equals(loss, logps, case)
            compared.append(script)
    assert [compared.count(script) for script in (gspo, grpo, dapo, cispo)] == [6, 5, 3, 1]


@over_golden
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_advantages_and_kl_equal_verl(golden, script):
    rewards = torch.tensor(golden["rewards"], dtype=torch.float64)
    for kind, name in (("normalized", "std"), ("relative", "no_std")):
        script.ADVANTAGE_TYPE = kind
        expected = torch.tensor(golden["group_advantages"][name], dtype=torch.float64)
        if hasattr(script, "compute_relative_advantages"):
            actual = script.compute_relative_advantages(rewards, golden["group_size"])
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    logps, _, ref_logps, _, _ = inputs(golden)
    expected = torch.tensor(golden["kl"]["k3"], dtype=torch.float64)
    torch.testing.assert_close(script.compute_kl(logps.detach(), ref_logps), expected, rtol=1e-6, atol=1e-9)


@over_golden
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_verl(golden, estimator):
    logps, old_logps, ref_logps, _, mask = inputs(golden)
    grpo.KL_ESTIMATOR = estimator
    values = torch.tensor(golden["kl"][estimator], dtype=torch.float64)
    expected = sum(values[i][mask[i]].mean() for i in range(len(mask))) / len(mask)
    actual = grpo.compute_kl_loss(logps.detach(), old_logps, ref_logps, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
