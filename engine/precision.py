"""The precision in which a model computes."""

import torch


def autocast(device):
    """Returns a context in which matrix products on a GPU take bfloat16.

    Weights stay in float32. On the CPU the context changes nothing.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
