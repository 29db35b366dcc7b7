"""The scripts against each other on one task: held-out accuracy after equal numbers of sampled completions.

    python benchmarks/compare.py                          all scripts, seeds 0 to 4 of each, in turn, the embedded task
    python benchmarks/compare.py --seeds 0 1 --flags "--rewards exact_match"
    python benchmarks/compare.py --runs FOLDER            keep the runs there, and do not repeat those already there
    python benchmarks/compare.py --scripts gspo.py grpo.py dapo.py cispo.py --flags "--preset smollm2 --save-every 0" \
        --budgets 960 1920 --least 0.80 --picture docs/smollm2-comparison.png

It prints accuracy after N completions: mean and standard deviation over the seeds, interpolated between evaluations. It
prints which differences exceed the spread over the seeds, so that the two ranges do not overlap. It prints how many
seeds end at 0.90 or above, or at --least, sampled and greedy. It draws docs/comparison.png: mean and range over the
seeds, against completions and against the seconds of the training steps, without evaluation. --no-seconds leaves the
seconds out, if the runs in a folder come from several machines.
"""

import argparse
import itertools
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from seeds import ROOT, kept_run, seconds_of

sys.path.insert(0, str(ROOT))
import configs
from plotting import RUN_COLOURS

SCRIPTS = [path.name for path in configs.scripts()]
COLOURS = dict(zip(SCRIPTS, RUN_COLOURS, strict=False))
KINDS = {"eval_accuracy": "sampled", "eval_accuracy_greedy": "greedy"}
EVERY = "5"  # steps between evaluations


class Curve:
    """The accuracy of one run, with the completions sampled and the seconds of training steps so far."""

    def __init__(self, rows):
        completions = np.cumsum([row.get("sampled_completions", 0) for row in rows])
        seconds = np.cumsum([seconds_of(row) for row in rows])
        at = [i for i, row in enumerate(rows) if "eval_accuracy" in row]
        self.completions, self.seconds = completions[at], seconds[at]
        self.accuracy = {kind: np.array([rows[i][kind] for i in at]) for kind in KINDS}

    def after(self, kind, completions):
        """Returns the accuracy after that many completions, or NaN if the run ended before."""
        return float(np.interp(completions, self.completions, self.accuracy[kind], right=float("nan")))


def chance(first, second):
    """Returns the p of an exact permutation test.

    This is how often a random split of the values gives means at least as far apart.
    """
    values, difference = first + second, abs(statistics.mean(first) - statistics.mean(second))
    splits = list(itertools.combinations(range(len(values)), len(first)))
    apart = 0
    for chosen in splits:
        inside = [values[i] for i in chosen]
        outside = [value for i, value in enumerate(values) if i not in chosen]
        apart += abs(statistics.mean(inside) - statistics.mean(outside)) >= difference - 1e-12
    return apart / len(splits)


