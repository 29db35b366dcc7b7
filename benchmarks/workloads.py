"""The shared parts of the benchmarks of speed and memory: workloads, models made on the spot, and counting.

A workload is a set of constants of grpo.py. `smollm2` is the preset of that name: a chat model of 135 M parameters and
word problems. `embedded` is the shipped task, rewarded by its rule. `longtail` and `qwen3` train random models whose
completions end by chance, so their lengths are geometric, and a few are long.

Floating point operations are counted for useful tokens only. These are the tokens that a step cannot do without: no
padding, each prompt once for its group, and in the update no completion that moves nothing. N is the number of weights
in the layers' matrices, and V x H that of the head. All prompts begin with the same C tokens, which count once. A group
has a prompt of P tokens and completions of T tokens, whose last ones predict nothing.

    pass     = 2 N C + 2 A C²                                   A = layers x heads x head dimension; causal
               + Σ_groups 2 N (P − C) + 2 A (P² − C²)
               + Σ_completions 2 N (T − 1) + 2 V H T + 2 A ((P + T − 1)² − P²)
    rollouts = pass of all
    update   = 3 · pass of those that move the policy           forward and backward
    step     = rollouts + update + a pass of all                log-probs under the reference, if there is one

The policy's own log-probs before the update need no work, because sampling has computed them. Norms, embeddings,
softmax, the optimizer, and whatever checkpointing computes again are not counted.

For the roofline of memory, these bytes are counted. Sampling must read the weights of layers and head once for each
token of the longest completion. Before each token of a completion except its first, it must read all earlier keys and
values.

    decoding = max T · weights + Σ (key and value) · ((T − 1) P + T (T − 1) / 2)
"""

import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from configs import PRESETS  # noqa: E402
from engine.packing import common_start  # noqa: E402

SAME = {  # for both systems, in all workloads
    "KL_COEF": 0.04,
    "ADAPTIVE_KL": False,
    "ENTROPY_COEF": 0.0,
    "LOSS_AGGREGATION": "sequence_mean",
    "MINI_BATCHES": 4,
    "FROZEN_DTYPE": "float32",
    "SAMPLE_GROUPS": 0,  # writes no samples.jsonl, because TRL has none
    "TENSORBOARD": False,
}
WORKLOADS = {
    "smollm2": {
        "model": None,
        "steps": 10,
        "constants": PRESETS["smollm2"],
    },
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
        "ends": 4.0,  # mean length 0.245 of the maximum at first; training makes it shorter
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
    """Sets grpo's constants to those of a workload. prepare() has put its model and prompts into the folder."""
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
    """Makes a random Qwen3, a tokenizer with as many words, and prompts of 4 to 16 words.

    Each token is the end with a chance of ends / longest, whatever came before. For this, the first hidden dimension is
    the same constant everywhere: all embeddings have it, and no layer writes to it. The end's row of the head reads
    only this dimension. If ends is 0, the end never comes.
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
    others = (hidden @ head.T).logsumexp(-1)  # it counts the end as e⁰, which is negligible
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
    """Returns the arguments of a benchmark. Its .workloads are those named, or embedded and longtail."""
    choices = [name for name in WORKLOADS if name != "qwen3" or torch.cuda.is_available()]
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"some of {', '.join(choices)}")
    arguments = parser.parse_args()
    if wrong := set(arguments.workloads) - set(choices):
        parser.error(f"no such workload here: {', '.join(wrong)}; there are {', '.join(choices)}")
    arguments.workloads = arguments.workloads or ["embedded", "longtail"]
    return arguments


def parameters_of_layers(model):
    """Returns N, the number of weights in the matrices of the layers."""
    linear = (module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    return sum(module.weight.numel() for module in linear)


def sizes_of(prompts, completion_lengths, group_size):
    """Returns (number of the prompt, C, P, T) of each completion. prompts: the ids of each one's prompt, as lists."""
    ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)
    common = common_start(ids, torch.tensor(list(map(len, prompts))))
    pairs = zip(prompts, completion_lengths, strict=True)
    return [(row // group_size, common, len(prompt), length) for row, (prompt, length) in enumerate(pairs)]


def sizes_of_rollouts(rollouts):
    prompts = [row["prompt_ids"] for row in rollouts.prompts]
    return sizes_of(prompts, rollouts.completion_lengths.tolist(), grpo.GROUP_SIZE)


def prompts_of(sizes):
    """Returns C, or 0 if there is no completion, and the P of each prompt. sizes: as of sizes_of."""
    return max((common for _, common, _, _ in sizes), default=0), {number: p for number, _, p, _ in sizes}.values()


def useful_tokens(sizes):
    """Returns how many tokens must go through the layers in a pass. sizes: as of sizes_of."""
    common, prompts = prompts_of(sizes)
    return common + sum(p - common for p in prompts) + sum(t - 1 for *_, t in sizes)


def flops_of_pass(model, sizes):
    """Returns the useful operations of a forward pass. sizes: as of sizes_of."""
    config, layers = model.config, parameters_of_layers(model)
    size_of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * size_of_head
    common, prompts = prompts_of(sizes)
    of_pairs = common**2 + sum(p**2 - common**2 for p in prompts)
    of_pairs += sum((p + t - 1) ** 2 - p**2 for *_, p, t in sizes)
    head = config.vocab_size * config.hidden_size * sum(t for *_, t in sizes)
    return 2 * (layers * useful_tokens(sizes) + head + attention * of_pairs)


def flops(model, sizes, moving, with_reference):
    """Returns the useful operations of a step's rollouts, update and total.

    sizes: as of sizes_of. moving: those of the completions that move the policy. with_reference: whether there are
    log-probs of a reference model.
    """
    rollouts, update = flops_of_pass(model, sizes), 3 * flops_of_pass(model, moving)
    return {"rollout": rollouts, "update": update, "step": rollouts * (2 if with_reference else 1) + update}


def bytes_of_decoding(model, sizes, width):
    """Returns the bytes that sampling a batch must read. sizes: as of sizes_of. width: bytes of a number."""
    config = model.config
    weights = parameters_of_layers(model) + config.vocab_size * config.hidden_size
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = sum((t - 1) * p + t * (t - 1) // 2 for *_, p, t in sizes)
    return width * (max(t for *_, t in sizes) * weights + cached * of_a_token)


def peak_bandwidth(device, seconds=1.5):
    """Returns bytes per second, read and written, of the fastest of several copies of memory.

    The memory is far larger than any cache.
    """
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
    """Returns operations per second of the fastest of several large matrix products.

    The products are in float32 or, on a GPU, in bfloat16.
    """
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
    """Returns bytes: the memory that torch had allocated on a GPU, or else the peak of this process.

    The peak does not include that of the process from which this one was forked.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
