"""Kills real runs at random moments, resumes them, and compares what comes out with an uninterrupted run.

    python benchmarks/crash.py --kills 50

Each run is the smoke preset of a script with a checkpoint after every step; it is killed by SIGKILL at a random moment,
resumed with --resume, killed again, until it has had its kills and is left to end. Prints a table: kills, how far the
run had come at each, and whether metrics (times aside), samples and final weights are those of the uninterrupted run.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gspo", "grpo", "dapo")
FLAGS = "--preset smoke --max-steps 8 --save-every 1 --eval-every 3 --keep-checkpoints 2".split()


def start(script, folder, *more):
    command = [sys.executable, str(ROOT / f"{script}.py"), *FLAGS, "--output-dir", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(errors)


def left_by(folder):
    """What must not differ: metrics without times, samples, and the final weights, byte for byte."""
    (run,) = folder.iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {key: value for key, value in row.items() if key != "tokens_per_second" and not key.startswith("seconds_")}
        for row in rows
    ]
    return timeless, (run / "samples.jsonl").read_bytes(), (run / "final" / "model.safetensors").read_bytes()


def steps_done(folder):
    files = list(folder.glob("*/metrics.jsonl"))
    return len(files[0].read_text().splitlines()) - 1 if files else -1


def measure(script, kills, folder, seed=0):
    """One run with so many kills: how many there were, at which steps, and whether it ended as the other one."""
    began = time.perf_counter()
    finish(start(script, folder / "whole"))
    whole, moments, killed, at = time.perf_counter() - began, random.Random(seed), folder / "killed", []
    while len(at) < kills:
        process = start(script, killed, *(["--resume", "latest"] if list(killed.glob("*/config.json")) else []))
        time.sleep(moments.uniform(0.4 * whole, whole))  # starting takes the first part
        if process.poll() is None:
            at.append(steps_done(killed))
        process.kill()
        process.communicate()
        if (begun := list(killed.glob("*"))) and not (begun[0] / "config.json").exists():
            begun[0].joinpath("lock").unlink(missing_ok=True)
            for path in [*begun[0].iterdir(), begun[0]]:  # killed before there was anything to resume
                path.rmdir() if path.is_dir() else path.unlink()
        if list(killed.glob("*/final/model.safetensors")) and steps_done(killed) >= 8:
            if left_by(killed) != left_by(folder / "whole"):
                return {"kills": len(at), "at": at, "identical": False}
            killed = killed.with_name(f"{killed.name}+")  # it had come to its end: the next one
    finish(start(script, killed, *(["--resume", "latest"] if list(killed.glob("*/config.json")) else [])))
    return {"kills": len(at), "at": at, "identical": left_by(killed) == left_by(folder / "whole")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="over all three scripts")
    arguments = parser.parse_args()
    print("| script | kills | after step (-1: before the first evaluation) | ends as the uninterrupted run |")
    print("|---|---|---|---|")
    for number, script in enumerate(SCRIPTS):
        kills = arguments.kills // 3 + (number < arguments.kills % 3)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(script, kills, Path(folder), seed=number)
        steps = ", ".join(f"{step}: {found['at'].count(step)}" for step in sorted(set(found["at"])))
        print(f"| {script}.py | {found['kills']} | {steps} | {'yes' if found['identical'] else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
