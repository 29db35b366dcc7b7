"""What the benchmarks of speed and memory have in common: workloads, models made on the spot, and counting.

A workload is a set of constants of grpo.py. `embedded` is the shipped task, rewarded by its rule. `longtail` and
`qwen3` train random models whose completions end by chance, so that their lengths are geometric and a few are long.

Floating point operations of useful tokens alone, no padding, with N the weights of the layers' matrices, V x H those of
the head, and a sequence of P prompt and T completion tokens, the last of which predicts nothing:

    pass(P, T) = 2 N (P + T − 1) + 2 V H T + 2 A (P + T − 1)²       A = layers x heads x head dimension; causal
    rollouts   = Σ 2 N (T − 1) + 2 V H T + 2 A ((P + T − 1)² − P²)  and each prompt once, 2 N P + 2 A P²
    update     = 3 Σ pass                                           forward and backward
    step       = rollouts + update + Σ pass                         log-probs under the reference

The policy's own log-probs before the update need no work, for sampling has computed them. Norms, embeddings, softmax,
the optimizer, and what is computed again by checkpointing, are left out.

Bytes that sampling must read, for the roofline of memory: the weights of layers and head once for each token of the
longest completion, and before each token of a completion but its first the keys and values so far:

    decoding = max T · weights + Σ (key and value) · ((T − 1) P + T (T − 1) / 2)
"""

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the scripts do, before torch; for every system alike

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402

SAME = {  # for both systems, in all workloads
    "KL_COEF": 0.04,
    "ADAPTIVE_KL": False,
    "ENTROPY_COEF": 0.0,
    "LOSS_AGGREGATION": "sequence_mean",
    "MINI_BATCHES": 4,
    "FROZEN_DTYPE": "float32",
    "SAMPLE_GROUPS": 0,  # samples.jsonl is no part of a step; TRL writes none
    "TENSORBOARD": False,
}
WORKLOADS = {
    "embedded": {
        "model": None,
        "steps": 80,
        "constants": {"REWARDS": "exact_match"},
    },
    "longtail": {
        "model": {
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "vocab_size": 32_768,
            "tie_word_embeddings": False,
        },
        "ends": 4.0,  # mean length 0.245 of the maximum at first; what is learnt makes it shorter
        "steps": 12,
        "constants": {
            "REWARDS": "length",
            "LEARNING_RATE": 2e-6,
            "WARMUP_STEPS": 0,
            "BATCH_SIZE": 8,
            "MAX_COMPLETION_TOKENS": 256,
        },
    },
    "qwen3": {
        "model": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
        },
        "ends": 0.5,  # mean length 0.79 of the maximum
        "steps": 6,
        "constants": {
            "REWARDS": "length",
            "LEARNING_RATE": 1e-6,
            "WARMUP_STEPS": 0,
            "BATCH_SIZE": 8,
            "MAX_COMPLETION_TOKENS": 1024,
            "MICRO_BATCH_TOKENS": 16_384,
            "GRADIENT_CHECKPOINTING": True,
        },
    },
}


def set_constants(workload, folder, steps, seed=0, flags=()):
    """Makes grpo's constants those of a workload, whose model and prompts prepare() has put into the folder."""
    chosen = SAME | WORKLOADS[workload]["constants"] | {"MAX_STEPS": steps, "SEED": seed}
    if WORKLOADS[workload]["model"]:
        prompts = str(Path(folder) / "prompts.jsonl")
        chosen |= {"POLICY_MODEL": str(folder), "PROMPTS": prompts, "EVAL_PROMPTS": prompts}
    vars(grpo).update(chosen)
    if flags:
        grpo.configs.apply_overrides(vars(grpo), list(flags))


def prepare(workload, folder):
    if WORKLOADS[workload]["model"]:
        constants = WORKLOADS[workload]["constants"]
        make_model(
            folder, WORKLOADS[workload]["model"], WORKLOADS[workload]["ends"], constants["MAX_COMPLETION_TOKENS"]
        )


