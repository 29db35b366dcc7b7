"""Matrix products with weights that stay as they are for many tokens, as in sampling."""

import torch
from torch.nn import functional as F

LARGE = 2**16  # weights of a matrix; those of the embedded models have fewer, and would gain nothing


def linear_of(weight, bias):
    """Returns the function states (rows, in) -> (rows, out) that F.linear is with weight (out, in) and bias.

    On a CPU it is oneDNN's product, with the weights laid out for it once. With few rows F.linear takes up to four
    times as long.
    """
    if weight.numel() < LARGE or not known_to_onednn(weight):
        return lambda states: F.linear(states, weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)  # the operators of torch.compile's code for CPUs
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, laid_out, bias, "none", [], "")


def known_to_onednn(weight):
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    kinds = {torch.float32: True, torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return kinds.get(weight.dtype, False)
