"""A model whose weights are shared out over several processes, by PyTorch's FSDP2: SHARD.

Each process keeps a part of every weight, of its gradient and of its optimizer state. A pass gathers a layer's weights
when it comes to that layer, so all processes make their passes together.
"""

import contextlib
import os
import types

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.precision import autocast, dtype_of
from engine.processes import Meetings, from_all, size


def shard(model, compute_dtype, device):
    """Shares a model's weights out over all processes, in place, and moves them to their devices.

    If COMPUTE_DTYPE, compute_dtype, means bfloat16, layers are gathered in it. Embeddings and head are gathered in
    their own dtype, so what flows from layer to layer keeps the precision that it has without sharding. Gradients are
    added up in float32, because a loss is divided by what all processes have.
    """
    mesh, options = mesh_of(device), {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    half = torch.bfloat16 if dtype_of(compute_dtype, device) == torch.bfloat16 else None
    of_layers = MixedPrecisionPolicy(param_dtype=half, **options)
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh, mp_policy=of_layers)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options))
    for part in parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.set_reduce_scatter_unused_params(True, recurse=False)  # a process may have no use for some

    def body(self, **inputs):
        with autocast(device, compute_dtype):
            return self.base_model(**inputs)

    model.sharded_body = types.MethodType(body, model)
    register_fsdp_forward_method(model, "sharded_body")
    Meetings.in_step = True


def mesh_of(device):
    """Returns how processes stand to each other: in one row, or a row for each machine with a copy of all weights."""
    if Meetings.mesh is None:
        here = set(from_all(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "the start"))
        shape = (size() // min(here), min(here)) if len(here) == 1 and 1 < min(here) < size() else (size(),)
        Meetings.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("machines", "processes")[-len(shape) :])
    return Meetings.mesh


def is_sharded(model):
    """Returns whether shard has shared out a model."""
    return isinstance(model, FSDPModule)


def plain_class(model):
    """Returns the class of a model, or the one that it had before it was sharded."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def parts(model):
    """Returns the modules of a model that are gathered one by one, the model itself among them."""
    return [module for module in model.modules() if is_sharded(module)]


def body_of(model):
    """Returns the function that passes tokens through a model up to its head. It gathers weights as it goes."""
    return getattr(model, "sharded_body", model.base_model)


@contextlib.contextmanager
def gathered(model):
    """A context in which this process has all weights of a model, so its passes need no other process."""
    if not is_sharded(model):
        yield
        return
    from_all(None, "sampling")  # on a GPU the gathers are only begun below, so who is missing must be found before
    layers = [part for part in parts(model) if part is not model]
    for part in (model, *layers):
        part.unshard()
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for part in (model, *layers):
            part.reshard()


def whole(tensor):
    """Returns a tensor with the parts of all processes. If it is sharded, all processes call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.is_cuda:
        from_all(None, "a sharded weight")  # as in gathered
    return Meetings.hold("a sharded weight", tensor.full_tensor)


def part_like(tensor, like):
    """Returns a whole tensor as `like` is: this process's part of it, if that is sharded."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer, state):
    """Lets an optimizer continue from a state_dict of whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {}
    for number, values in state["state"].items():
        shape = parameters[number].shape  # a count of steps has none
        of_parameters[number] = {
            name: part_like(value, parameters[number]) if value.shape == shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(state | {"state": of_parameters})
