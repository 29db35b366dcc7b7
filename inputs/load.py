"""Loads everything that a run is made from, as the constants say."""

import json
from dataclasses import dataclass

import torch
import transformers

from configs import InputError, check_size
from engine import processes
from engine.precision import dtype_of
from engine.routing import ROUTERS, Routing, routing_of
from engine.sharding import shard
from inputs.chat import encode_prompts
from inputs.libraries import quiet_libraries
from inputs.lora import add_lora
from inputs.models import (
    check_policy,
    check_rotation,
    end_of_sequence_ids,
    load_model,
    load_tokenizer,
    without_dropout,
)
from inputs.prompts import hold_out, load_prompts, prompt_of

EMBEDDED = "data/arithmetic/train.jsonl", "data/arithmetic/test.jsonl"  # the shipped PROMPTS and EVAL_PROMPTS


@dataclass
class Inputs:
    """Everything that load_inputs returns to a trainer."""

    train_rows: list  # of encode_prompts
    eval_rows: list
    tokenizer: object
    policy: torch.nn.Module
    eos_ids: list
    adapter: object  # peft's model around the policy, None without LoRA
    reference: object  # Reference, None without a KL term


class Reference:
    """The model that gives π_ref, as a context: `with reference as model: ...`.

    It is a separate model on REF_DEVICE. With LoRA it is the policy itself, whose adapter is off inside the context.
    """

    def __init__(self, model, adapter=None):
        self.model, self.adapter = model, adapter

    @property
    def is_policy(self):
        return self.adapter is not None

    def __enter__(self):
        self.without = self.adapter.disable_adapter() if self.is_policy else None
        if self.is_policy:
            self.without.__enter__()
            self.replay_experts(False)
        return self.model

    def __exit__(self, *error):
        if self.is_policy:
            self.without.__exit__(*error)
            self.replay_experts(True)

    def replay_experts(self, replays):
        """Lets the policy take recorded experts, or not, because the reference chooses its own."""
        if routing := routing_of(self.model):
            routing.replays = replays


@quiet_libraries()
def load_inputs(c, devices, generator):
    """Loads prompts, tokenizer and models. Raises InputError if one of them cannot be used.

    c: the script's constants, from configs.snapshot. devices: {"POLICY_DEVICE": ..., "REF_DEVICE": ...}. generator: its
    draws decide which prompts are held out and which of these are evaluated on.
    """
    train_rows, eval_rows, eval_source = load_rows(c, generator)
    tokenizer = load_tokenizer(c.POLICY_MODEL, "POLICY_MODEL", revision=c.POLICY_REVISION, trust=c.TRUST_REMOTE_CODE)
    policy, adapter, reference = load_policy_and_reference(c, devices, tokenizer)
    longest = longest_prompt(c, policy, tokenizer)
    chat = {"system_prompt": c.SYSTEM_PROMPT, "thinking": c.THINKING}
    chat["variables"] = json.loads(c.CHAT_TEMPLATE_KWARGS or "{}")
    train_rows = encode_prompts(train_rows, tokenizer, longest, c.PROMPTS, **chat)
    if len(eval_rows) > c.EVAL_SIZE:  # a random choice, because files are often sorted
        chosen = torch.randperm(len(eval_rows), generator=generator)[: c.EVAL_SIZE].sort().values
        eval_rows = [eval_rows[i] for i in chosen]
    eval_rows = encode_prompts(eval_rows, tokenizer, longest, eval_source, **chat)
    longest = max(len(row["prompt_ids"]) for row in train_rows + eval_rows)
    check_rotation(policy, longest + c.MAX_COMPLETION_TOKENS)
    check_size(c.values(), "EVAL_SIZE", "EVAL_SAMPLES", "MAX_COMPLETION_TOKENS", EVAL_SIZE=len(eval_rows))
    eos_ids = end_of_sequence_ids(policy, tokenizer, "POLICY_MODEL")
    return Inputs(train_rows, eval_rows, tokenizer, policy, eos_ids, adapter, reference)


def load_rows(c, generator):
    """Returns the rows to train on, the held-out rows, and the source of the held-out rows."""
    columns = (c.PROMPT_COLUMN, c.ANSWER_COLUMN, c.PROMPTS_CONFIG)
    train_rows = load_prompts(c.PROMPTS, "PROMPTS", *columns, c.PROMPTS_SPLIT)
    eval_source = c.EVAL_PROMPTS
    if eval_source == EMBEDDED[1] and c.PROMPTS != EMBEDDED[0]:  # the run trains on another task
        print(f"EVAL_PROMPTS is that of the embedded task: holding out {c.EVAL_SHARE:.0%} of PROMPTS in its place")
        eval_source = ""
    if not eval_source:
        eval_rows, train_rows = hold_out(train_rows, c.EVAL_SHARE, c.PROMPTS, generator)
        return train_rows, eval_rows, c.PROMPTS
    eval_rows = load_prompts(eval_source, "EVAL_PROMPTS", *columns, c.EVAL_SPLIT)
    trained_on = {prompt_of(row) for row in train_rows}
    if both := sum(prompt_of(row) in trained_on for row in eval_rows):
        print(f"Warning: {both} of {len(eval_rows)} prompts of EVAL_PROMPTS are also in PROMPTS, so not held out")
    return train_rows, eval_rows, eval_source


