"""Sums over a vocabulary with fewer passes over memory than torch's plain functions take; the same numbers."""

import torch
from torch.nn.functional import pad


class TokenLogps(torch.autograd.Function):
    """log π of targets (tokens,) from logits (tokens, V), and the entropy there: both (tokens,), the second 0 unasked.

    As log_softmax with gather, and −Σ p log p, but the one large tensor that is kept becomes the gradient in its place:
    with a large vocabulary the passes over memory cost as much as the matrix products.
    """

    @staticmethod
    def forward(ctx, logits, targets, with_entropy):
        log_probs = logits.log_softmax(-1)
        logps, entropy = log_probs.gather(1, targets[:, None]), None
        if with_entropy:
            entropy = -(log_probs.exp() * log_probs).sum(-1, keepdim=True)
        ctx.save_for_backward(log_probs, targets, entropy)
        return logps.squeeze(1), torch.zeros_like(logps).squeeze(1) if entropy is None else entropy.squeeze(1)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """d log π_a / d logit_v = [v = a] − p_v, and d H / d logit_v = −p_v (log p_v + H)."""
        log_probs, targets, entropy = ctx.saved_tensors
        if entropy is None:
            grad_logits = log_probs.exp_().mul_(-grad[:, None])
        else:
            probs = log_probs.exp()
            grad_logits = log_probs.add_(entropy).mul_(-grad_entropy[:, None]).sub_(grad[:, None]).mul_(probs)
        return grad_logits.scatter_add_(1, targets[:, None], grad[:, None]), None, None


def invert_cumulative(probs, uniform):
    """The token of each row where the cumulative sum of probs (rows, V) passes uniform (rows,), in [0, 1): (rows,).

    Finds first a block of tokens by the blocks' sums, then the token in it, so that only two short sums are cumulative.
    """
    if probs.shape[1] <= 256:
        return _passes(probs, uniform)[0]
    blocks = pad(probs, (0, -probs.shape[1] % 256)).unflatten(1, (-1, 256))  # (rows, V / 256, 256)
    block, rest = _passes(blocks.sum(-1), uniform)
    return 256 * block + _passes(blocks[torch.arange(len(blocks), device=block.device), block], rest)[0]


def _passes(weights, uniform):
    """Where the cumulative sum of weights (rows, n) passes uniform of its total, and how far into that weight."""
    cumulative = weights.double().cumsum(1)
    point = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=weights.shape[1] - 1)  # (rows, 1)
    weight = weights.double().gather(1, index)
    into = (point - (cumulative.gather(1, index) - weight)) / weight
    return index.squeeze(1), into.squeeze(1).clamp(0, 1 - 2**-53)
