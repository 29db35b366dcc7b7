"""What each way of computing a mixture's experts costs, and whether its gradients repeat: the constant EXPERTS.

    python benchmarks/experts.py                     the mixture of --preset moe
    python benchmarks/experts.py --flags "--policy-model MODEL --micro-batch-tokens 8192" --rounds 3

All ways get the same completions and take the gradient of one update and sample a step's completions, in turns. It
prints the medians of the seconds, their range over those of "eager", and in how many of the rounds the gradient was
another than in the first one, by how much of the largest number in it. Only "eager" is promised to resume to the bit.
"""

import argparse
import contextlib
import io
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
import gspo

KINDS = "eager", "grouped_mm", "batched_mm"


def trainers_of(flags):
    """Returns {kind: trainer}, all with the same weights."""
    trainers = {}
    with configs.one_line_errors(), contextlib.redirect_stdout(io.StringIO()):
        configs.apply_overrides(vars(gspo), flags)
        for gspo.EXPERTS in KINDS:
            trainers[gspo.EXPERTS] = gspo.GSPOTrainer()
    return trainers


def timed(work):
    """Returns the seconds of work(), and its result."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flags", type=shlex.split, default=["--preset", "moe"], help="of gspo.py, in one string")
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    trainers = trainers_of(arguments.flags)
    eager = trainers["eager"]
    rows = gspo.prompts_of_step(eager.train_rows, 1, gspo.BATCH_SIZE, gspo.generator_of)
    rollouts = eager.sample(rows, gspo.GROUP_SIZE, ("rollout", 1))
    rollouts.old_logps = rollouts.sampled_logps.to(eager.policy_device)
    generator = torch.Generator().manual_seed(0)
    rollouts.advantages = torch.randn(len(rollouts.texts), generator=generator).to(eager.policy_device)
    batch = rollouts.select(eager.mini_batches(rollouts, 1, epoch=0)[0])
    updates, samplings, differences = ({kind: [] for kind in KINDS} for _ in range(3))
    first = {}
    for _ in range(arguments.rounds + 1):  # the first one warms up
        for kind, trainer in trainers.items():
            updates[kind].append(timed(lambda: trainer.compute_gradient(batch, gspo.MICRO_BATCH_TOKENS))[0])  # noqa: B023
            gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.trained])
            before = first.setdefault(kind, gradient)
            differences[kind].append(((gradient - before).abs().max() / before.abs().max()).item())
            trainer.optimizer.zero_grad()
            samplings[kind].append(timed(lambda: trainer.sample(rows, gspo.GROUP_SIZE, ("rollout", 1)))[0])  # noqa: B023
    print("| experts | s/update | over eager | s/rollout | over eager | gradients that differ | by at most |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        cells = []
        for seconds in (updates, samplings):
            own, base = seconds[kind][1:], seconds["eager"][1:]
            ratios = [a / b for a, b in zip(own, base, strict=True)]
            cells += [
                f"{statistics.median(own):.3f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        found = differences[kind][1:]
        print(
            f"| {kind} | {' | '.join(cells)} | {sum(value > 0 for value in found)} of {len(found)} | {max(found):.0e} |"
        )
    device = torch.cuda.get_device_name() if eager.policy.device.type == "cuda" else "CPU"
    print(f"\n{device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
