"""How the adaptive weight of the KL answers, and what it does if the KL is a sum over tokens.

    python benchmarks/mechanisms/adaptive_kl.py              three seeds
    python benchmarks/mechanisms/adaptive_kl.py --seeds 1 --steps 10

gspo.py trains on the embedded task with its KL term, rewarded by the rule. TARGET_KL is a tenth of the shipped one for
the first third of the steps, ten times that in the second, and a tenth again in the last. The other runs are told the
KL of a whole completion, the KL per token times its length, as some implementations log it. Their controller sees a KL
that is too large by the number of tokens, and so holds the policy far below the target.

It prints the KL per token over the target, and the weight, at the end of each third. It draws
docs/mechanisms/adaptive_kl.png.
"""

import torch
from common import draw_seeds, figure_of, gspo, parse, save, spread, trainer_of

TARGETS = (0.06, 0.6, 0.06)  # nats per token


def run(seed, steps, per_sequence):
    """Returns the KL per token and its weight after each step, and the target, (steps, 3)."""
    settings = {"SEED": seed, "MAX_STEPS": steps, "REWARDS": "exact_match", "KL_COEF": 0.04, "ADAPTIVE_KL": True}
    trainer, rows = trainer_of(gspo, **settings), []
    adapt = trainer.update_kl_coef
    if per_sequence:
        trainer.update_kl_coef = lambda kl: adapt(None if kl is None else kl * length[0])
    length = [1.0]
    sample = trainer.generate_responses_with_group_sampling

    def sampled(step):
        rollouts = sample(step)
        length[0] = rollouts.completion_lengths.double().mean().item()
        return rollouts

    trainer.generate_responses_with_group_sampling = sampled
    for step in range(1, steps + 1):
        gspo.TARGET_KL = TARGETS[(step - 1) * len(TARGETS) // steps]
        metrics = trainer.train_step(step)
        rows.append((metrics["kl_divergence"], trainer.kl_coef, gspo.TARGET_KL))
    return torch.tensor(rows)


def main():
    arguments = parse(__doc__, seeds=3, steps=60)
    kinds = {"KL per token": False, "KL per completion": True}
    runs = {name: [run(seed, arguments.steps, kind) for seed in range(arguments.seeds)] for name, kind in kinds.items()}
    thirds = len(TARGETS)
    print(
        "| told | "
        + " | ".join(f"target {t}: KL over it | weight" for t in TARGETS)
        + " |\n|---|"
        + "---|---|" * thirds
    )
    figure, (left, right) = figure_of(2)
    for name, some in runs.items():
        cells = []
        for third in range(thirds):
            end = (third + 1) * arguments.steps // thirds
            last = [one[max(0, end - 3) : end].mean(0) for one in some]
            cells += [spread([(row[0] / row[2]).item() for row in last], 2), spread([row[1].item() for row in last])]
        print(f"| {name} | " + " | ".join(cells) + " |")
        values = torch.stack(some)  # (seeds, steps, 3)
        for axis, column in ((left, 0), (right, 1)):
            draw_seeds(axis, values[:, :, column], f"told the {name}")
            axis.set_yscale("log")
    left.semilogy(values[0, :, 2], "k:", label="target")
    left.set(title="KL to the reference", xlabel="training step", ylabel="nats per token")
    right.set(title="Its weight", xlabel="training step", ylabel="kl_coef")
    left.legend()
    save(figure, arguments.pictures, "adaptive_kl")


if __name__ == "__main__":
    main()
