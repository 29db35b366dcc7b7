"""What a wider upper clip does to entropy and to rare tokens, with many updates on the same completions.

    python benchmarks/mechanisms/clip_higher.py              three seeds
    python benchmarks/mechanisms/clip_higher.py --seeds 1 --steps 3

dapo.py trains on the embedded task with 16 updates per step, as in its paper, and CLIP_HIGH at 0.2, 0.28 and 0.5. Each
step trains on as many completions. Dynamic sampling draws more for that, and the last column says how many. After
each step's updates, the rare tokens of its better completions are read: those whose probability under π_old was below
0.2. It prints the entropy of the policy at the start and the end, the share of these tokens whose ratio is above the
clip, so that they have no gradient any more, and the held-out accuracy at the end. It draws
docs/mechanisms/clip_higher.png.
"""

import torch
from common import dapo, draw_seeds, figure_of, parse, save, spread, trainer_of

CLIPS, RARE = (0.2, 0.28, 0.5), 0.2


def run(seed, steps, clip):
    """Returns entropy and share of clipped rare tokens in each step, (steps, 2), held-out accuracy, and draws."""
    settings = {"SEED": seed, "MAX_STEPS": steps, "MINI_BATCHES": 16, "CLIP_HIGH": clip}
    trainer, rows = trainer_of(dapo, **settings), []
    update_policy = trainer.update_policy

    def update(rollouts, step):
        updates = update_policy(rollouts, step)
        logps = trainer.compute_log_probs(trainer.policy, rollouts)
        better = rollouts.completion_mask & (rollouts.advantages > 0)[:, None]
        rare = better & (rollouts.old_logps.exp() < RARE)
        above = (logps - rollouts.old_logps).exp() > 1 + clip
        rows.append((-rollouts.old_logps[rollouts.completion_mask].mean().item(), above[rare].double().mean().item()))
        return updates

    trainer.update_policy = update
    drawn = sum(trainer.train_step(step)["sampled_completions"] for step in range(1, steps + 1))
    return torch.tensor(rows), trainer.evaluate()["eval_accuracy"], drawn


def main():
    arguments = parse(__doc__, seeds=3, steps=20)
    runs = {clip: [run(seed, arguments.steps, clip) for seed in range(arguments.seeds)] for clip in CLIPS}
    print("| CLIP_HIGH | entropy at first | at the end | rare tokens that are clipped | held-out accuracy | drawn |")
    print("|---|---|---|---|---|---|")
    figure, axes = figure_of(2)
    few = max(1, arguments.steps // 5)
    for clip, some in runs.items():
        each, accuracies, drawn = zip(*some, strict=True)
        columns = [[rows[0, 0].item() for rows in each], [rows[-few:, 0].mean().item() for rows in each]]
        columns += [[rows[:, 1].nanmean().item() for rows in each], accuracies]
        print(f"| {clip} | " + " | ".join(map(spread, columns)) + f" | {spread(drawn, 0)} |")
        values = torch.stack(each)
        for column, axis in enumerate(axes):
            draw_seeds(axis, values[:, :, column], f"CLIP_HIGH = {clip}")
    axes[0].set(title="Entropy", xlabel="training step", ylabel="nats per token")
    axes[1].set(title="Rare tokens of better completions", xlabel="training step", ylabel="share above the clip")
    axes[0].legend()
    save(figure, arguments.pictures, "clip_higher")


if __name__ == "__main__":
    main()
