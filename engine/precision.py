"""In which precision a model computes."""

import torch


def autocast(device):
    """bfloat16 for matrix products on a GPU, float32 weights kept; nothing on the CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
