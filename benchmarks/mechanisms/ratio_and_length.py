"""How the spread of importance ratios depends on the length of a completion: GSPO's reason to exist.

    python benchmarks/mechanisms/ratio_and_length.py             three seeds
    python benchmarks/mechanisms/ratio_and_length.py --seeds 1 --prompts 64

gspo.py takes some steps on the embedded task. After the updates of the last one, log π/π_old is read at the tokens of
its completions. For each length L, the first L tokens of all completions that have as many are taken, so that a longer
text is not a text of another kind. It prints the standard deviation, over completions, of three quantities: log r of
the last of these tokens (GRPO's ratio), log s, the mean over the tokens (GSPO's), and their sum (the ratio of whole
likelihoods). If tokens were independent, these would stay constant, fall as 1/√L, and grow as √L. It prints the slopes
that were found, and draws docs/mechanisms/ratio_and_length.png.
"""

import statistics

import torch
from common import after_updates, figure_of, parse, save, spread

LENGTHS = (2, 4, 8, 16, 32)
KINDS = {"log r, one token": 0.0, "log s, the mean": -0.5, "the sum": 0.5}  # and the slope if tokens were independent


def spreads(rollouts, logps):
    """Returns {kind: the standard deviation at each of LENGTHS}."""
    log_ratio = (logps - rollouts.old_logps).double()
    found = {kind: [] for kind in KINDS}
    for length in LENGTHS:
        first = log_ratio[rollouts.completion_lengths >= length, :length]
        for kind, values in zip(KINDS, (first[:, -1], first.mean(1), first.sum(1)), strict=True):
            found[kind].append(values.std().item())
    return found


def slope(values):
    x, y = torch.tensor(LENGTHS).double().log(), torch.tensor(values).double().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def main():
    arguments = parse(__doc__, seeds=3, prompts=256, steps=5)
    runs = []
    for seed in range(arguments.seeds):
        runs.append(spreads(*after_updates(seed, arguments.prompts, arguments.steps)))
    print("| standard deviation of | " + " | ".join(f"L = {n}" for n in LENGTHS) + " | slope | if independent |")
    print("|---|" + "---|" * (len(LENGTHS) + 2))
    figure, (axis,) = figure_of(1)
    for kind, independent in KINDS.items():
        columns = list(zip(*(run[kind] for run in runs), strict=True))
        slopes = [slope(run[kind]) for run in runs]
        print(f"| {kind} | " + " | ".join(spread(column) for column in columns), end="")
        print(f" | {spread(slopes, 2)} | {independent} |")
        means = [statistics.mean(column) for column in columns]
        (line,) = axis.loglog(LENGTHS, means, "o-", label=f"{kind}: slope {statistics.mean(slopes):+.2f}")
        axis.fill_between(LENGTHS, *(list(map(one, columns)) for one in (min, max)), color=line.get_color(), alpha=0.15)
        expected = [means[0] * (length / LENGTHS[0]) ** independent for length in LENGTHS]
        axis.loglog(LENGTHS, expected, ":", color=line.get_color())
    axis.set(xlabel="tokens, L", ylabel="standard deviation over completions", xticks=LENGTHS, xticklabels=LENGTHS)
    axis.minorticks_off()
    axis.set_title("Dotted: what independent tokens would give")
    axis.legend()
    save(figure, arguments.pictures, "ratio_and_length")


if __name__ == "__main__":
    main()
