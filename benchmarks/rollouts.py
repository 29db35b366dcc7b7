"""Rollouts alone, in one process, in turn: grpo.py's sampler, generate() on the same batch, and generate() one by one.

    python benchmarks/rollouts.py                          embedded and longtail
    python benchmarks/rollouts.py longtail --rounds 3
    python benchmarks/rollouts.py smollm2 --dtypes float32 bfloat16 --vllm        vLLM too, each in both dtypes
    python benchmarks/rollouts.py smollm2 --flags "--max-completion-tokens 48"    with other constants of grpo.py

All ways have the same policy, prompts and group size, sample from the whole distribution, and use a key/value cache.
The batch of generate() holds each prompt GROUP_SIZE times, padded on the left, as TRL's trainer calls it. "One by one"
samples --one-by-one completions of each round's prompts, one of each first. It is compared by completion tokens per
second. The first round warms up.

vLLM is grpo.py with SAMPLER = "vllm" in a process of its own, which waits without computing while the others work. Its
seconds include what each of a run's calls does: it gets all weights, and forgets the prompts before. The row "without
weights" leaves that out. docs/vllm.md says how to install it.

The gap is the mean of |log-prob at sampling − log-prob in training| of a round's last group, nats per token.

Utilisation compares the useful operations with the peak of matrix products. Roofline is the least time in which memory
could be read for useful tokens, over the time that was taken. workloads.py says how both are counted.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch
from workloads import (
    bytes_of_decoding,
    flops_of_pass,
    grpo,
    parse_with_workloads,
    peak_bandwidth,
    peak_flops,
    prepare,
    set_constants,
    sizes_of,
    sizes_of_rollouts,
    synchronize,
)

from engine.precision import dtype_of

ANSWER = "lengths "  # begins the line in which vLLM's process answers


class Ours:
    """grpo.py's sampler, whichever it is, with products in COMPUTE_DTYPE."""

    def __call__(self, trainer, rows, step):
        trainer.sampler.compute_dtype = grpo.COMPUTE_DTYPE
        self.rollouts = trainer.sample(rows, grpo.GROUP_SIZE, ("rollout", step))
        return sizes_of_rollouts(self.rollouts)

    def gap(self, trainer):
        """Returns the mean of |log-prob at sampling − log-prob in training|, nats, of the last group."""
        logps = trainer.compute_log_probs(trainer.policy, self.rollouts[-grpo.GROUP_SIZE :])
        return grpo.sampler_gap(self.rollouts, logps)["sampler_gap"]


def prompts_of(trainer, step):
    return grpo.prompts_of_step(trainer.train_rows, step + 1, grpo.BATCH_SIZE, grpo.generator_of)


@torch.no_grad()
def generate(trainer, rows, step):
    """Samples one completion for each of the rows in one call of generate(). Returns the sizes_of them."""
    torch.manual_seed(step)
    ids = [row["prompt_ids"] for row in rows]
    batch = trainer.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(
        trainer.policy.device
    )
    with grpo.autocast(trainer.policy.device, grpo.COMPUTE_DTYPE):
        output = trainer.policy.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=grpo.MAX_COMPLETION_TOKENS,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=grpo.TEMPERATURE,
            eos_token_id=trainer.eos_ids,
            pad_token_id=trainer.tokenizer.pad_token_id,
        )
    completions = output[:, batch["input_ids"].shape[1] :].cpu()
    ends = torch.isin(completions, torch.tensor(trainer.eos_ids))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, completions.shape[1]).tolist()
    return sizes_of(ids, lengths, grpo.GROUP_SIZE)


class VLLM:
    """grpo.py with SAMPLER = "vllm" in a process of its own, so that neither takes the other's memory."""

    def __init__(self, **settings):
        command = [sys.executable, __file__, "--serve", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question):
        print(question, file=self.process.stdin, flush=True)
        answer = ""
        while not answer.startswith(ANSWER):  # vLLM prints there, too
            answer = self.process.stdout.readline()
            if not answer:
                sys.exit("vLLM ended; its message is above")
        return json.loads(answer.removeprefix(ANSWER))

    def __call__(self, trainer, rows, step):
        ids = [row["prompt_ids"] for row in rows for _ in range(grpo.GROUP_SIZE)]
        self.seconds_of_weights, lengths = self.ask(step)
        return sizes_of(ids, lengths, grpo.GROUP_SIZE)

    def gap(self, trainer):
        return self.ask("gap")


def serve(workload, folder, rounds, flags, dtype):
    """Samples the prompts of each step that a line of stdin names, or says the gap of the last ones, as Ours does.

    With lengths it says how long the engine took to get the weights.
    """
    set_constants(workload, folder, rounds + 1, flags=flags)
    grpo.SAMPLER, grpo.COMPUTE_DTYPE, way = "vllm", dtype, Ours()
    trainer = grpo.GRPOTrainer()
    push, took = trainer.sampler.push, []

    def timed_push():
        start = time.perf_counter()
        push()
        took.append(time.perf_counter() - start)

    trainer.sampler.push = timed_push
    for line in sys.stdin:
        if line == "gap\n":
            answer = way.gap(trainer)
        else:
            rows = prompts_of(trainer, int(line))
            lengths = [length for *_, length in way(trainer, rows, int(line))]
            answer = [took[-1], lengths]
        print(f"{ANSWER}{json.dumps(answer)}", flush=True)


