"""What several processes are worth: the seconds of grpo.py's steps by one process, and by several under torchrun.

    python benchmarks/processes.py                     the embedded task, 1 and 2 processes
    python benchmarks/processes.py smollm2 --counts 1 2 4 --steps 3

Each count gets the same work, a run of its own in turn, and in total as many threads as there are cores. The first step
is not counted. "Waiting" is the time in which a process waits for the others, as a share of the step: mostly for the
sum of the gradients, and for whoever is slower. If weights are sharded (SHARD), the gathering of layers and the sums of
gradients come within the passes, so the column does not have them. On a GPU machine each process has its own GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from workloads import ROOT, grpo, parse_with_workloads, prepare, set_constants

from engine import processes


def work(workload, folder, steps, sharded):
    """Trains for some steps, and prints the seconds of each and how much of them the process waited."""
    waited, hold = [0.0], processes.Meetings.hold.__func__

    def timed(cls, what, work):
        start = time.perf_counter()
        result = hold(cls, what, work)
        waited[0] += time.perf_counter() - start
        return result

    processes.Meetings.hold = classmethod(timed)
    set_constants(workload, folder, steps)
    grpo.SHARD = sharded
    trainer = grpo.GRPOTrainer()
    grpo.set_up_process(trainer.policy_device)
    found = []
    for step in range(1, steps + 1):
        start, before = time.perf_counter(), waited[0]
        trainer.train_step(step)
        found.append((time.perf_counter() - start, waited[0] - before))
    if processes.rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(found[1:]))
    processes.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parse_with_workloads(parser)
    if arguments.work:
        workload, folder, steps, way = arguments.work
        return work(workload, folder, int(steps), way == "sharded")
    ways = [(count, way) for count in arguments.counts for way in ("whole", "sharded") if count > 1 or way == "whole"]
    for workload in arguments.workloads:
        seconds, shares = {way: [] for way in ways}, {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as folder:
            prepare(workload, folder)
            for _ in range(arguments.rounds):
                for count, way in ways:
                    threads = str(max(1, os.cpu_count() // count))
                    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
                    own = [__file__, "--work", workload, folder, str(arguments.steps), way]
                    environment = os.environ | {"OMP_NUM_THREADS": threads}
                    subprocess.run([*start, *own], check=True, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
                    found = json.loads(Path(folder, "found.json").read_text())
                    seconds[count, way].append(statistics.median(taken for taken, _ in found))
                    shares[count, way].append(sum(waited for _, waited in found) / sum(taken for taken, _ in found))
        kind = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else f"{os.cpu_count()} cores"
        print(f"\n{workload}, {arguments.rounds} rounds of {arguments.steps - 1} steps, {kind}\n")
        print("| processes | weights | s/step | times as fast as the first | waiting |\n|---|---|---|---|---|")
        for (count, way), taken in seconds.items():
            ratios = [one / other for one, other in zip(seconds[ways[0]], taken, strict=True)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            waited = statistics.median(shares[count, way])
            print(f"| {count} | {way} | {statistics.median(taken):.3f} | {spread} | {waited:.0%} |")


if __name__ == "__main__":
    main()
