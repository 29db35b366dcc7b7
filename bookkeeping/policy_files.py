"""Saves and loads a policy's weights in Hugging Face layout: all of them, an adapter's, or both merged."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from configs import InputError
from engine.sharding import is_sharded, part_like, plain_class
from engine.weights import whole_weights
from inputs.errors import LOAD_ERRORS
from inputs.models import load_model


def policy_weights(model, adapter=None):
    """Returns the weights that a checkpoint holds, {name: tensor}: all of them, or only the adapter's."""
    weights = model.state_dict(keep_vars=is_sharded(model)) if adapter is None else adapter.state_dict()
    return weights if adapter is None else {name: value for name, value in weights.items() if ".lora_" in name}


def save_policy(folder, model, adapter=None, weights=None):
    """Writes a policy in Hugging Face layout: all weights, or only its adapter.

    weights: a copy to write in place of the weights as they are now.
    """
    (model if adapter is None else adapter).save_pretrained(folder, state_dict=weights)
    if adapter is not None:
        (Path(folder) / "README.md").unlink(missing_ok=True)  # peft's empty model card


def save_merged(folder, model):
    """Writes the whole model with its adapter merged in. The model itself does not change."""
    model.save_pretrained(folder, state_dict=dict(whole_weights(model)))


@torch.no_grad()
def load_policy(folder, model, adapter=None):
    """Puts the weights that save_policy wrote into a policy, in place.

    Raises InputError unless all weights are there and fit.
    """
    name = str(folder)
    if adapter is None:
        saved = load_model(plain_class(model), name, "checkpoint", torch.device("cpu"), dtype=model.dtype)
        saved = dict(saved.named_parameters()) | dict(saved.named_buffers())
        mine = dict(model.named_parameters()) | dict(model.named_buffers())
    else:
        import peft

        try:
            saved = load_file(folder / "adapter_model.safetensors")
        except LOAD_ERRORS as error:
            raise InputError(f"checkpoint {name}: the adapter cannot be loaded: {error}") from None
        mine = peft.get_peft_model_state_dict(adapter)  # the tensors themselves, by the names in the file
    if wrong := sorted(saved.keys() ^ mine.keys()) or [key for key in mine if saved[key].shape != mine[key].shape]:
        raise InputError(f"checkpoint {name}: its weights do not fit the policy: {wrong[:3]}; give the run's own model")
    for key, value in mine.items():
        value.copy_(part_like(saved[key], value))
