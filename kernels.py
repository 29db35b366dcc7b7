"""Sums over a vocabulary with fewer passes over memory than torch's plain functions take; the same numbers."""

import torch
from torch.nn.functional import pad


class TokenLogps(torch.autograd.Function):
    """log π of targets (tokens,) from logits (tokens, V), and the entropy there: both (tokens,), the second 0 unasked.

    As log_softmax with gather, and −Σ p log p, but logits become log-probs and then the gradient in their own place, in
    pieces that the cache holds: with a large vocabulary memory costs as much as the matrix products.
    """

    @staticmethod
    def forward(ctx, logits, targets, with_entropy):
        entropy = logits.new_zeros(len(logits))
        for rows in pieces(logits):
            logits[rows] = log_probs = logits[rows].log_softmax(-1)
            if with_entropy:
                entropy[rows] = -(log_probs.exp() * log_probs).sum(-1)
        ctx.save_for_backward(logits, targets, entropy)
        ctx.with_entropy = with_entropy
        return logits.gather(1, targets[:, None]).squeeze(1), entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """d log π_a / d logit_v = [v = a] − p_v, and d H / d logit_v = −p_v (log p_v + H)."""
        log_probs, targets, entropy = ctx.saved_tensors
        for rows in pieces(log_probs):
            piece, g = log_probs[rows], grad[rows, None]
            if ctx.with_entropy:
                probs = piece.exp()
                piece.add_(entropy[rows, None]).mul_(-grad_entropy[rows, None]).sub_(g).mul_(probs)
            else:
                piece.exp_().mul_(-g)
        return log_probs.scatter_add_(1, targets[:, None], grad[:, None]), None, None


def pieces(logits):
    """Slices of the rows of logits (tokens, V): of 2 MB on the CPU, for its caches, of 64 MB on a GPU, to be few."""
    size = max(1, 2 ** (19 if logits.device.type == "cpu" else 24) // logits.shape[1])
    return [slice(i, i + size) for i in range(0, len(logits), size)]


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
