"""How much time each optimisation takes or saves: the same work with it and without it, in turns, in one process.

    python benchmarks/parts.py                          embedded and longtail
    python benchmarks/parts.py longtail --rounds 9

The work is an update, which is one optimizer step on a mini-batch, or the sampling of a step: all at once ("rollout"),
or with room for a quarter of it ("refill"). It prints how many times as long the work takes without the optimisation:
the median over the rounds, and the quartiles. Then it prints the model-flop utilisation with all of them: useful
operations (workloads.py) over those of the best of some matrix products right afterwards. A profile gives the share of
matrix products in the time of a rollout and of an update, and their speed. The first round warms up.
"""

import argparse
import contextlib
import math
import operator
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch
from workloads import (
    flops,
    grpo,
    parse_with_workloads,
    peak_flops,
    prepare,
    set_constants,
    sizes_of_rollouts,
    synchronize,
)

from engine import batch, decoding, packing, products, sampling, vocabulary

ONEDNN = "mkldnn::_linear_pointwise"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", ONEDNN)


def plain_token_logps(hidden, targets, head, with_entropy, at_once):
    log_probs = head(hidden).float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1) if with_entropy else torch.zeros_like(log_probs[:, 0])
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropy


@contextlib.contextmanager
def not_fused(optimizer):
    for group in optimizer.param_groups:
        group["fused"] = False
    yield
    for group in optimizer.param_groups:
        group["fused"] = True


def no_common_start(ids, lengths):
    return 0


def kept(compute, *states):
    return compute(*states)


def fill_when_empty(self, fill=batch.Batch.fill):
    if len(self.place) == 0:
        fill(self)


def parts_of(trainer):
    """Returns (name, work, a context without it) for each optimisation.

    Those of sampling come first, because an update changes how the policy samples.
    """
    patch = mock.patch.object
    return [
        ("the sampler's own decode step", "rollout", lambda: patch(decoding, "FAMILY", ())),
        (
            "two-level inversion",
            "rollout",
            lambda: patch(sampling, "invert_cumulative", lambda *a: vocabulary._passes(*a)[0]),
        ),
        ("weights laid out for sampling", "rollout", lambda: patch(products, "LARGE", math.inf)),
        ("sampling in inference mode", "rollout", lambda: patch(torch, "inference_mode", torch.no_grad)),
        (
            "the common start of prompts, in sampling",
            "rollout",
            lambda: patch(batch, "common_start", no_common_start),
        ),
        ("refill, with room for a quarter", "refill", lambda: patch(batch.Batch, "fill", fill_when_empty)),
        ("the head by blocks of the vocabulary", "update", lambda: patch(grpo, "token_logps", plain_token_logps)),
        ("logits kept for the backward pass", "update", lambda: patch(grpo, "LOGITS_AT_ONCE", 2**22)),
        ("attention by rows of like length", "update", lambda: patch(packing, "split_by_length", lambda n, _: [n])),
        ("prompts that go through once", "update", lambda: patch(packing, "SHORT_PROMPT", 10**9)),
        (
            "the common start of prompts, in the update",
            "update",
            lambda: patch(packing, "common_start", no_common_start),
        ),
        ("copies of prompts made again, which saves memory", "update", lambda: patch(packing, "computed_again", kept)),
        ("fused AdamW", "update", lambda: not_fused(trainer.optimizer)),
        *([("whole groups", "update", lambda: patch(grpo, "WHOLE_GROUPS", False))] if grpo.WHOLE_GROUPS else []),
    ]


