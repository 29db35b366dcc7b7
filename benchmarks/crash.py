"""Kills real runs at random moments, resumes them, and compares the results with an uninterrupted run.

    python benchmarks/crash.py --kills 50

Each run is the smoke preset of a script, with a checkpoint after every step. SIGKILL ends it at a random moment, and
--resume continues it, until it ends by itself. Then the next run begins. It prints a table: the number of kills, the
steps that were done at each (-1: the evaluation before the first was not), and how many of the runs ended like the
uninterrupted one, with the same metrics (except times), samples and final weights.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs

ROOT = configs.HERE
SCRIPTS = [path.stem for path in configs.scripts()]
FLAGS = "--preset smoke --max-steps 8 --save-every 1 --eval-every 3 --keep-checkpoints 2".split()


def start(script, folder):
    """Starts a script that resumes the run in the folder, or begins one. Returns its process."""
    resume = ["--resume", "latest"] if list(folder.glob("*/config.json")) else []
    command = [sys.executable, str(ROOT / f"{script}.py"), *FLAGS, "--output-dir", str(folder), *resume]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def left_by(folder):
    """Returns everything that must not differ: metrics without times, samples, and the bytes of the final weights."""
    (run,) = (path.parent for path in folder.glob("*/final"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {key: value for key, value in row.items() if key != "tokens_per_second" and not key.startswith("seconds_")}
        for row in rows
    ]
    weights = [path.read_bytes() for path in sorted(run.glob("final*/model.safetensors"))]  # of a critic, too
    return timeless, (run / "samples.jsonl").read_bytes(), weights


def steps_done(folder):
    return max((len(path.read_text().splitlines()) - 1 for path in folder.glob("*/metrics.jsonl")), default=-1)


def measure(script, kills, folder, seed=0):
    """Kills runs of a script until there are enough kills. Each run continues until it has ended by itself.

    Returns the steps that were done at each kill, and for each finished run whether it equals the uninterrupted one.
    """
    moments, seconds, at, identical = random.Random(seed), None, [], []
    while len(at) < kills or len(identical) == 0 or (folder / str(len(identical))).exists():
        run = folder / str(len(identical))  # the first one is uninterrupted
        process, began = start(script, run), time.perf_counter()
        patience = moments.uniform(0.3, 1) * seconds if identical and len(at) < kills else None
        try:
            _, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            at.append(steps_done(run))
            continue
        if process.returncode:
            sys.exit(errors)
        identical.append(left_by(run) == left_by(folder / "0"))
        seconds = time.perf_counter() - began if seconds is None else 0.8 * seconds  # the run ended before its kill
    return at, identical[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="over all scripts")
    arguments = parser.parse_args()
    print("| script | kills | steps done at a kill: how often | runs that ended | as the uninterrupted one |")
    print("|---|---|---|---|---|")
    for number, script in enumerate(SCRIPTS):
        kills = arguments.kills // len(SCRIPTS) + (number < arguments.kills % len(SCRIPTS))
        with tempfile.TemporaryDirectory() as folder:
            at, identical = measure(script, kills, Path(folder), seed=number)
        steps = ", ".join(f"{step}: {at.count(step)}" for step in sorted(set(at)))
        print(f"| {script}.py | {len(at)} | {steps} | {len(identical)} | {sum(identical)} |", flush=True)


if __name__ == "__main__":
    main()