def load_policy_and_reference(c, devices, tokenizer):
    """Returns the policy, its LoRA adapter and the Reference.

    The adapter is None without LoRA. The Reference is None if the loss has no KL term.
    """
    options = {"revision": c.POLICY_REVISION, "trust": c.TRUST_REMOTE_CODE, "experts": c.EXPERTS}
    causal, dtype = transformers.AutoModelForCausalLM, getattr(torch, c.POLICY_DTYPE)
    sharded = shards(c, devices["POLICY_DEVICE"])
    on_cpu = torch.device("cpu")  # from there each process takes its share
    place = on_cpu if sharded else devices["POLICY_DEVICE"]
    policy = load_model(causal, c.POLICY_MODEL, "POLICY_MODEL", place, dtype=dtype, **options)
    check_policy(policy, tokenizer, "POLICY_MODEL")
    add_routing(c, policy)
    adapter = reference = None
    has_kl = c.KL_COEF > 0
    if c.LORA_RANK > 0:
        with torch.random.fork_rng(devices=[]):  # peft draws the adapters' first weights
            torch.manual_seed(c.SEED)
            adapter = add_lora(policy, c.LORA_RANK, c.LORA_ALPHA, c.LORA_TARGETS)
        reference = Reference(policy, adapter) if has_kl else None
    elif has_kl:
        device = devices["REF_DEVICE"]
        dtype = dtype_of(c.FROZEN_DTYPE, device)
        place = on_cpu if sharded else device
        model = load_model(causal, c.POLICY_MODEL, "POLICY_MODEL", place, dtype=dtype, **options)
        reference = Reference(model.requires_grad_(False))
        if sharded:
            shard(model, c.COMPUTE_DTYPE, device)
    prepare_to_train(c, policy)
    if sharded:
        shard(policy, c.COMPUTE_DTYPE, devices["POLICY_DEVICE"])
    return policy, adapter, reference


def add_routing(c, policy):
    """Gives a policy that is a mixture its Routing. Raises InputError if the constants need one that it cannot have."""
    if any(type(module).__name__ in ROUTERS for module in policy.modules()):
        policy.routing = Routing(policy)
        return
    for name in ("ROUTING_REPLAY", "ROUTER_AUX_COEF"):
        if value := getattr(c, name):
            mixture = any("experts" in key for key in policy.config.to_dict())
            kind = "a mixture with a router of its own kind" if mixture else "no mixture of experts"
            remedy = "give a mixture like Qwen3-MoE, Qwen2-MoE, Mixtral or OLMoE, or leave the constant as it was"
            raise InputError(f"{name} = {value!r}: POLICY_MODEL, a {type(policy).__name__}, is {kind}; {remedy}")


def shards(c, device):
    """Returns whether models are shared out over processes. It meets the other processes for that, on a device.

    Adapters are small, so each process keeps all of them, and of their base.
    """
    processes.start(device)
    return c.SHARD and processes.size() > 1 and c.LORA_RANK == 0


def prepare_to_train(c, model):
    """Lets a model compute activations again in the backward pass, if GRADIENT_CHECKPOINTING asks for that."""
    if c.GRADIENT_CHECKPOINTING:
        without_dropout(model)
        # The first name is that of newer versions of transformers, the second that of older ones.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": False})
        model.enable_input_require_grads()


def longest_prompt(c, policy, tokenizer):
    """Returns how many tokens a prompt may have.

    This is the room that a completion leaves in the model's context, or MAX_PROMPT_TOKENS if that is less.
    """
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    longest = context - c.MAX_COMPLETION_TOKENS
    longest = min(longest, c.MAX_PROMPT_TOKENS) if c.MAX_PROMPT_TOKENS else longest
    if longest < 1:
        raise InputError(
            f"MAX_COMPLETION_TOKENS = {c.MAX_COMPLETION_TOKENS} leaves no room for a prompt in the model's context of "
            f"{longest + c.MAX_COMPLETION_TOKENS} tokens; lower --max-completion-tokens"
        )
    return longest
