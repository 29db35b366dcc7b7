"""A policy's weights as another program takes them: in Hugging Face layout, with adapters merged in."""

from engine.sharding import whole


def whole_weights(model):
    """Yields (name, tensor) of a policy's weights, one by one. Those with a LoRA adapter are copies that include it.

    The model itself does not change, because merging in place would round its weights.
    """

    def without_wrappers(key):  # experts have a wrapper for each parameter
        return ".".join(part for part in key.split(".") if part != "base_layer")

    adapted = {
        f"{without_wrappers(name)}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for key, value in model.state_dict().items():
        if ".lora_" not in key:
            name = without_wrappers(key)
            yield name, value + adapted[name].get_delta_weight("default") if name in adapted else whole(value)
