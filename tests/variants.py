"""Every script with each setting of the constants that change its loss, and the objectives as in the papers."""

import pytest
import torch

import cispo
import dapo
import grpo
import gspo
import ppo
import vapo

VARIANTS = [
    *[(gspo, {"RATIO_LEVEL": level}) for level in ("sequence", "sequence_token", "token")],
    (gspo, {"RATIO_LEVEL": "sequence", "LENGTH_NORMALIZED_RATIO": False}),
    *[(grpo, {"LOSS_AGGREGATION": how}) for how in ("sequence_mean", "token_mean", "constant")],
    (grpo, {"DUAL_CLIP": 1.5}),
    *[(dapo, {"LOSS_AGGREGATION": how}) for how in ("token_mean", "sequence_mean")],
    *[(cispo, {"LOSS_AGGREGATION": how}) for how in ("token_mean", "sequence_mean")],
    *[(ppo, {"DUAL_CLIP": clip}) for clip in (0.0, 1.5)],
    *[(vapo, {"LOSS_AGGREGATION": how}) for how in ("token_mean", "sequence_mean")],
]


def over(variants):
    ids = ["-".join([script.__name__, *map(str, constants.values())]) for script, constants in variants]
    return pytest.mark.parametrize(("script", "constants"), variants, ids=ids)


over_variants = over(VARIANTS)
over_clipped_losses = over([variant for variant in VARIANTS if variant[0] is not cispo])  # its clip drops no gradient


def sequence_level(script):
    return script is gspo and script.RATIO_LEVEL != "token"


def naive_loss(script, logps, old_logps, advantages, completion_mask):
    """Returns −J, computed token by token, and the share of ratios that the clip acts on."""
    terms, clipped, ratios_seen = [], 0, 0
    for i in range(len(logps)):
        tokens = [t for t in range(logps.shape[1]) if completion_mask[i, t]]
        ratios = [(logps[i, t] - old_logps[i, t]).exp() for t in tokens]
        if sequence_level(script):
            product = torch.stack(ratios).prod()
            ratios = [product ** (1 / len(tokens)) if script.LENGTH_NORMALIZED_RATIO else product]
        losses, a = [], advantages[i]
        for t, ratio in zip(tokens, ratios, strict=False):  # of sequences, there is one ratio
            held = min(max(ratio, 1 - script.CLIP_LOW), 1 + script.CLIP_HIGH)
            if script is cispo:
                losses.append(-float(torch.as_tensor(held).detach()) * a * logps[i, t])
                clipped += held != ratio
                ratios_seen += 1
                continue
            loss = -min(ratio * a, held * a)
            if getattr(script, "DUAL_CLIP", 0) and a < 0:
                loss = min(loss, -script.DUAL_CLIP * a)
            losses.append(loss)
            clipped += bool(a > 0 and ratio > 1 + script.CLIP_HIGH or a < 0 and ratio < 1 - script.CLIP_LOW)
            ratios_seen += 1
        terms.append(losses)
    return naive_mean(script, terms), clipped / ratios_seen


def naive_mean(script, terms):
    """Returns the aggregation of LOSS_AGGREGATION. terms: a list per sequence, with one number per token."""
    how = getattr(script, "LOSS_AGGREGATION", "token_mean" if script is ppo else "sequence_mean")
    if how == "token_mean":
        return sum(sum(sequence) for sequence in terms) / sum(len(sequence) for sequence in terms)
    divisor = script.LOSS_DIVISOR if how == "constant" else None
    return sum(sum(sequence) / (divisor or len(sequence)) for sequence in terms) / len(terms)


def random_batch(seed=0, batch=6, tokens=9, spread=0.6):
    """Returns logps (with gradient), old_logps, advantages and completion_mask, in float64.

    The first row has a single token.
    """
    generator = torch.Generator().manual_seed(seed)
    old_logps = -torch.rand(batch, tokens, dtype=torch.float64, generator=generator) * 3
    logps = old_logps + spread * torch.randn(batch, tokens, dtype=torch.float64, generator=generator)
    advantages = torch.randn(batch, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    lengths[0], lengths[1] = 1, tokens
    return logps.requires_grad_(), old_logps, advantages, torch.arange(tokens) < lengths[:, None]


def loss_and_grad(loss, logps, *rest):
    """Returns a loss function's value, its gradient with respect to logps, and its statistics."""
    logps = logps.detach().clone().requires_grad_()
    value, stats = loss(logps, *rest)
    value.backward()
    return value.detach(), logps.grad, stats
