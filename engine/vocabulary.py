"""Sums over a vocabulary, with fewer passes over memory than torch's plain functions take.

The numbers are the same.
"""

import torch
from torch.nn.functional import linear, pad

from engine.products import linear_of


def head_of(model):
    """Returns a model's output head, with its weights as they are now: hidden states (rows, H) -> logits (rows, V)."""
    head = model.get_output_embeddings()
    weight = widened(as_factor(head.weight, head))
    if weight.device.type != "cpu":
        return lambda hidden: logits_of(as_factor(hidden, head), weight, head.bias)
    dtype = weight.dtype  # logits() must not hold weight, which may be a copy of what product holds
    product = linear_of(weight, None if head.bias is None else head.bias.to(dtype))

    def logits(hidden):
        factor = as_factor(hidden, head).to(dtype)
        with torch.autocast("cpu", enabled=False):  # which would round the sums
            return product(factor)

    return logits


def token_logps(hidden, targets, head, with_entropy, at_once):
    """Returns log π of targets (tokens,), and the entropy there or else 0; both (tokens,), with gradient.

    hidden: hidden states (tokens, H). head: a linear output head. The result is that of head, log_softmax and gather,
    and of −Σ p log p, in float32. The factors of the head's product have the head's dtype or autocast's.

    The work is done by blocks of the vocabulary that fit a cache. At most at_once logits stay in memory, or those of
    one token of the vocabulary, beside the block at work. The backward pass computes again whatever was not kept.
    """
    hidden, weight = as_factor(hidden, head), as_factor(head.weight, head)
    return TokenLogps.apply(hidden, weight, head.bias, targets, with_entropy, at_once, torch.is_grad_enabled())


def as_factor(values, head):
    """Returns values in the dtype that the factors of the head's product have: autocast's, or else the head's own."""
    device = values.device.type
    return values.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype)


class TokenLogps(torch.autograd.Function):
    """The function behind token_logps. Blocks have one size with and without a backward pass: so do the sums."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, with_entropy, at_once, backward_follows):
        logits_of_a_block = 2 ** (22 if hidden.device.type == "cpu" else 24)  # 16 MB fit a CPU's cache
        size = max(1, min(logits_of_a_block, at_once) // max(1, len(hidden)))
        kept = at_once // (size * max(1, len(hidden))) - 1 if backward_follows else 0  # beside the block at work
        ctx.blocks, chosen, tops, sums, informations = [], 0.0, [], [], []
        for start in range(0, len(weight), size):
            columns = slice(start, min(start + size, len(weight)))
            logits = logits_of(hidden, weight[columns], bias_of(bias, columns))
            inside, place = in_block(targets, columns)
            chosen = chosen + logits.gather(1, place).squeeze(1).masked_fill(~inside, 0.0)
            tops.append(logits.amax(1))  # (tokens,)
            exps = logits.sub_(tops[-1][:, None]).exp_()
            sums.append(exps.sum(1))
            if with_entropy:
                informations.append(torch.special.xlogy(exps, exps).sum(1))
            ctx.blocks.append((columns, tops[-1], exps if len(ctx.blocks) < kept else None))
            del logits, exps  # frees them before the next block
        tops, sums = torch.stack(tops), torch.stack(sums)  # (blocks, tokens)
        normalizer = (tops + sums.log()).logsumexp(0)  # (tokens,)
        entropy = torch.zeros_like(normalizer)
        if with_entropy:
            below = tops - normalizer
            entropy = -(below.exp() * (torch.stack(informations) + below * sums)).sum(0)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, entropy)
        ctx.with_entropy = with_entropy
        return chosen - normalizer, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        """d log π_a / d logit_v = [v = a] − p_v, and d H / d logit_v = −p_v log p_v − p_v H."""
        hidden, weight, bias, targets, normalizer, entropy = ctx.saved_tensors
        _, with_weight, with_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=normalizer.dtype)
        grad_weight = torch.empty_like(weight) if with_weight else None
        grad_bias = torch.empty_like(bias) if with_bias else None
        while ctx.blocks:
            columns, top, exps = ctx.blocks.pop()
            if exps is None:
                logits = logits_of(hidden, weight[columns], bias_of(bias, columns))
                exps, top = logits.sub_(normalizer[:, None]).exp_(), normalizer
                del logits
            of_exps = (top - normalizer).exp()[:, None]
            if ctx.with_entropy:
                exps.mul_(of_exps)  # probabilities now
                information = torch.special.xlogy(exps, exps)
                block = exps.mul_((-grad - grad_entropy * entropy)[:, None])
                block.addcmul_(information, grad_entropy[:, None], value=-1)
                del information
            else:
                block = exps.mul_(of_exps * -grad[:, None])
            inside, place = in_block(targets, columns)
            block = block.scatter_add_(1, place, (grad * inside)[:, None]).to(hidden.dtype)  # (tokens, columns)
            grad_hidden += block @ weight[columns]
            if with_weight:
                grad_weight[columns] = block.T @ hidden
            if with_bias:
                grad_bias[columns] = block.sum(0)
            del exps, block
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None


def bias_of(bias, columns):
    return None if bias is None else bias[columns]


def logits_of(hidden, weight, bias):
    """Returns the head's product, (tokens, V), in float32 or more.

    hidden: (tokens, H), and weight: (V, H), as_factor. If they are in bfloat16, their products are exact in float32,
    and are summed there. A sum that is rounded to bfloat16 would be off by up to 0.06 where a logit is 16 or more.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight = widened(weight)
        if weight.dtype in (torch.float32, torch.float64):
            return linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits + bias.float()


def widened(weight):
    """Returns the weights in the dtype of a product's sum: float32 on a CPU, which cannot sum bfloat16's there."""
    return weight.float() if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 else weight


def in_block(targets, columns):
    """Returns which targets lie in a block of the vocabulary, (tokens,), and their columns in it, (tokens, 1).

    The column of a target outside the block has no meaning.
    """
    place = targets - columns.start
    inside = (place >= 0) & (targets < columns.stop)
    return inside, place.clamp(0, columns.stop - columns.start - 1)[:, None]


def invert_cumulative(probs, uniform):
    """Returns, for each row, the token at which the cumulative sum of probs passes uniform: (rows,).

    probs: (rows, V). uniform: (rows,), in [0, 1). It first finds a block of tokens by the sums of the blocks, and then
    the token in it. So only two short sums are cumulative.
    """
    if probs.shape[1] <= 256:
        return _passes(probs, uniform)[0]
    if probs.shape[1] % 256:  # pad() copies even if it adds nothing
        probs = pad(probs, (0, -probs.shape[1] % 256))
    blocks = probs.unflatten(1, (-1, 256))  # (rows, V / 256, 256)
    block, rest = _passes(blocks.sum(-1), uniform)
    return 256 * block + _passes(blocks[torch.arange(len(blocks), device=block.device), block], rest)[0]


def _passes(weights, uniform):
    """Returns the index at which the cumulative sum of weights (rows, n) passes uniform times their total.

    Also returns how far into that weight this is, in [0, 1).
    """
    cumulative = weights.double().cumsum(1)
    point = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=weights.shape[1] - 1)  # (rows, 1)
    weight = weights.double().gather(1, index)
    into = (point - (cumulative.gather(1, index) - weight)) / weight
    return index.squeeze(1), into.squeeze(1).clamp(0, 1 - 2**-53)
