"""What becomes of completions near the token limit: the soft overlong penalty, the filter, both or neither.

    python benchmarks/mechanisms/overlong.py                 three seeds
    python benchmarks/mechanisms/overlong.py --seeds 1 --steps 4

dapo.py trains on the embedded task with a limit of 24 tokens. Solutions have about 20, so some end near it, and
rambling completions are cut. There is no dynamic sampling, so that each way gets as many samples.
OVERLONG_CACHE is the length over which the penalty grows from 0 to 1 below the limit, 0 for none. OVERLONG_FILTER
leaves completions without an end out of the loss. It prints the share of truncated completions and of those in the last
quarter below the limit, at the start and at the end, and the held-out accuracy at the end. It draws
docs/mechanisms/overlong.png.
"""

import torch
from common import dapo, draw_seeds, figure_of, parse, save, spread, trainer_of

LIMIT = 24
WAYS = {"neither": (0, False), "soft penalty": (6, False), "filter": (0, True), "both": (6, True)}


def run(seed, steps, cache, filtered):
    """Returns the share of truncated completions and of those near the limit in each step, and held-out accuracy."""
    settings = {"SEED": seed, "MAX_STEPS": steps, "MAX_COMPLETION_TOKENS": LIMIT, "OVERLONG_CACHE": cache}
    trainer, rows = trainer_of(dapo, **settings, OVERLONG_FILTER=filtered, DYNAMIC_SAMPLING=False), []
    for step in range(1, steps + 1):
        trainer.train_step(step)
        lengths = torch.cat([part.completion_lengths for part in trainer.drawn])
        cut = torch.cat([part.truncated for part in trainer.drawn])
        near = ~cut & (lengths > 0.75 * LIMIT)
        rows.append((cut.double().mean().item(), near.double().mean().item()))
    return torch.tensor(rows), trainer.evaluate()["eval_accuracy"]


def main():
    arguments = parse(__doc__, seeds=3, steps=30)
    runs = {name: [run(seed, arguments.steps, *way) for seed in range(arguments.seeds)] for name, way in WAYS.items()}
    print("| way | truncated at first | at the end | near the limit at first | at the end | held-out accuracy |")
    print("|---|---|---|---|---|---|")
    figure, axes = figure_of(2)
    few = max(1, arguments.steps // 10)
    for name, some in runs.items():
        cells = []
        for column in range(2):
            cells += [spread([rows[:few, column].mean().item() for rows, _ in some])]
            cells += [spread([rows[-few:, column].mean().item() for rows, _ in some])]
        print(f"| {name} | " + " | ".join(cells) + f" | {spread([accuracy for _, accuracy in some])} |")
        values = torch.stack([rows for rows, _ in some])
        for column, axis in enumerate(axes):
            draw_seeds(axis, values[:, :, column], name)
    axes[0].set(title="Cut by the limit", xlabel="training step", ylabel="share of sampled completions")
    axes[1].set(title="Ended in the last quarter below it", xlabel="training step", ylabel="share")
    axes[0].legend()
    save(figure, arguments.pictures, "overlong")


if __name__ == "__main__":
    main()