def print_tables(curves, budgets, least, seconds):
    for kind, how in KINDS.items():
        print(f"\nHeld-out accuracy, {how}, after N sampled completions\n")
        print("| script | " + " | ".join(f"N = {n}" for n in budgets) + " |\n|---|" + "---|" * len(budgets))
        for script, runs in curves.items():
            values = [[curve.after(kind, n) for curve in runs] for n in budgets]
            cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in values]
            print(f"| {script} | " + " | ".join(cells) + " |")
    columns = [(kind, n) for kind in KINDS for n in budgets]
    pairs = list(itertools.combinations(curves, 2))
    print("\nDifferences of the means, and p of an exact permutation test; bold where the ranges do not overlap\n")
    print("| pair | " + " | ".join(f"{KINDS[kind]}, {n}" for kind, n in columns) + " |\n|---|" + "---|" * len(columns))
    for first, second in pairs:
        cells = []
        for kind, n in columns:
            a, b = ([curve.after(kind, n) for curve in curves[script]] for script in (first, second))
            mark = "**" if max(a) < min(b) or max(b) < min(a) else ""
            cells.append(f"{mark}{statistics.mean(a) - statistics.mean(b):+.3f} ({chance(a, b):.3f}){mark}")
        print(f"| {first} − {second} | " + " | ".join(cells) + " |")
    print(f"\n{len(pairs) * len(columns)} comparisons: that many times p is how often chance alone would do as much")
    print("\nWhole runs\n")
    ends = f"sampled at the end | greedy at the end | seeds at {least:.2f}, both"
    head = f"| script | completions | {ends} |" + seconds * " seconds of the steps |"
    print(f"{head}\n" + "|---" * (head.count("|") - 1) + "|")
    for script, runs in curves.items():
        ends = {kind: [curve.accuracy[kind][-1] for curve in runs] for kind in KINDS}
        reached = sum(min(pair) >= least for pair in zip(*ends.values(), strict=True))
        completions = sorted({int(curve.completions[-1]) for curve in runs})
        span = " to ".join(str(n) for n in sorted({completions[0], completions[-1]}))
        cells = [f"{min(values):.3f} to {max(values):.3f}" for values in ends.values()]
        cells += [f"{reached} of {len(runs)}"]
        cells += [f"{statistics.median(curve.seconds[-1] for curve in runs):.0f}"] * seconds
        print(f"| {script} | {span} | " + " | ".join(cells) + " |")


def draw(curves, least, path, seconds):
    against = {"completions": "completions sampled"} | ({"seconds": "seconds of training steps"} if seconds else {})
    figure = Figure(figsize=(12, 4.5 * len(against)), layout="constrained")
    panels = figure.subplots(len(against), 2, squeeze=False)
    for column, kind in enumerate(KINDS):
        for row, (name, label) in enumerate(against.items()):
            axis = panels[row][column]
            for script, runs in curves.items():
                grid = np.linspace(0, min(getattr(curve, name)[-1] for curve in runs), 200)
                values = np.array([np.interp(grid, getattr(curve, name), curve.accuracy[kind]) for curve in runs])
                axis.plot(grid, values.mean(0), color=COLOURS.get(script), label=f"{script}, mean of {len(runs)} seeds")
                axis.fill_between(
                    grid, values.min(0), values.max(0), color=COLOURS.get(script), alpha=0.15, linewidth=0
                )
            axis.axhline(least, color="0.5", linestyle=":", linewidth=1)
            axis.set(xlabel=label, ylabel="held-out accuracy", title=f"Accuracy, {KINDS[kind]}, against {name}")
            axis.set_ylim(0, 1.02)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of the scripts, in one string")
    parser.add_argument("--budgets", type=int, nargs="+", default=(2560, 5120, 10240), help="completions")
    parser.add_argument("--least", type=float, default=0.90, help="accuracy to count the seeds that end above it")
    parser.add_argument("--no-seconds", action="store_true", help="no seconds of the runs")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "comparison.png")
    parser.add_argument("--runs", type=Path, help="folder of the runs, for these flags alone")
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) < 2:
        parser.error("--seeds: give at least two, because a spread needs them")
    curves = {script: [] for script in arguments.scripts}
    with tempfile.TemporaryDirectory() as temporary:
        runs, flags = arguments.runs or temporary, ["--eval-every", EVERY, *arguments.flags]
        for seed in arguments.seeds:
            for script in arguments.scripts:  # in turn, so that a busy moment hits all of them
                curve = Curve(kept_run(script, seed, flags, runs)[0])
                curves[script].append(curve)
                ends = ", ".join(f"{curve.accuracy[kind][-1]:.3f} {how}" for kind, how in KINDS.items())
                seconds = f"{curve.seconds[-1]:.0f} s"
                print(f"{script}, seed {seed}: {curve.completions[-1]} completions, {ends}, {seconds}", flush=True)
    print_tables(curves, arguments.budgets, arguments.least, not arguments.no_seconds)
    draw(curves, arguments.least, arguments.picture, not arguments.no_seconds)
    print(f"\n{arguments.picture}")


if __name__ == "__main__":
    main()
