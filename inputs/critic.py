"""Loads a critic: a model that gives the value of a text, one number at each token."""

from dataclasses import dataclass

import torch
import transformers

from configs import InputError, find_model
from engine.sharding import load_optimizer, part_like, shard
from inputs.errors import LOAD_ERRORS, not_loaded
from inputs.libraries import quiet_libraries
from inputs.load import prepare_to_train, shards
from inputs.lora import add_lora
from inputs.models import load_model, load_tokenizer


@dataclass
class Critic:
    """A token classifier with one logit, as the critic. optimizer: the script makes it."""

    model: torch.nn.Module
    adapter: object  # peft's model around it, None without LoRA
    optimizer: torch.optim.Optimizer = None

    def trained(self):
        """Returns {name: parameter} of what trains: all weights, or the adapters and the head."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def state(self):
        """Returns what a checkpoint holds of it, {"weights": ..., "optimizer": ...}."""
        return {"weights": self.trained(), "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state(self, state):
        """Continues from such a state. Raises InputError unless all weights fit."""
        if not state:
            raise InputError("the checkpoint has no critic, as those of older versions; begin a new run")
        saved, mine = state["weights"], self.trained()
        if wrong := sorted(saved.keys() ^ mine.keys()) or [k for k in mine if saved[k].shape != mine[k].shape]:
            raise InputError(f"the checkpoint's critic does not fit: {wrong[:3]}; give the run's own --critic-model")
        for name, parameter in mine.items():
            parameter.copy_(part_like(saved[name], parameter))
        load_optimizer(self.optimizer, state["optimizer"])


@quiet_libraries()
def load_critic(c, device, policy_tokenizer):
    """Returns the Critic of CRITIC_MODEL: a body and a head, which is zero where the model has none.

    A causal language model gives its body alone. A classifier, such as a reward model, gives both. Raises InputError if
    it has another vocabulary than the policy, whose ids it reads, or more than one logit.
    """
    name, constant = (c.CRITIC_MODEL, "CRITIC_MODEL") if c.CRITIC_MODEL else (c.POLICY_MODEL, "POLICY_MODEL")
    options = {"revision": c.CRITIC_REVISION if c.CRITIC_MODEL else c.POLICY_REVISION, "trust": c.TRUST_REMOTE_CODE}
    try:
        place, read = find_model(name, constant), {"trust_remote_code": options["trust"]}
        config = transformers.AutoConfig.from_pretrained(place, revision=options["revision"], **read)
    except LOAD_ERRORS as error:
        raise not_loaded("model", name, constant, error) from None
    classifier = any("Classification" in architecture for architecture in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise InputError(f"{constant} = {name!r} has {config.num_labels} logits; give a critic with a single logit")
    if name != c.POLICY_MODEL:
        vocabulary = load_tokenizer(name, constant, **options).get_vocab()
        if vocabulary != policy_tokenizer.get_vocab():
            raise InputError(
                f"{constant} = {name!r} does not have the policy's vocabulary, whose tokens it reads; give one with "
                'the same tokenizer, or "" for the policy\'s own weights'
            )
    dtype = getattr(torch, c.POLICY_DTYPE)
    kind = transformers.AutoModelForTokenClassification
    sharded = shards(c, device)
    place = torch.device("cpu") if sharded else device
    model = load_model(kind, name, constant, place, dtype=dtype, new_head="score.", experts=c.EXPERTS, **options)
    adapter = None
    if c.LORA_RANK > 0:
        with torch.random.fork_rng(devices=[]):  # peft draws the adapters' first weights
            torch.manual_seed(c.SEED)
            adapter = add_lora(model, c.LORA_RANK, c.LORA_ALPHA, c.LORA_TARGETS, head="score")
    prepare_to_train(c, model)
    if sharded:
        shard(model, c.COMPUTE_DTYPE, device)
    return Critic(model, adapter)
