"""How much a prompt weighs in the update by its success rate: advantages with and without the group's std.

    python benchmarks/mechanisms/difficulty.py               exact, in seconds

A prompt that is right with chance p gives a group of G completions with k right, k ~ Binomial(G, p). Its weight is the
expectation of mean |A_i|, with gspo.py's compute_relative_advantages. The sum over k is exact, so there are no seeds.
Without the std the weight is 2 p (1 − p) (G − 1) / G, which the table has beside. With it, a prompt that is nearly
always right or nearly never weighs more, compared with one of p = 1/2: the difficulty bias of Dr. GRPO (arXiv
2503.20783).

It prints weights, and weights over that of p = 1/2, for two group sizes. It draws docs/mechanisms/difficulty.png.
"""

from math import comb

import torch
from common import figure_of, gspo, parse, save

RATES, SIZES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98), (8, 64)


def weight(rate, size, kind):
    """Returns the expectation of mean |A_i| over groups of that size."""
    gspo.ADVANTAGE_TYPE, total = kind, 0.0
    for right in range(size + 1):
        rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
        chance = comb(size, right) * rate**right * (1 - rate) ** (size - right)
        total += chance * gspo.compute_relative_advantages(rewards, size).abs().mean().item()
    return total


def main():
    arguments = parse(__doc__)
    print("| p | " + " | ".join(str(rate) for rate in RATES) + " |\n|---|" + "---|" * len(RATES))
    figure, axes = figure_of(len(SIZES))
    for axis, size in zip(axes, SIZES, strict=True):
        closed = [2 * p * (1 - p) * (size - 1) / size for p in RATES]
        print(f"| G = {size}: 2 p (1 − p) (G − 1) / G | " + " | ".join(f"{value:.3f}" for value in closed) + " |")
        for kind, name in (("relative", "without the std"), ("normalized", "over the std")):
            weights = [weight(rate, size, kind) for rate in RATES]
            print(f"| G = {size}, {name} | " + " | ".join(f"{value:.3f}" for value in weights) + " |")
            shares = [value / weights[RATES.index(0.5)] for value in weights]
            print(
                f"| G = {size}, {name}, over that of p = 1/2 | " + " | ".join(f"{value:.3f}" for value in shares) + " |"
            )
            axis.plot(RATES, shares, "o-", label=name)
        axis.set(
            title=f"Groups of {size}", xlabel="success rate of the prompt, p", ylabel="weight over that of p = 1/2"
        )
    axes[0].legend()
    save(figure, arguments.pictures, "difficulty")


if __name__ == "__main__":
    main()
