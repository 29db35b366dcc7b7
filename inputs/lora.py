"""LoRA adapters: the weights that train in place of a model's own."""

import re
import warnings

import torch

from configs import InputError
from inputs.errors import short


def add_lora(model, rank, alpha, targets):
    """Wraps a model in LoRA adapters (Hu et al. 2021, arXiv 2106.09685), the only weights that train: a peft model.

    model itself computes with the adapters from then on; the wrapper saves them and turns them off.
    """
    import peft  # here, for it takes seconds

    try:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if targets == "all-linear" else re.split(r"[,\s]+", targets.strip()),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft, about a name that peft still uses
            warnings.simplefilter("ignore", UserWarning)  # of a tied output head, which is refused below
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # of patterns that peft makes for experts, and has no use for
            adapter = peft.get_peft_model(model, config)
    except ValueError as error:
        remedy = "give names of the model's linear layers"
        raise InputError(f"LORA_TARGETS = {targets!r}: {short(error)}; {remedy}") from None
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise InputError(f"LORA_TARGETS = {targets!r} names the output head, which takes no adapter; leave it out")
    return adapter
