"""A policy's weights on disk, in the layout of Hugging Face: all of them, an adapter's, or both merged."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from configs import InputError
from inputs.errors import LOAD_ERRORS
from inputs.models import load_model


def policy_weights(model, adapter=None):
    """What a checkpoint has to hold: {name: tensor} of all weights, or of those of the adapter."""
    weights = model.state_dict() if adapter is None else adapter.state_dict()
    return weights if adapter is None else {name: value for name, value in weights.items() if ".lora_" in name}


def save_policy(folder, model, adapter=None, weights=None):
    """Writes a policy in Hugging Face layout: all weights, or its adapter alone; as they are, or a copy of them."""
    (model if adapter is None else adapter).save_pretrained(folder, state_dict=weights)
    if adapter is not None:
        (Path(folder) / "README.md").unlink(
            missing_ok=True
        )  # peft's form for a model's card, which nobody has filled in


def save_merged(folder, model, adapter):
    """Writes the whole model with the adapter added in; the model itself stays, for adding in place would round it."""
    import peft

    def without_wrappers(key):  # of which experts have one for each of their parameters
        return ".".join(part for part in key.split(".") if part != "base_layer")

    weights = {without_wrappers(key): value for key, value in model.state_dict().items() if ".lora_" not in key}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            key = f"{without_wrappers(name)}.{getattr(module, 'parameter_name', 'weight')}"
            weights[key] = weights[key] + module.get_delta_weight("default")
    model.save_pretrained(folder, state_dict=weights)


@torch.no_grad()
def load_policy(folder, model, adapter=None):
    """Puts what save_policy wrote into a policy, in place. Raises InputError unless all weights are there and fit."""
    name = str(folder)
    if adapter is None:
        saved = load_model(type(model), name, "checkpoint", torch.device("cpu"), dtype=model.dtype)
        saved = dict(saved.named_parameters()) | dict(saved.named_buffers())
        mine = dict(model.named_parameters()) | dict(model.named_buffers())
    else:
        import peft

        try:
            saved = load_file(folder / "adapter_model.safetensors")
        except LOAD_ERRORS as error:
            raise InputError(f"checkpoint {name}: the adapter cannot be loaded: {error}") from None
        mine = peft.get_peft_model_state_dict(adapter)  # the tensors themselves, under the names that it saves
    if wrong := sorted(saved.keys() ^ mine.keys()) or [key for key in mine if saved[key].shape != mine[key].shape]:
        raise InputError(f"checkpoint {name}: its weights do not fit the policy: {wrong[:3]}; give the run's own model")
    for key, value in mine.items():
        value.copy_(saved[key])
