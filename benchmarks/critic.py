"""What a critic costs, and how much it explains while the policy stands still.

    python benchmarks/critic.py                  both tables
    python benchmarks/critic.py --only cost      or --only variance

Cost: grpo.py, ppo.py and vapo.py train on the same prompts, completions per step and rewards, without a KL term, by
their command line and in turn. It prints medians over the rounds, and the median of the ratios to grpo.py of the same
round. Memory is the most resident memory of the process. One workload is the embedded task, the other a random model of
15 M parameters whose completions have up to 256 tokens.

Variance: ppo.py with the policy at rest for 50 steps of 16 x 8 completions and 4 updates of the critic each, for a
critic of the policy's body with a zero head, and for one of the reward model's body and head. It prints means of
explained_variance, of all tokens and of the last ones, against returns of λ = 0.95, which hold the critic's own values,
and of λ = 1, which are the outcomes alone.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open
from seeds import seconds_of
from workloads import ROOT, WORKLOADS, prepare

SCRIPTS = ("grpo.py", "ppo.py", "vapo.py")
SAME = "--group-size 8 --kl-coef 0 --sample-groups 0 --eval-size 8 --eval-samples 1 --eval-every 0"
OF_SCRIPT = {"vapo.py": ["--value-pretrain-steps", "0"]}
STEPS = {"embedded": 20, "longtail": 6}


def run(script, flags, outputs):
    """Returns the metrics of a run, the folder of the run, and its peak of resident memory, bytes."""
    command = [sys.executable, str(ROOT / script), *flags, "--output-dir", str(outputs)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    (folder,) = outputs.iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[1:], folder, usage.ru_maxrss * 1024


def parameters_in(folder):
    """Returns the number of parameters of the models that a run has trained."""
    total = 0
    for path in folder.glob("final*/*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118, it is no dict
    return total


def print_cost(rounds):
    print("| workload | script | s per step | of it update | x grpo.py | peak memory, MB | trained parameters, M |")
    print("|---|---|---|---|---|---|---|")
    for workload in ("embedded", "longtail"):
        measured = {script: [] for script in SCRIPTS}
        with tempfile.TemporaryDirectory() as made:
            prepare(workload, made)
            flags = [*SAME.split(), "--max-steps", str(STEPS[workload])]
            constants = dict(WORKLOADS[workload]["constants"])
            if WORKLOADS[workload]["model"]:
                prompts = str(Path(made) / "prompts.jsonl")
                constants |= {"POLICY_MODEL": made, "PROMPTS": prompts, "EVAL_PROMPTS": prompts}
            for name, value in ({"BATCH_SIZE": 16} | constants).items():
                flags += ["--" + name.lower().replace("_", "-"), str(value)]
            for _ in range(rounds):
                for script in SCRIPTS:  # in turn
                    with tempfile.TemporaryDirectory() as outputs:
                        rows, folder, memory = run(script, flags + OF_SCRIPT.get(script, []), Path(outputs))
                        parameters = parameters_in(folder)
                    step = statistics.median(seconds_of(row) for row in rows)
                    update = statistics.median(row["seconds_update"] for row in rows)
                    measured[script].append((step, update, memory, parameters))
        for script, results in measured.items():
            step, update, memory, parameters = (statistics.median(values) for values in zip(*results, strict=True))
            ratio = statistics.median(a[0] / b[0] for a, b in zip(results, measured["grpo.py"], strict=True))
            print(
                f"| {workload} | {script} | {step:.2f} | {update:.2f} | {ratio:.2f} | {memory / 1e6:.0f} "
                f"| {parameters / 1e6:.2f} |",
                flush=True,
            )


def print_variance(seeds):
    spans = {"step 1": (0, 1), "11 to 20": (10, 20), "41 to 50": (40, 50)}
    print("| critic begins from | returns of λ | " + " | ".join(spans) + " | last tokens, 41 to 50 |")
    print("|---|---|---|---|---|---|")
    flags = "--critic-warmup-steps 50 --max-steps 51 --group-size 8 --batch-size 16 --critic-lr-schedule constant"
    flags += " --eval-every 0 --eval-size 8 --kl-coef 0"
    models = {"the policy, a zero head": "", "the reward model, its head": "data/models/arithmetic-reward"}
    for lam, (name, model) in itertools.product((0.95, 1.0), models.items()):
        runs = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as outputs:
                chosen = ["--critic-model", model, "--lambda", str(lam), "--seed", str(seed)]
                runs.append(run("ppo.py", flags.split() + chosen, Path(outputs))[0])
        cells = [mean_of(runs, "explained_variance", *span) for span in spans.values()]
        cells.append(mean_of(runs, "explained_variance_last", 40, 50))
        print(f"| {name} | {lam:g} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


def mean_of(runs, metric, begin, end):
    return statistics.mean(row[metric] or 0.0 for rows in runs for row in rows[begin:end])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("cost", "variance"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    arguments = parser.parse_args()
    if arguments.only != "variance":
        print_cost(arguments.rounds)
    if arguments.only != "cost":
        print_variance(arguments.seeds)


if __name__ == "__main__":
    main()
