"""Rollouts alone, in one process, in turn: grpo.py's sampler, generate() on the same batch, and generate() one by one.

    python benchmarks/rollouts.py                          embedded and longtail
    python benchmarks/rollouts.py longtail --rounds 3

All ways have the same policy, prompts and group size, sample from the whole distribution, and use a key/value cache.
The batch of generate() holds each prompt GROUP_SIZE times, padded on the left, as TRL's trainer calls it. "One by one"
samples ONE_BY_ONE completions of each round's prompts, one of each first. It is compared by completion tokens per
second. The first round warms up.

Utilisation compares the useful operations with the peak of matrix products. Roofline is the least time in which memory
could be read for useful tokens, over the time that was taken. workloads.py says how both are counted.
"""

import argparse
import itertools
import os
import statistics
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

ONE_BY_ONE = 16


def ours(trainer, rows, step):
    return sizes_of_rollouts(trainer.sample(rows, grpo.GROUP_SIZE, ("rollout", step)))


@torch.no_grad()
def generate(trainer, rows, step):
    """Samples one completion for each of the rows in one call of generate(). Returns the sizes_of them."""
    torch.manual_seed(step)
    ids = [row["prompt_ids"] for row in rows]
    batch = trainer.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(
        trainer.policy.device
    )
    with grpo.autocast(trainer.policy.device):
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


def in_a_batch(trainer, rows, step):
    return generate(trainer, [row for row in rows for _ in range(grpo.GROUP_SIZE)], step)


def one_by_one(trainer, rows, step):
    chosen = itertools.islice(itertools.cycle(rows), ONE_BY_ONE)
    return [generate(trainer, [row], 1000 * step + i)[0] for i, row in enumerate(chosen)]


WAYS = {"grpo.py": ours, "generate(), in a batch": in_a_batch, "generate(), one by one": one_by_one}


def measure(workload, rounds):
    """Returns seconds and the sizes_of completions per way and round, and the trainer."""
    found = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(workload, folder)
        set_constants(workload, folder, rounds + 1)
        trainer = grpo.GRPOTrainer()
        for step in range(rounds + 1):
            rows = grpo.prompts_of_step(trainer.train_rows, step + 1, grpo.BATCH_SIZE, grpo.generator_of)
            for name, way in list(WAYS.items())[:: 1 if step % 2 else -1]:
                synchronize()
                start = time.perf_counter()
                sizes = way(trainer, rows, step)
                synchronize()
                if step:
                    found[name].append((time.perf_counter() - start, sizes))
    return found, trainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parse_with_workloads(parser)
    for workload in arguments.workloads:
        found, trainer = measure(workload, arguments.rounds)
        device, speeds = trainer.policy.device.type, {}
        peak, bandwidth = peak_flops(device), peak_bandwidth(device)
        print(f"\n{workload}, {arguments.rounds} rounds of {grpo.BATCH_SIZE} x {grpo.GROUP_SIZE} completions\n")
        print("| way | s/round | completion tokens/s | mean length / maximum | utilisation | roofline |")
        print("|---|---|---|---|---|---|")
        for name, rounds in found.items():
            seconds, lengths = [s for s, _ in rounds], [[t for *_, t in sizes] for _, sizes in rounds]
            speeds[name] = [sum(one) / s for one, s in zip(lengths, seconds, strict=True)]
            single = name == "generate(), one by one"
            batches = [batch for _, sizes in rounds for batch in ([[one] for one in sizes] if single else [sizes])]
            done = sum(flops_of_pass(trainer.policy, batch) for batch in batches)
            read = sum(bytes_of_decoding(trainer.policy, batch) for batch in batches)
            share = statistics.mean(sum(lengths, [])) / grpo.MAX_COMPLETION_TOKENS
            print(
                f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(speeds[name]):.0f} "
                f"| {share:.2f} | {done / sum(seconds) / peak:.2%} | {read / sum(seconds) / bandwidth:.1%} |"
            )
        for name in list(WAYS)[1:]:
            ratios = [fast / slow for fast, slow in zip(speeds["grpo.py"], speeds[name], strict=True)]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"\ngrpo.py over {name}, tokens per second, median and range: {text}", end="")
        print()


if __name__ == "__main__":
    main()