@torch.no_grad()
def make_model(folder, sizes, ends, longest, context=2048, prompts=512):
    """A random Qwen3, a tokenizer of as many words, and prompts of 4 to 16 of them.

    The end comes at each token with a chance of ends / longest, whatever came before: the first hidden dimension is the
    same constant everywhere, for all embeddings have it and no layer writes to it, and the end's row of the head sees
    nothing else. ends = 0: it never comes.
    """
    import tokenizers

    torch.manual_seed(0)
    words, width = sizes["vocab_size"], sizes["hidden_size"]
    config = transformers.Qwen3Config(**sizes, max_position_embeddings=context)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    head, end = model.get_output_embeddings().weight, words - 2
    model.get_input_embeddings().weight[:, 0] = 0.02 * width**0.5
    if not sizes["tie_word_embeddings"]:
        head[:, 0] = 0.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    hidden = model.base_model(input_ids=torch.randint(words - 2, (8, 64))).last_hidden_state.flatten(0, 1)
    head[end] = 0.0
    others = (hidden @ head.T).logsumexp(-1)  # the end's own e⁰ in it is nothing among so many
    chance, low, high = ends / longest, -1e3, 1e3
    for _ in range(60):
        head[end, 0] = (low + high) / 2
        mean = (hidden[:, 0] * head[end, 0] - others).sigmoid().mean()
        low, high = (head[end, 0].item(), high) if mean < chance else (low, head[end, 0].item())
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=words - 1)
    model.save_pretrained(folder)

    vocabulary = {f"t{i}": i for i in range(words - 2)} | {"<end>": words - 2, "<pad>": words - 1}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<end>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)
    draw = random.Random(0)
    lines = [" ".join(f"t{draw.randrange(words - 2)}" for _ in range(draw.randint(4, 16))) for _ in range(prompts)]
    rows = [json.dumps({"prompt": line, "answer": "t0"}) + "\n" for line in lines]
    (Path(folder) / "prompts.jsonl").write_text("".join(rows))


def parse_with_workloads(parser):
    """The arguments of a benchmark, with .workloads: those named, or embedded and longtail."""
    choices = [name for name in WORKLOADS if name != "qwen3" or torch.cuda.is_available()]
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"some of {', '.join(choices)}")
    arguments = parser.parse_args()
    if wrong := set(arguments.workloads) - set(choices):
        parser.error(f"no such workload here: {', '.join(wrong)}; there are {', '.join(choices)}")
    arguments.workloads = arguments.workloads or ["embedded", "longtail"]
    return arguments


def parameters_of_layers(model):
    """N: the weights of the matrices in the layers."""
    linear = (module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return sum(module.weight.numel() for module in linear)


def flops(model, pairs, group_size):
    """Useful operations of a step's rollouts, update and all, as above; pairs: (P, T) per completion, by group."""
    config, layers = model.config, parameters_of_layers(model)
    head = config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    one = sum(2 * layers * (p + t - 1) + 2 * head * t + 2 * attention * (p + t - 1) ** 2 for p, t in pairs)
    rollouts = sum(2 * layers * (t - 1) + 2 * head * t for _, t in pairs)
    rollouts += sum(2 * attention * ((p + t - 1) ** 2 - p**2) for p, t in pairs)
    rollouts += sum(2 * layers * p + 2 * attention * p**2 for p, _ in pairs[::group_size])
    return {"rollout": rollouts, "update": 3 * one, "step": rollouts + 4 * one}


def bytes_of_decoding(model, pairs):
    """What sampling a batch must read, as above, in float32 or, on a GPU, bfloat16; pairs: (P, T) per completion."""
    config, size = model.config, 2 if model.device.type == "cuda" else 4
    weights = parameters_of_layers(model) + config.vocab_size * config.hidden_size
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = sum((t - 1) * p + t * (t - 1) // 2 for p, t in pairs)
    return size * (max(t for _, t in pairs) * weights + cached * of_a_token)


def peak_bandwidth(device, seconds=1.5):
    """Bytes per second of a copy of memory far larger than any cache, read and written: the best of several."""
    source = torch.zeros(2**31 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target, best, start = torch.ones_like(source), 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize()
        before = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = max(best, 2 * len(source) / (time.perf_counter() - before))
    return best


def peak_flops(device, seconds=1.5):
    """Operations per second of a large matrix product: the best of several, in float32 or, on a GPU, bfloat16."""
    size = 8192 if device == "cuda" else 2048
    a, best = torch.randn(size, size, device=device).to(torch.bfloat16 if device == "cuda" else torch.float32), 0.0
    a @ a
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize()
        before = time.perf_counter()
        a @ a
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - before))
    return best


def peak_memory():
    """Bytes: on a GPU what torch had allocated, else of this process, not of the one that it was forked from."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
