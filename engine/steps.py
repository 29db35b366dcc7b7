"""The optimizer's steps: what they are taken on, their learning rate, and their size."""

import math

import torch
from torch.distributed.tensor import DTensor

from engine.processes import add_up, from_all
from engine.sharding import whole


def learning_rate_at(step, c, prefix=""):
    """Returns the learning rate of a step (from 1): linear warm-up, then LR_SCHEDULE.

    The policy's is 0 in the steps in which it rests, and its warm-up begins after them. c: the script's constants.
    prefix: "CRITIC_" for CRITIC_LEARNING_RATE and CRITIC_LR_SCHEDULE.
    """
    peak, schedule = getattr(c, prefix + "LEARNING_RATE"), getattr(c, prefix + "LR_SCHEDULE")
    resting = 0 if prefix else c.resting_steps
    step, last = max(0, step - resting), c.MAX_STEPS - resting
    if step <= c.WARMUP_STEPS:
        return peak * step / max(1, c.WARMUP_STEPS)
    progress = (step - c.WARMUP_STEPS - 1) / max(1, last - c.WARMUP_STEPS)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * factor[schedule]


def split_at_random(rows, parts, together, generator):
    """Returns the numbers of completions, rows (n,), ascending, as at most that many parts of like size, at random.

    together: completions that stay together, such as a group's, of which some may be missing in rows.
    """
    sizes = (rows // together).unique_consecutive(return_counts=True)[1]
    units = rows.split(sizes.tolist())
    order = torch.randperm(len(units), generator=generator)
    return [torch.cat([units[i] for i in some]) for some in order.tensor_split(parts) if len(some)]


def take_step(optimizer, max_norm, losses):
    """Takes an optimizer step along the gradient, scaled down to max_norm, and returns the norm before.

    If the norm or one of the losses, {name: scalar}, is not finite, no step is taken, and the norm returned is NaN. If
    no completion has moved a parameter, its gradient is zero rather than absent, so that AdamW's averages go on. The
    gradients and the losses of all processes are added up first.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name in sorted(set().union(*from_all(set(losses), "an update"))):  # a process may have had no micro-batch
        losses.setdefault(name, torch.zeros((), device=device))
    of_losses = [losses[name] for name in sorted(losses)]
    here = [parameter.grad for parameter in parameters if not isinstance(parameter, DTensor)]  # the sharded have theirs
    add_up(here + of_losses, "an update")
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    finite = torch.stack([norm, *losses.values()]).isfinite().all()
    if finite:
        optimizer.step()
    optimizer.zero_grad()  # frees the gradients, because sampling needs memory too
    return torch.where(finite, norm, math.nan)
