"""The floor of a step: how long PyTorch takes to call as many operators as a step calls, if they have nothing to do.

    python benchmarks/floor.py                   embedded and longtail
    python benchmarks/floor.py smollm2 --rounds 3

A step of a small model is thousands of small operators, and each call has a price before anything is computed. For
each part of a step of grpo.py it counts the operators that reach PyTorch's dispatcher, forward and backward, and
multiplies them with the price of one on empty tensors: of a multiplication in inference mode for the rollout and the
scores, and of one with its backward pass, per operator, for the update. Python between the calls is not counted, so no
program that calls these operators can be faster. Beside it stand the median seconds of the part over the rounds.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import grpo, parse_with_workloads, prepare, set_constants, synchronize

CALLS = 1000  # operators on empty tensors, one after the other, whose time gives the price of one


class Counting(TorchDispatchMode):
    """Counts the operators that are called while it is on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def empty_calls(device, with_gradient):
    """Calls operators on empty tensors, one after the other: a chain of multiplications, and its backward pass."""
    x = start = torch.zeros(0, device=device, requires_grad=with_gradient)
    with contextlib.nullcontext() if with_gradient else torch.inference_mode():
        for _ in range(CALLS):
            x = x * x
    if with_gradient:
        torch.autograd.grad(x, start, x)


def price_of_a_call(device, with_gradient):
    """Returns the seconds that one operator takes on empty tensors: the fastest of several tries."""
    with Counting() as counting:
        empty_calls(device, with_gradient)
    best = float("inf")
    for _ in range(20):
        synchronize()
        start = time.perf_counter()
        empty_calls(device, with_gradient)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best / counting.calls


def measured(trainer, step, counted):
    """Does a step, and returns for its rollout, its update and the rest of it what it took: seconds, or operators."""
    found = {}

    def watched(name, work):
        def watch(*arguments):
            synchronize()
            start = time.perf_counter()
            with Counting() if counted else contextlib.nullcontext() as counting:
                result = work(*arguments)
            synchronize()
            found[name] = counting.calls if counted else time.perf_counter() - start
            return result

        return watch

    inner = {"rollout": "generate_responses_with_group_sampling", "update": "update_policy"}
    for name, method in inner.items():
        setattr(trainer, method, watched(name, getattr(trainer, method)))
    watched("rest", trainer.train_step)(step)
    for method in inner.values():
        delattr(trainer, method)  # so that the class's own is back
    return found | {"rest": found["rest"] - found["rollout"] - found["update"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parse_with_workloads(parser)
    for workload in arguments.workloads:
        with tempfile.TemporaryDirectory() as folder:
            prepare(workload, folder)
            set_constants(workload, folder, steps=arguments.rounds + 2)
            with contextlib.redirect_stdout(sys.stderr):  # keeps it out of the table
                trainer = grpo.GRPOTrainer()
        measured(trainer, 1, counted=False)  # warms up
        rounds = [measured(trainer, 2 + number, counted=False) for number in range(arguments.rounds)]
        calls = measured(trainer, 2 + arguments.rounds, counted=True)
        prices = {kind: price_of_a_call(trainer.policy_device, kind) for kind in (False, True)}
        print(f"\n{workload}, {arguments.rounds} rounds\n")
        print("| part | operators | µs of an empty one | floor, s | measured, s | floor / measured |")
        print("|---" * 6 + "|")
        sums = [0, 0.0, 0.0]
        for part in ("rollout", "rest", "update"):
            price, seconds = prices[part == "update"], statistics.median(found[part] for found in rounds)
            row = calls[part], calls[part] * price, seconds
            sums = [total + value for total, value in zip(sums, row, strict=True)]
            print(f"| {part} | {row[0]} | {price * 1e6:.2f} | {row[1]:.3f} | {seconds:.3f} | {row[1] / seconds:.0%} |")
        print(f"| step | {sums[0]} | | {sums[1]:.3f} | {sums[2]:.3f} | {sums[1] / sums[2]:.0%} |")


if __name__ == "__main__":
    main()
