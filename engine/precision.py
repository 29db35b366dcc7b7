"""The precision in which a model computes."""

import torch


def dtype_of(name, device):
    """Returns the dtype of a name. "auto" means bfloat16 on a GPU, and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def autocast(device, compute_dtype):
    """Returns a context in which matrix products take bfloat16 if COMPUTE_DTYPE says so; weights keep their dtype."""
    dtype = dtype_of(compute_dtype, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def dtype_of_products(model, compute_dtype):
    """Returns the dtype of a model's matrix products: bfloat16, or else that of its weights."""
    dtype = dtype_of(compute_dtype, model.device)
    return dtype if dtype == torch.bfloat16 else model.dtype