def works_of(workload):
    """Returns a trainer, and {work: function of a number that does it and returns its sizes}."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(workload, folder)
        set_constants(workload, folder, steps=1)
        with contextlib.redirect_stdout(sys.stderr):  # keeps it out of the table
            trainer = grpo.GRPOTrainer()
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rollouts.ref_logps, rollouts.old_logps = trainer.compute_ref_logps(rollouts), rollouts.sampled_logps.clone()
    rollouts.advantages = torch.randn(len(rollouts.texts), generator=grpo.generator_of("parts")).to(
        trainer.policy_device
    )

    def update(number):
        mini_batches = trainer.mini_batches(rollouts, step=1, epoch=0)
        rows = mini_batches[number % len(mini_batches)]
        trainer.update(rollouts.select(rows))
        sizes = sizes_of_rollouts(rollouts)
        return [sizes[row] for row in rows]

    def rollout(number):
        return sizes_of_rollouts(trainer.generate_responses_with_group_sampling(number))

    def refill(number):
        with mock.patch.object(trainer.sampler, "at_once", len(rollouts.texts) // 4):
            return rollout(number)

    return trainer, {"update": update, "rollout": rollout, "refill": refill}


def measured(trainer, works, work, number):
    """Returns the seconds that a work takes, and its useful operations per second."""
    synchronize()
    start = time.perf_counter()
    sizes = works[work](number)
    synchronize()
    seconds = time.perf_counter() - start
    return seconds, flops(trainer.policy, sizes, sizes, False)["update" if work == "update" else "rollout"] / seconds


def measure(trainer, works, rounds):
    """Yields (name, work, seconds with it, utilisation with it, times as long without it) for each optimisation.

    The last three are lists with a value per round.
    """
    for part, work, without in parts_of(trainer):
        seconds, shares, ratios = [], [], []
        for number in range(rounds + 1):
            found = {}
            for context in (contextlib.nullcontext, without) if number % 2 else (without, contextlib.nullcontext):
                with context():
                    found[context] = measured(trainer, works, work, number)
            taken, speed = found[contextlib.nullcontext]
            seconds.append(taken)
            shares.append(speed / peak_flops(trainer.policy_device.type, seconds=0.2))
            ratios.append(found[without][0] / taken)
        yield part, work, seconds[1:], shares[1:], ratios[1:]


def flops_of_product(event):
    """Returns the operations of a profile's event. The profiler does not know those of oneDNN's product."""
    if event.key != ONEDNN:
        return event.flops
    (rows, width), (columns, _) = event.input_shapes[:2]
    return 2 * rows * width * columns * event.count


def matrix_products(trainer, works, work, rounds):
    """Returns medians for a work: the share of matrix products in its time, their speed, and the speed of the whole.

    Speeds are shares of the peak. The speed of the whole is that of the work without a profile, beside each profiled
    one.
    """
    device, found = trainer.policy_device.type, []
    time_of = operator.attrgetter(f"self_{'cpu' if device == 'cpu' else 'device'}_time_total")  # microseconds
    for number in range(rounds):
        _, whole = measured(trainer, works, work, number)
        with torch.profiler.profile(with_flops=True) as profile:
            works[work](number)
            synchronize()
        peak, operations = peak_flops(device, seconds=0.2), profile.key_averages(group_by_input_shape=True)
        multiplied = [one for one in operations if one.key in PRODUCTS]
        taken = sum(map(time_of, multiplied))
        speed = sum(map(flops_of_product, multiplied)) / taken * 1e6
        found.append((taken / sum(map(time_of, operations)), speed / peak, whole / peak))
    return [statistics.median(column) for column in zip(*found, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parse_with_workloads(parser)
    if arguments.rounds < 2:
        parser.error("--rounds: give at least two, because quartiles need them")
    for workload in arguments.workloads:
        trainer, works = works_of(workload)
        print(f"\n{workload}, {arguments.rounds} rounds\n")
        print("| without | takes, times as long | quartiles | with it, s |\n|---|---|---|---|")
        utilisation = {}
        for part, work, seconds, shares, ratios in measure(trainer, works, arguments.rounds):
            low, middle, high = statistics.quantiles(ratios, method="inclusive")
            with_it = statistics.median(seconds)
            print(f"| {part} | {work} {middle:.2f} | {low:.2f} to {high:.2f} | {with_it:.3f} |", flush=True)
            utilisation[work] = utilisation.get(work, []) + shares
        for work, shares in utilisation.items():
            low, middle, high = statistics.quantiles(shares, method="inclusive")
            print(f"\nutilisation with all of them, {work}: {middle:.1%} (quartiles {low:.1%} to {high:.1%})", end="")
        for work in ("rollout", "update"):
            share, speed, whole = matrix_products(trainer, works, work, arguments.rounds)
            print(f"\n{work}, matrix products: {share:.0%} of the time, at {speed:.0%} of the peak; ", end="")
            print(f"the work beside, as a whole: {whole:.0%}", end="")
        print()


if __name__ == "__main__":
    main()
