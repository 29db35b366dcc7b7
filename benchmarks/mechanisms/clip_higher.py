"""What a wider upper clip does to entropy and to rare tokens, with many updates on the same completions.

    python benchmarks/mechanisms/clip_higher.py              three seeds
    python benchmarks/mechanisms/clip_higher.py --seeds 1 --steps 3

dapo.py trains on the embedded task with 16 updates per step, as in its paper, and CLIP_HIGH at 0.2, 0.28 and 0.5. There
is no dynamic sampling, so that each clip gets as many samples. After
each step's updates, the rare tokens of its better completions are read: those whose probability under π_old was below
0.2. It prints the entropy of the policy at the start and the end, the share of these tokens whose ratio is above the
clip, so that they have no gradient any more, and the held-out accuracy at the end. It draws
docs/mechanisms/clip_higher.png.
"""

import torch
from common import dapo, draw_seeds, figure_of, parse, save, spread, trainer_of

CLIPS, RARE = (0.2, 0.28, 0.5), 0.2


def run(seed, steps, clip):
    """Returns the entropy and the share of clipped rare tokens in each step, (steps, 2), and held-out accuracy."""
    settings = {"SEED": seed, "MAX_STEPS": steps, "MINI_BATCHES": 16, "CLIP_HIGH": clip, "DYNAMIC_SAMPLING": False}
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
    for step in range(1, steps + 1):
        trainer.train_step(step)
    return torch.tensor(rows), trainer.evaluate()["eval_accuracy"]


def main():
    arguments = parse(__doc__, seeds=3, steps=20)
    runs = {clip: [run(seed, arguments.steps, clip) for seed in range(arguments.seeds)] for clip in CLIPS}
    print("| CLIP_HIGH | entropy at first | at the end | rare tokens that are clipped | held-out accuracy |")
    print("|---|---|---|---|---|")
    figure, axes = figure_of(2)
    few = max(1, arguments.steps // 5)
    for clip, some in runs.items():
        columns = [[rows[0, 0].item() for rows, _ in some], [rows[-few:, 0].mean().item() for rows, _ in some]]
        columns += [[rows[:, 1].nanmean().item() for rows, _ in some], [accuracy for _, accuracy in some]]
        print(f"| {clip} | " + " | ".join(map(spread, columns)) + " |")
        values = torch.stack([rows for rows, _ in some])
        for column, axis in enumerate(axes):
            draw_seeds(axis, values[:, :, column], f"CLIP_HIGH = {clip}")
    axes[0].set(title="Entropy", xlabel="training step", ylabel="nats per token")
    axes[1].set(title="Rare tokens of better completions", xlabel="training step", ylabel="share above the clip")
    axes[0].legend()
    save(figure, arguments.pictures, "clip_higher")


if __name__ == "__main__":
    main()
