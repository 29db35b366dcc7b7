"""How long right and wrong completions become under each way of averaging the loss over tokens.

    python benchmarks/mechanisms/length_bias.py              three seeds
    python benchmarks/mechanisms/length_bias.py --seeds 1 --steps 4

grpo.py trains on the embedded task, rewarded by the rule, without a KL, with each LOSS_AGGREGATION and with 4 and 16
prompts in a step, whole groups in a mini-batch. group_mean is a mean over the tokens of each group, and over the groups
(DAPO's eq. 8 as it is printed): token_mean, with each advantage times the mean tokens of a group over those of its own.
A mean over each completion's tokens gives the tokens of a long wrong completion less weight than those of a short one,
so that wrong completions may grow (Dr. GRPO, arXiv 2503.20783). It prints the mean length of right and of wrong
completions in the first and the last fifth of the steps. It draws docs/mechanisms/length_bias.png: the last fifth.
"""

import torch
from common import figure_of, grpo, parse, save, spread, trainer_of

WAYS, BATCHES = ("sequence_mean", "token_mean", "group_mean", "constant"), (4, 16)


def run(seed, steps, way, prompts):
    """Returns the mean length of right and of wrong completions in each step, (steps, 2)."""
    settings = {"SEED": seed, "MAX_STEPS": steps, "REWARDS": "exact_match", "KL_COEF": 0.0, "BATCH_SIZE": prompts}
    aggregation = "token_mean" if way == "group_mean" else way
    trainer, rows = trainer_of(grpo, **settings, WHOLE_GROUPS=True, LOSS_AGGREGATION=aggregation), []
    update_policy, update_batch = trainer.update_policy, trainer.update

    def by_group(batch, on_policy):
        tokens = batch.completion_lengths.view(-1, grpo.GROUP_SIZE).sum(1).double()
        factors = (tokens.mean() / tokens).repeat_interleave(grpo.GROUP_SIZE)
        batch.advantages = batch.advantages * factors.to(batch.advantages)
        return update_batch(batch, on_policy)

    if way == "group_mean":
        trainer.update = by_group

    def update(rollouts, step):
        right, lengths = rollouts.rewards > 0, rollouts.completion_lengths.double()
        rows.append((lengths[right].mean().item(), lengths[~right].mean().item()))
        return update_policy(rollouts, step)

    trainer.update_policy = update
    for step in range(1, steps + 1):
        trainer.train_step(step)
    return torch.tensor(rows)


def draw(axis, prompts, ends):
    """Draws the lengths at the end. ends: {way: ((mean, deviation) of right completions, the same of wrong ones)}."""
    for column, (kind, marker) in enumerate((("right", "o"), ("wrong", "x"))):
        means, deviations = zip(*(columns[column] for columns in ends.values()), strict=True)
        places = [number + 0.1 * column for number in range(len(ends))]
        axis.errorbar(places, means, deviations, fmt=marker, capsize=4, label=f"{kind} completions")
    axis.set_xticks(range(len(ends)), ends)
    axis.set(title=f"{prompts} prompts in a step", ylabel="mean tokens in the last fifth of the steps")


def main():
    arguments = parse(__doc__, seeds=3, steps=40)
    last = max(1, arguments.steps // 5)
    print("| average | prompts in a step | right at first | right at the end | wrong at first | wrong at the end |")
    print("|---|---|---|---|---|---|")
    figure, axes = figure_of(len(BATCHES))
    for axis, prompts in zip(axes, BATCHES, strict=True):
        ends = {}
        for way in WAYS:
            runs = torch.stack([run(seed, arguments.steps, way, prompts) for seed in range(arguments.seeds)])
            at_first, at_the_end = runs[:, :last].nanmean(1), runs[:, -last:].nanmean(1)  # (seeds, 2)
            columns = [part[:, column].tolist() for column in range(2) for part in (at_first, at_the_end)]
            print(f"| {way}, {prompts} | {prompts} | " + " | ".join(spread(values, 1) for values in columns) + " |")
            deviations = at_the_end.std(0) if arguments.seeds > 1 else torch.zeros(2)
            ends[way] = list(zip(at_the_end.mean(0).tolist(), deviations.tolist(), strict=True))
        draw(axis, prompts, ends)
    axes[0].legend()
    save(figure, arguments.pictures, "length_bias")


if __name__ == "__main__":
    main()
