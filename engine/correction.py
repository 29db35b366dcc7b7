"""Corrects for a sampler whose log-probs are not the trainer's, such as another engine's: SAMPLER_CORRECTION."""

import math

import torch

MOST = 2.0  # the largest weight of a token
TRUSTED = math.log(0.99), math.log(1.01)  # a completion's mean of log π_old/π_sampled, nats per token


def log_mismatch(rollouts):
    """Returns log π_old/π_sampled of each token, (B, T) where old_logps are, without gradient, 0 where masked."""
    old_logps = rollouts.old_logps.detach()
    mask, sampled_logps = (x.to(old_logps.device) for x in (rollouts.completion_mask, rollouts.sampled_logps))
    return (old_logps - sampled_logps).masked_fill(~mask, 0.0)


def corrected_advantages(rollouts, correction):
    """Returns the advantages as the loss takes them, without gradient: (B,), or (B, T) if they are corrected.

    "token" multiplies them with min(π_old/π_sampled, 2) of each token: truncated importance sampling (Yao et al. 2025,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"). The weight is positive, so it scales the
    clipped loss too. The other corrections do not change the advantages.
    """
    if correction != "token":
        return rollouts.advantages
    weights = log_mismatch(rollouts).clamp(max=math.log(MOST)).exp()
    return rollouts.advantages.view(len(weights), -1) * weights


def trusted(rollouts, correction):
    """Returns which completions an update may count, (B,) on the CPU: all, unless the correction is "sequence".

    Then it is those whose geometric mean of π_old/π_sampled is within 0.99 to 1.01 (Liu et al. 2025, "When Speed Kills
    Stability"). Others are left out of the loss and of what it is divided by.
    """
    if correction != "sequence":
        return torch.ones(len(rollouts.texts), dtype=torch.bool)
    lengths = rollouts.completion_mask.sum(1).clamp(min=1)
    mean = log_mismatch(rollouts).sum(1).cpu() / lengths
    return (mean > TRUSTED[0]) & (mean < TRUSTED[1])


def correction_metrics(rollouts, correction):
    """Returns metrics of what a correction did in a step; none if there is none.

    "token" has sampler_weight, the mean over tokens, and sampler_capped, the share of tokens whose weight was cut to 2.
    "sequence" has sampler_dropped, the share of completions that were left out.

    A completion that moves nothing has no π_old of its own, and counts as one that agrees.
    """
    if correction == "sequence":
        return {"sampler_dropped": (~trusted(rollouts, correction)).double().mean().item()}
    if correction == "token":
        weights = log_mismatch(rollouts)[rollouts.completion_mask.to(rollouts.old_logps.device)].exp().double()
        capped = (weights > MOST).double().mean().item()
        return {"sampler_weight": weights.clamp(max=MOST).mean().item(), "sampler_capped": capped}
    return {}
