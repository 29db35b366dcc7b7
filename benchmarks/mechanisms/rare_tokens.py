"""Which tokens still have a gradient after some updates: CISPO's weight against the clips of PPO and DAPO.

    python benchmarks/mechanisms/rare_tokens.py              three seeds
    python benchmarks/mechanisms/rare_tokens.py --seeds 1 --prompts 32

gspo.py takes some steps on the embedded task. After the updates of the last one, its completions and ratios go to
compute_policy_loss of grpo.py (PPO's clip, 0.2 on both sides), dapo.py (0.2 and 0.28) and cispo.py, with the clips that
they ship with. A token counts if its completion has an advantage. Rare tokens are those whose probability under π_old
was below 0.2. It prints the share of tokens that have a gradient in log π, the same of rare tokens whose completion
was better than its group, and the share of these tokens in the sum of all |gradients|. It draws
docs/mechanisms/rare_tokens.png: the share with a gradient against the token's ratio.
"""

import math

import torch
from common import after_updates, cispo, dapo, figure_of, grpo, parse, save, spread

NAMES = {grpo: "grpo.py, PPO's clip", dapo: "dapo.py, clip-higher", cispo: "cispo.py, stopped weights"}
RARE = 0.2
EDGES = torch.tensor([0.0, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, math.inf])


def gradient_of(script, rollouts, logps):
    """Returns |d loss / d log π| of all tokens, (B, T)."""
    logps = logps.clone().requires_grad_()
    loss, _ = script.compute_policy_loss(logps, rollouts.old_logps, rollouts.advantages, rollouts.completion_mask)
    return torch.autograd.grad(loss, logps)[0].abs()


def main():
    arguments = parse(__doc__, seeds=3, prompts=128, steps=5)
    found, curves = {script: [[], [], []] for script in NAMES}, {script: [] for script in NAMES}
    for seed in range(arguments.seeds):
        rollouts, logps = after_updates(seed, arguments.prompts, arguments.steps)
        counted = rollouts.completion_mask & (rollouts.advantages != 0)[:, None]
        rare = counted & (rollouts.old_logps.exp() < RARE) & (rollouts.advantages > 0)[:, None]
        bins = torch.bucketize((logps - rollouts.old_logps).exp()[counted], EDGES) - 1
        for script in NAMES:
            gradient = gradient_of(script, rollouts, logps)
            found[script][0].append((gradient[counted] > 0).double().mean().item())
            found[script][1].append((gradient[rare] > 0).double().mean().item())
            found[script][2].append((gradient[rare].sum() / gradient[counted].sum()).item())
            alive = (gradient[counted] > 0).double()
            curves[script].append([alive[bins == i].mean().item() for i in range(len(EDGES) - 1)])
    print(
        "| loss | tokens with a gradient | rare tokens of better completions with one | their share of all gradients |"
    )
    print("|---|---|---|---|")
    for script, columns in found.items():
        print(f"| {NAMES[script]} | " + " | ".join(map(spread, columns)) + " |")
    figure, (axis,) = figure_of(1)
    labels = [f"{low:g} to {high:g}" for low, high in zip(EDGES.tolist(), EDGES[1:].tolist(), strict=False)]
    for script, name in NAMES.items():
        values = torch.tensor(curves[script])
        (line,) = axis.plot(labels, values.nanmean(0), "o-", label=name)
        ends = values.nan_to_num(torch.inf).amin(0), values.nan_to_num(-torch.inf).amax(0)
        axis.fill_between(labels, *ends, color=line.get_color(), alpha=0.15)
    axis.tick_params(axis="x", rotation=45)
    axis.set(xlabel="π / π_old of the token", ylabel="share of tokens with a gradient", ylim=(-0.03, 1.03))
    axis.legend()
    save(figure, arguments.pictures, "rare_tokens")


if __name__ == "__main__":
    main()
