"""LoRA adapters: small added weights that are trained instead of a model's own."""

import re
import warnings

import torch

from configs import InputError
from inputs.errors import short


def add_lora(model, rank, alpha, targets, head=None):
    """Returns a peft model: `model` wrapped in LoRA adapters (Hu et al. 2021, arXiv 2106.09685). Only they train.

    From then on `model` itself computes with the adapters. The wrapper saves them and turns them off. head: the name of
    the output layer of a model that is no language model; it gets no adapter, and trains as a whole.
    """
    import peft  # imported here, because it takes seconds

    try:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if targets == "all-linear" else re.split(r"[,\s]+", targets.strip()),
            task_type=None if head else "CAUSAL_LM",
            exclude_modules=head and [head],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name that transformers will drop
            warnings.simplefilter("ignore", UserWarning)  # about a tied output head, which is refused below
            warnings.simplefilter("ignore", RuntimeWarning)  # about unused patterns that peft makes for experts
            adapter = peft.get_peft_model(model, config)
    except ValueError as error:
        remedy = "give names of the model's linear layers"
        raise InputError(f"LORA_TARGETS = {targets!r}: {short(error)}; {remedy}") from None
    if head:
        model.get_submodule(head).requires_grad_(True)
        return adapter
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise InputError(f"LORA_TARGETS = {targets!r} names the output head, which takes no adapter; leave it out")
    return adapter
