"""The learning rate of each step."""

import math


def learning_rate_at(step, c):
    """Returns the learning rate of a step (from 1): linear warm-up, then LR_SCHEDULE. c: the script's constants."""
    if step <= c.WARMUP_STEPS:
        return c.LEARNING_RATE * step / c.WARMUP_STEPS
    progress = (step - c.WARMUP_STEPS - 1) / max(1, c.MAX_STEPS - c.WARMUP_STEPS)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return c.LEARNING_RATE * factor[c.LR_SCHEDULE]
