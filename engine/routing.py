"""Which experts of a mixture each token goes through: recorded in one pass, and given to later ones."""

import contextlib
import functools

import torch

# Routers that choose the experts of the largest softmax, and weigh them by it.
ROUTERS = ("Qwen3MoeTopKRouter", "Qwen2MoeTopKRouter", "MixtralTopKRouter", "OlmoeTopKRouter")


class Routing:
    """The routers of a model, each with a hook that sees which experts it chooses, or gives it others.

    If experts are given, the router's weights over them still come from its own logits, and have their gradient. So a
    router that is given its own choice computes the same, to the bit.
    """

    def __init__(self, model):
        self.routers = [module for module in model.modules() if type(module).__name__ in ROUTERS]
        self.given = None  # (tokens, layers, k), on the model's device; None if the routers choose
        self.seen = None  # [(logits, experts)] of each router since the last take, in the order of the layers
        self.logits = []  # of each router in training's last pass, (tokens, experts), where a token is predicted
        self.replays = True  # False while the policy without its adapter is the reference
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(functools.partial(self.route, layer))

    def route(self, layer, router, _, output):
        """Takes the place of a router's output: logits (tokens, experts), weights (tokens, k), experts (tokens, k)."""
        logits, weights, experts = output
        if self.given is not None:
            experts = self.given[:, layer].long()
            chances = logits.softmax(-1, dtype=torch.float32).gather(1, experts)
            if getattr(router, "norm_topk_prob", True):  # Mixtral always does it
                chances = chances / chances.sum(-1, keepdim=True)
            weights = chances.to(weights.dtype)
        if self.seen is not None:
            self.seen.append((logits, experts))
        return logits, weights, experts

    @contextlib.contextmanager
    def watch(self, given=None):
        """Gives experts to the passes inside, or lets the routers choose, and sees what they do.

        If there are gradients, the given ones stay until the next call, because in the backward pass checkpointing runs
        the routers again.
        """
        self.given, self.seen = given, []
        try:
            yield self
        finally:
            self.seen = None
            if not torch.is_grad_enabled():
                self.given = None

    def take(self):
        """Returns the experts of the pass that just ended, (tokens, layers, k), in bytes if they fit."""
        experts = torch.stack([experts for _, experts in self.seen], 1)
        self.seen.clear()
        return experts.to(torch.uint8 if self.routers[0].num_experts <= 256 else torch.int16)


def routing_of(model):
    """Returns the Routing of a policy that is a mixture, or None for any other model."""
    return getattr(model, "routing", None)


def watch(model, given=None):
    """Returns the context of Routing.watch. It gives None for a model without a Routing."""
    routing = routing_of(model)
    return contextlib.nullcontext() if routing is None else routing.watch(given)


def experts_of_tokens(rollouts):
    """Returns the recorded experts of the token before each completion token, (tokens, layers, k)."""
    row, t = rollouts.completion_mask.nonzero(as_tuple=True)
    return rollouts.experts[row, rollouts.prompt_lengths[row] + t - 1].long()


def loads_of(experts, count):
    """Returns each expert's share of a layer's choices, (layers, count). experts: (tokens, layers, k), below count."""
    tokens, layers, k = experts.shape
    numbers = experts + count * torch.arange(layers, device=experts.device)[:, None]  # of all layers' experts
    return numbers.flatten().bincount(minlength=layers * count).view(layers, count).double() / tokens / k


def load_balancing_loss(routing, batch):
    """Returns what the completions of training's last pass add to a batch's load-balancing loss: scalar, with gradient.

    The loss is E Σ_e f_e P_e, the mean over layers: Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6, over the tokens
    that are predicted. E is the number of experts, f_e the share of expert e in the recorded choices, without gradient,
    and P_e the mean of the router's softmax. It is 1 if all experts have the same share. As f_e is that of the whole
    batch, how a batch is split does not change the gradient.
    """
    count = routing.logits[0].shape[1]
    loads = loads_of(experts_of_tokens(batch), count).to(routing.logits[0].device)  # (layers, E)
    sums = torch.stack([logits.softmax(-1, dtype=torch.float32).sum(0) for logits in routing.logits])  # (layers, E)
    return count * (loads * sums).sum(1).mean() / batch.completion_mask.sum()