def in_a_batch(trainer, rows, step):
    return generate(trainer, [row for row in rows for _ in range(grpo.GROUP_SIZE)], step)


def one_by_one(trainer, rows, step, count):
    chosen = itertools.islice(itertools.cycle(rows), count)
    return [generate(trainer, [row], 1000 * step + i)[0] for i, row in enumerate(chosen)]


def measure(workload, rounds, flags, dtypes, vllm, singles):
    """Returns seconds and the sizes_of completions per way and round, gaps per way and round, and the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(workload, folder)
        set_constants(workload, folder, rounds + 1, flags=flags)
        trainer = grpo.GRPOTrainer()
        dtypes = dtypes or [str(dtype_of("auto", trainer.policy.device)).removeprefix("torch.")]
        ways = {f"grpo.py, {dtype}": Ours() for dtype in dtypes}
        ways[f"generate() in a batch, {dtypes[0]}"] = in_a_batch
        if singles:
            ways[f"generate() one by one, {dtypes[0]}"] = functools.partial(one_by_one, count=singles)
        of_vllm = {"workload": workload, "folder": folder, "rounds": rounds, "flags": flags}
        ways |= {f"vLLM, {dtype}": VLLM(**of_vllm, dtype=dtype) for dtype in dtypes if vllm}
        found, gaps = {name: [] for name in ways}, {}
        for step in range(rounds + 1):
            rows = prompts_of(trainer, step)
            for name, way in list(ways.items())[:: 1 if step % 2 else -1]:
                grpo.COMPUTE_DTYPE = name.split(", ")[1]
                synchronize()
                start = time.perf_counter()
                sizes = way(trainer, rows, step)
                synchronize()
                seconds = time.perf_counter() - start
                if step:
                    found[name].append((seconds, sizes))
                    if isinstance(way, VLLM):
                        alone = seconds - way.seconds_of_weights
                        found.setdefault(f"vLLM without weights, {grpo.COMPUTE_DTYPE}", []).append((alone, sizes))
                    if hasattr(way, "gap"):
                        gaps.setdefault(name, []).append(way.gap(trainer))
    return found, gaps, trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", help="of products; generate() has the first alone")
    parser.add_argument("--vllm", action="store_true", help="compare vLLM, too")
    parser.add_argument("--one-by-one", type=int, default=16, metavar="N", help="completions of that way; 0: none")
    parser.add_argument("--flags", type=shlex.split, default=[], help="flags of grpo.py, in one string")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parse_with_workloads(parser)
    if arguments.serve:
        return serve(**arguments.serve)
    for workload in arguments.workloads:
        others = arguments.rounds, arguments.flags, arguments.dtypes, arguments.vllm, arguments.one_by_one
        found, gaps, trainer = measure(workload, *others)
        device, speeds = trainer.policy.device.type, {}
        peak, bandwidth = peak_flops(device), peak_bandwidth(device)
        print(f"\n{workload}, {arguments.rounds} rounds of {grpo.BATCH_SIZE} x {grpo.GROUP_SIZE} completions")
        print(f"matrix products {peak / 1e9:.0f} · 10⁹ operations, memory {bandwidth / 1e9:.1f} GB, per second\n")
        print("| way | s/round | completion tokens/s | mean length / maximum | utilisation | roofline | gap, nats |")
        print("|---|---|---|---|---|---|---|")
        for name, rounds in found.items():
            seconds, lengths = [s for s, _ in rounds], [[t for *_, t in sizes] for _, sizes in rounds]
            speeds[name] = [sum(one) / s for one, s in zip(lengths, seconds, strict=True)]
            single = name.startswith("generate() one by one")
            batches = [batch for _, sizes in rounds for batch in ([[one] for one in sizes] if single else [sizes])]
            done = sum(flops_of_pass(trainer.policy, batch) for batch in batches)
            width = 2 if name.endswith("bfloat16") else 4
            read = sum(bytes_of_decoding(trainer.policy, batch, width) for batch in batches)
            share = statistics.mean(sum(lengths, [])) / grpo.MAX_COMPLETION_TOKENS
            print(
                f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(speeds[name]):.0f} "
                f"| {share:.2f} | {done / sum(seconds) / peak:.2%} | {read / sum(seconds) / bandwidth:.1%} "
                f"| {f'{statistics.mean(gaps[name]):.1e}' if name in gaps else ''} |"
            )
        for name in [name for name in found if not name.startswith("grpo.py")]:
            same = f"grpo.py, {name.split(', ')[1]}"  # in the same dtype
            ratios = [fast / slow for fast, slow in zip(speeds[same], speeds[name], strict=True)]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"\n{same} over {name}, tokens per second, median and range: {text}", end="")
        print()


if __name__ == "__main__":
    main()
