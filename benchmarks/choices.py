"""What single choices cost a script on the embedded task: whole runs, one group of flags away from a baseline.

    python benchmarks/choices.py vapo.py "--alpha 0" "--positive-coef 0"
    python benchmarks/choices.py gspo.py "--preset tutorial" "--group-size 4 --batch-size 32" --seeds 0 1 2

The runs of all choices take turns, with the baseline among them. It prints, for each choice, the mean, least and
greatest held-out accuracy over the seeds at the end, sampled and greedy, and their difference to the baseline, bold if
the two ranges do not overlap. --baseline: flags of all runs. --jobs: how many runs go at once, with a thread each. So
its seconds are not those of a calm machine.
"""

import argparse
import os
import shlex
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeds import run, seconds_of

KINDS = {"eval_accuracy": "sampled", "eval_accuracy_greedy": "greedy"}


def ends_of(script, seed, flags):
    """Returns the accuracies at the end of a run, {kind: accuracy}, and the seconds of its training steps."""
    with tempfile.TemporaryDirectory() as outputs:
        rows, _ = run(script, seed, shlex.split(flags), Path(outputs))
    return {kind: rows[-1][kind] for kind in KINDS}, sum(seconds_of(row) for row in rows)


def row_of(choice, results, baseline):
    cells = []
    for kind in KINDS:
        values, before = ([ends[kind] for ends, _ in some] for some in (results, baseline))
        apart = max(values) < min(before) or max(before) < min(values)
        difference = f"{statistics.mean(values) - statistics.mean(before):+.3f}"
        cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        cells.append("" if results is baseline else f"**{difference}**" if apart else difference)
    seconds = statistics.median(seconds for _, seconds in results)
    return f"| {choice} | " + " | ".join(cells) + f" | {seconds:.0f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script")
    parser.add_argument("choices", nargs="+", help="flags of a choice, in one string")
    parser.add_argument("--baseline", default="", help="flags of all runs, in one string")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // arguments.jobs))
    choices = ["", *arguments.choices]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [
            [pool.submit(ends_of, arguments.script, seed, f"{arguments.baseline} {choice}") for choice in choices]
            for seed in arguments.seeds
        ]
        results = {choice: [one[i].result() for one in runs] for i, choice in enumerate(choices)}
    print("| choice | sampled | difference | greedy | difference | seconds of the steps |\n|---|---|---|---|---|---|")
    for choice in choices:
        name = choice or arguments.baseline
        print(row_of(f"`{name}`" if name else "as shipped", results[choice], results[""]))


if __name__ == "__main__":
    main()
