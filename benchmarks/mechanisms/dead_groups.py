"""How many groups are dead, against p^G + (1 − p)^G, and what dynamic sampling costs.

    python benchmarks/mechanisms/dead_groups.py              three seeds
    python benchmarks/mechanisms/dead_groups.py --seeds 1 --prompts 16 --steps 4

dapo.py trains on the embedded task. Before each of some steps, prompts are sampled 32 times each. The first 16 of them
forecast the share of dead groups of G completions: the mean over prompts of C(right, G) / C(16, G) + C(wrong, G) /
C(16, G), which is an unbiased estimate of p^G + (1 − p)^G for each prompt's own p. The other 16 are cut into groups of
G, of which the dead ones are counted. Beside stands a forecast from the mean p alone, which is too low, because prompts
differ. Dynamic sampling draws 1 / (1 − dead) groups for each that it keeps. Beside stand the completions that dapo.py
drew in that step, over those that it trained on.

It prints a row for each step, and draws docs/mechanisms/dead_groups.png.
"""

from math import comb

import torch
from common import dapo, figure_of, parse, save, spread, trainer_of

SIZES, SAMPLES = (4, 8, 16), 32


def measure(trainer, prompts, step):
    """Returns {G: (measured, forecast, forecast from the mean p)} for the policy as it is."""
    rows = dapo.prompts_of_step(trainer.train_rows, 1000 + step, prompts, dapo.generator_of)
    rollouts = trainer.sample(rows, SAMPLES, ("mechanism", step))
    right = torch.tensor(trainer.eval_reward(rollouts.prompts, rollouts.texts)).view(prompts, 2, SAMPLES // 2)
    found, half = {}, SAMPLES // 2
    for size in SIZES:
        groups = right[:, 1].reshape(-1, size)
        counts = right[:, 0].sum(1).int().tolist()
        forecast = sum(comb(k, size) + comb(half - k, size) for k in counts) / comb(half, size) / prompts
        p = right[:, 0].mean().item()
        measured = (groups.amax(1) == groups.amin(1)).double().mean().item()
        found[size] = (measured, forecast, p**size + (1 - p) ** size)
    return found


def main():
    arguments = parse(__doc__, seeds=3, prompts=128, steps=20)
    points = sorted({round(arguments.steps * share) for share in (0, 0.15, 0.3, 0.5, 0.75, 1)})
    found, drawn = {point: [] for point in points}, {point: [] for point in points}
    for seed in range(arguments.seeds):
        trainer = trainer_of(dapo, SEED=seed, MAX_STEPS=arguments.steps + 1)
        for step in range(1, arguments.steps + 2):
            before = measure(trainer, arguments.prompts, step) if step - 1 in points else None
            metrics = trainer.train_step(step)
            if before:
                found[step - 1].append(before)
                drawn[step - 1].append(metrics["sampled_completions"] / (dapo.BATCH_SIZE * dapo.GROUP_SIZE))
    header = " | ".join(f"G = {size}: measured | forecast | from the mean p" for size in SIZES)
    print(f"| after step | {header} | 1 / (1 − dead), G = {dapo.GROUP_SIZE} | drawn over trained |")
    print("|---|" + "---|" * (3 * len(SIZES) + 2))
    for point in points:
        columns = [[one[size][kind] for one in found[point]] for size in SIZES for kind in range(3)]
        needed = [1 / max(1e-9, 1 - one[dapo.GROUP_SIZE][0]) for one in found[point]]
        print(
            f"| {point} | " + " | ".join(map(spread, columns)) + f" | {spread(needed, 2)} | {spread(drawn[point], 2)} |"
        )
    figure, axes = figure_of(len(SIZES))
    for axis, size in zip(axes, SIZES, strict=True):
        for kind, (label, style) in enumerate((("measured", "ko"), ("forecast", "-"), ("from the mean p", ":"))):
            values = torch.tensor([[one[size][kind] for one in found[point]] for point in points])
            (line,) = axis.plot(points, values.mean(1), style, label=label)
            axis.fill_between(points, values.amin(1), values.amax(1), color=line.get_color(), alpha=0.15)
        axis.set(title=f"G = {size}", xlabel="training steps of dapo.py", ylabel="share of dead groups", ylim=(0, 1))
    axes[0].legend()
    save(figure, arguments.pictures, "dead_groups")


if __name__ == "__main__":
    main()
