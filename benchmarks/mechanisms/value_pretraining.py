"""What VAPO's value pre-training does for the critic, and what λ_critic does to the bias of its values.

    python benchmarks/mechanisms/value_pretraining.py        three seeds
    python benchmarks/mechanisms/value_pretraining.py --seeds 1 --steps 3

vapo.py trains on the embedded task without and with pre-training of the critic (VALUE_PRETRAIN_STEPS), and then with
LAMBDA_CRITIC 1 and 0.95. The critic begins at the policy's weights with a head of 0. It prints the explained variance
of the outcomes in the first steps in which the policy learns: 1 − Var(outcome − value) / Var(outcome) over all tokens.
An outcome is the sum of a token's rewards from there on, whatever λ_critic is. It also prints the bias of the values,
the mean of value − outcome, in the first and last fifth of a completion's tokens over the last half of the steps. It
draws docs/mechanisms/value_pretraining.png.
"""

import torch
from common import draw_seeds, figure_of, parse, save, spread, trainer_of, vapo

WAYS = {
    "no pre-training": {"VALUE_PRETRAIN_STEPS": 0},
    "pre-training, λ_critic = 1": {"LAMBDA_CRITIC": 1.0},
    "pre-training, λ_critic = 0.95": {"LAMBDA_CRITIC": 0.95},
}
FIFTHS = 5


def run(seed, steps, pretraining, way):
    """Returns the explained variance in each step in which the policy learns, and the bias by fifths of the tokens."""
    way = {"VALUE_PRETRAIN_STEPS": pretraining, "LAMBDA_CRITIC": 1.0} | way
    total = steps + way["VALUE_PRETRAIN_STEPS"]
    trainer, variances, biases = trainer_of(vapo, SEED=seed, MAX_STEPS=total, **way), [], []
    update_policy = trainer.update_policy

    def update(rollouts, step):
        mask, lengths = rollouts.completion_mask, rollouts.completion_lengths[:, None]
        fifth = (torch.arange(mask.shape[1]) * FIFTHS // lengths).clamp(max=FIFTHS - 1)
        error = rollouts.values - rollouts.outcomes
        if step > way["VALUE_PRETRAIN_STEPS"]:
            variances.append(1 - (error[mask].var() / rollouts.outcomes[mask].var()).item())
        if step > total - max(1, steps // 2):
            biases.append([error[mask & (fifth == i)].mean().item() for i in range(FIFTHS)])
        return update_policy(rollouts, step)

    trainer.update_policy = update
    for step in range(1, total + 1):
        trainer.train_step(step)
    return torch.tensor(variances), torch.tensor(biases).nanmean(0)


def main():
    arguments = parse(__doc__, seeds=3, steps=20, pretraining=10)
    print("| way | explained variance, first steps | last steps | bias, first fifth of tokens | last fifth |")
    print("|---|---|---|---|---|")
    figure, (left, right) = figure_of(2)
    few = max(1, arguments.steps // 5)
    for name, way in WAYS.items():
        runs = [run(seed, arguments.steps, arguments.pretraining, way) for seed in range(arguments.seeds)]
        variances, biases = (torch.stack(column) for column in zip(*runs, strict=True))
        columns = [variances[:, :few].nanmean(1), variances[:, -few:].nanmean(1), biases[:, 0], biases[:, -1]]
        print(f"| {name} | " + " | ".join(spread(column.tolist()) for column in columns) + " |")
        draw_seeds(left, variances, name)
        fifths = range(1, FIFTHS + 1)
        (line,) = right.plot(fifths, biases.mean(0), "o-", label=name)
        right.fill_between(fifths, biases.amin(0), biases.amax(0), color=line.get_color(), alpha=0.15)
    left.set(title="Explained variance of the outcomes", xlabel="training steps of the policy", ylim=(-0.3, 0.5))
    right.set_xticks(fifths)
    right.set(title="Bias of the values", xlabel="fifth of a completion's tokens", ylabel="mean of value − outcome")
    left.legend()
    save(figure, arguments.pictures, "value_pretraining")


if __name__ == "__main__":
    main()
