"""How surely and how fast a script learns the embedded task: whole runs from the command line, one seed after another.

    python benchmarks/seeds.py                        gspo.py, seeds 0 to 9
    python benchmarks/seeds.py --seeds 0 1 --flags "--group-size 4"

It prints a row per seed: wall seconds from start to picture, held-out accuracy before and after, and the medians of
seconds per training step and of completion tokens per second. Then it prints how many seeds reach the promise of
docs/gspo.md: at most 0.45 before and at least 0.90 after, sampled and greedy.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script, seed, flags, outputs):
    """Returns the metrics of one run, and its wall seconds."""
    command = [sys.executable, str(ROOT / script), "--seed", str(seed), "--output-dir", str(outputs), *flags]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")
    (folder,) = outputs.iterdir()
    assert (folder / "metrics.png").is_file()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], seconds


def seconds_of(row):
    """Returns the seconds of a training step, from its metrics."""
    return sum(value for name, value in row.items() if name.startswith("seconds_"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="gspo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10))
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of the script, in one string")
    arguments = parser.parse_args()
    print("| seed | wall s | sampled before | after | greedy before | after | s/step | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    reached = 0
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as outputs:
            rows, wall = run(arguments.script, seed, arguments.flags, Path(outputs))
        names = ("eval_accuracy", "eval_accuracy_greedy")
        before, after = ([row[name] for name in names] for row in (rows[0], rows[-1]))
        step = statistics.median(seconds_of(row) for row in rows[1:])
        speed = statistics.median(row["tokens_per_second"] for row in rows[1:])
        print(
            f"| {seed} | {wall:.0f} | {before[0]:.3f} | {after[0]:.3f} | {before[1]:.3f} | {after[1]:.3f} "
            f"| {step:.2f} | {speed:.0f} |",
            flush=True,
        )
        reached += max(before) <= 0.45 and min(after) >= 0.90
    print(f"\n{reached} of {len(arguments.seeds)} seeds: at most 0.45 before and at least 0.90 after, both ways")


if __name__ == "__main__":
    main()
