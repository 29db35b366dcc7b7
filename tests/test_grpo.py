"""grpo.py's own functions against naive loops, closed forms, and what verl and TRL compute."""

import json
import math
from pathlib import Path

import pytest
import torch

import grpo

GOLDEN = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "golden").glob("losses-*.json"))]
AGGREGATION = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum": "constant"}
OF_TRL = {"grpo": "sequence_mean", "dapo": "token_mean", "dr_grpo": "constant"}


def inputs(golden):
    names = ("per_token_logps", "old_per_token_logps", "ref_per_token_logps", "advantages")
    logps, *others = (torch.tensor(golden[name], dtype=torch.float64) for name in names)
    return logps.requires_grad_(), *others, torch.tensor(golden["completion_mask"], dtype=torch.bool)


def assert_equals(loss, logps, case):
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=1e-9)
    expected = torch.tensor(case["grad"], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("golden", GOLDEN)
def test_loss_and_gradient_equal_verl(golden):
    logps, old_logps, _, advantages, mask = inputs(golden)
    cases = [case for case in golden["policy_loss"].values() if case["algo"] == "token"]
    assert len(cases) >= 9
    for case in cases:
        grpo.CLIP_LOW, grpo.CLIP_HIGH = case["clip_low"], case["clip_high"]
        grpo.DUAL_CLIP = case["dual_clip"] if case["dual_clip"] < 1e8 else 0.0
        grpo.LOSS_AGGREGATION, grpo.LOSS_DIVISOR = AGGREGATION[case["aggregate"]], 1
        loss, stats = grpo.compute_policy_loss(logps, old_logps, advantages, mask)
        assert_equals(loss, logps, case)
        assert stats["clip_fraction"].item() == pytest.approx(case["stats"]["actor/pg_clipfrac"], rel=1e-6)


@pytest.mark.parametrize("golden", GOLDEN)
def test_loss_and_gradient_equal_trl(golden):
    logps, old_logps, ref_logps, advantages, mask = inputs(golden)
    cases = [case for case in golden["trl"].values() if case["level"] == "token" and case["loss_type"] in OF_TRL]
    assert {case["loss_type"] for case in cases} == set(OF_TRL) and any(case["delta"] for case in cases)
    for case in cases:
        grpo.DUAL_CLIP = case["delta"] or 0.0  # TRL's delta caps the ratio, which is the same for delta > 1 + CLIP_HIGH
        grpo.CLIP_LOW, grpo.CLIP_HIGH = case["clip_low"], case["clip_high"]
        grpo.LOSS_AGGREGATION, grpo.LOSS_DIVISOR = OF_TRL[case["loss_type"]], case["max_completion_length"]
        loss, _ = grpo.compute_policy_loss(logps, old_logps, advantages, mask)
        loss = loss + case["beta"] * grpo.compute_kl_loss(logps, old_logps, ref_logps, mask)
        assert_equals(loss, logps, case)


@pytest.mark.parametrize("golden", GOLDEN)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_verl(golden, estimator):
    logps, old_logps, ref_logps, _, mask = inputs(golden)
    grpo.KL_ESTIMATOR = estimator
    values = torch.tensor(golden["kl"][estimator], dtype=torch.float64)
    expected = sum(values[i][mask[i]].mean() for i in range(len(mask))) / len(mask)
    torch.testing.assert_close(grpo.compute_kl_loss(logps, old_logps, ref_logps, mask), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "ratio_k3"])
def test_kl_estimators_have_the_stated_gradients(estimator):
    """Exact expectations over a distribution of four tokens, one completion of one token each."""
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


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_parts_of_a_batch_add_up_by_their_weights(aggregation):
    grpo.LOSS_AGGREGATION, grpo.LOSS_DIVISOR = aggregation, 5
    values = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([1, 7, 3, 4, 2, 6])[:, None]
    naive = {
        "sequence_mean": sum(values[i][mask[i]].mean() for i in range(6)) / 6,
        "token_mean": values[mask].mean(),
        "constant": values[mask].sum() / 5 / 6,
    }[aggregation]
    torch.testing.assert_close(grpo.aggregate(values, mask), naive)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    shares = [grpo.loss_weight(mask[part]) / grpo.loss_weight(mask) for part in parts]
    together = sum(share * grpo.aggregate(values[part], mask[part]) for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(together, naive)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "passes"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (2.0, -1.0, False)],
)
def test_clip_and_dual_clip_remove_the_gradient_on_their_side_only(log_ratio, advantage, passes):
    grpo.DUAL_CLIP = 3.0
    old_logps = torch.full((1, 4), -1.0, dtype=torch.float64)
    logps = (old_logps + log_ratio).requires_grad_()
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, _ = grpo.compute_policy_loss(logps, old_logps, torch.tensor([advantage]).double(), mask)
    assert bool((torch.autograd.grad(loss, logps)[0] != 0).all()) == passes
    if log_ratio == 2.0:
        assert loss.item() == pytest.approx(3.0) and math.exp(2.0) > 3


def test_a_run_of_two_steps_learns_from_every_parameter_and_writes_its_folder(tmp_path):
    vars(grpo).update(
        MAX_STEPS=2, BATCH_SIZE=4, GROUP_SIZE=4, MINI_BATCHES=2, EVAL_SIZE=6, EVAL_SAMPLES=2, WARMUP_STEPS=0,
        MAX_COMPLETION_TOKENS=40, OUTPUT_DIR=str(tmp_path / "outputs"),
    )  # fmt: skip
    trainer = grpo.GRPOTrainer()
    before = {name: parameter.detach().clone() for name, parameter in trainer.policy.named_parameters()}
    assert [row["step"] for row in trainer.train()] == [0, 1, 2]
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trainer.policy.named_parameters())
    assert trainer.run.folder.name.startswith("grpo-")
    for name in ("grpo.py", "config.json", "metrics.jsonl", "metrics.png", "samples.jsonl", "final/model.safetensors"):
        assert (trainer.run.folder / name).is_file()
