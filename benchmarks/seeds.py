"""How surely and how fast a script learns its task: whole runs from the command line, one seed after another.

    python benchmarks/seeds.py                        gspo.py, seeds 0 to 9
    python benchmarks/seeds.py --seeds 0 1 --flags "--group-size 4"
    python benchmarks/seeds.py --seeds 0 1 2 3 4 --flags "--preset smollm2" --promise 0.40 0.80
    python benchmarks/seeds.py --runs FOLDER          keep the runs there, and do not repeat those already there

It prints a row per seed: wall seconds from start to picture, held-out accuracy before and after, the medians of seconds
per training step and of completion tokens per second, and the peak of memory of the process, libraries included. Then
it prints how many seeds keep a promise: at most so much accuracy before and at least so much after, sampled and greedy.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("eval_accuracy", "eval_accuracy_greedy")


def run(script, seed, flags, outputs):
    """Returns the metrics of one run, and {"wall": its seconds, "memory": the peak of its process in bytes}."""
    command = [sys.executable, str(ROOT / script), "--seed", str(seed), "--output-dir", str(outputs), *flags]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            sys.exit(f"{shlex.join(command)}\n{errors.read().decode()}")
    took = {"wall": time.perf_counter() - start, "memory": usage.ru_maxrss * 1024}
    (folder,) = outputs.iterdir()
    assert (folder / "metrics.png").is_file()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], took


def kept_run(script, seed, flags, runs):
    """Does the same as run(), and keeps the run's folder in runs. A run that is already there is not repeated."""
    outputs = Path(runs) / f"{Path(script).stem}-{seed}"
    took = outputs / "took.json"
    if not took.is_file():
        outputs.mkdir(parents=True, exist_ok=True)
        rows, found = run(script, seed, flags, outputs)
        took.write_text(json.dumps(found))
        return rows, found
    (metrics,) = outputs.glob("*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()], json.loads(took.read_text())


def seconds_of(row):
    """Returns the seconds of a training step, from its metrics."""
    return sum(value for name, value in row.items() if name.startswith("seconds_"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="gspo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10))
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of the script, in one string")
    parser.add_argument("--promise", type=float, nargs=2, default=(0.45, 0.90), metavar=("BEFORE", "AFTER"))
    parser.add_argument("--runs", type=Path, help="folder of the runs, for these flags alone")
    arguments = parser.parse_args()
    print("| seed | wall s | sampled before | after | greedy before | after | s/step | tokens/s | peak GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    kept = 0
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows, took = kept_run(arguments.script, seed, arguments.flags, arguments.runs or folder)
        before, after = ([row[name] for name in NAMES] for row in (rows[0], rows[-1]))
        step = statistics.median(seconds_of(row) for row in rows[1:])
        speed = statistics.median(row["tokens_per_second"] for row in rows[1:])
        print(
            f"| {seed} | {took['wall']:.0f} | {before[0]:.3f} | {after[0]:.3f} | {before[1]:.3f} | {after[1]:.3f} "
            f"| {step:.2f} | {speed:.0f} | {took['memory'] / 1e9:.1f} |",
            flush=True,
        )
        most, least = arguments.promise
        kept += max(before) <= most and min(after) >= least
    promise = "at most {:.2f} before and at least {:.2f} after, both ways".format(*arguments.promise)
    print(f"\n{kept} of {len(arguments.seeds)} seeds: {promise}")


if __name__ == "__main__":
    main()
