"""What share of tokens the clip leaves without a gradient: GSPO's and GRPO's on the same completions.

    python benchmarks/mechanisms/clip_share.py               three seeds
    python benchmarks/mechanisms/clip_share.py --seeds 1 --prompts 64

gspo.py takes some steps on the embedded task. After the updates of the last one, its completions are given to gspo.py's
compute_policy_loss with RATIO_LEVEL "sequence" (GSPO) and "token" (GRPO), for clips from an eighth to eight times the
standard deviation of the log ratio at that level. A token has no gradient if its gradient in log π is zero, among the
tokens of completions with an advantage. It prints the share, and the widths of the clips that the scripts ship with in
the same unit. It draws docs/mechanisms/clip_share.png.
"""

import statistics

import torch
from common import after_updates, figure_of, grpo, gspo, parse, save, spread

WIDTHS = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # ε over the standard deviation of the log ratio
LEVELS = {"sequence": "GSPO", "token": "GRPO"}


def share_without_gradient(rollouts, logps, level, low, high):
    """Returns the share of tokens whose gradient is zero, of completions with an advantage."""
    gspo.RATIO_LEVEL, gspo.CLIP_LOW, gspo.CLIP_HIGH = level, min(low, 0.999), high
    logps = logps.clone().requires_grad_()
    mask = rollouts.completion_mask
    loss, _ = gspo.compute_policy_loss(logps, rollouts.old_logps, rollouts.advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logps)
    counted = mask & (rollouts.advantages != 0)[:, None]
    return (gradient[counted] == 0).double().mean().item()


def deviations(rollouts, logps):
    """Returns the standard deviation of the log ratio at each level, {level: nats}."""
    mask, log_ratio = rollouts.completion_mask, (logps - rollouts.old_logps).double()
    sequences = gspo.compute_sequence_ratio(logps, rollouts.old_logps, mask).double().log()
    return {"sequence": sequences.std().item(), "token": log_ratio[mask].std().item()}


def main():
    shipped = {"sequence": (gspo.CLIP_LOW, gspo.CLIP_HIGH), "token": (grpo.CLIP_LOW, grpo.CLIP_HIGH)}
    arguments = parse(__doc__, seeds=3, prompts=256, steps=5)
    shares, at_shipped = {level: [] for level in LEVELS}, {level: [] for level in LEVELS}
    for seed in range(arguments.seeds):
        rollouts, logps = after_updates(seed, arguments.prompts, arguments.steps)
        for level, deviation in deviations(rollouts, logps).items():
            clips = [width * deviation for width in WIDTHS]
            shares[level].append([share_without_gradient(rollouts, logps, level, clip, clip) for clip in clips])
            share = share_without_gradient(rollouts, logps, level, *shipped[level])
            at_shipped[level].append((statistics.mean(shipped[level]) / deviation, share))
    print("| ε over std | " + " | ".join(str(width) for width in WIDTHS) + " | as shipped | its ε over std |")
    print("|---|" + "---|" * (len(WIDTHS) + 2))
    figure, (axis,) = figure_of(1)
    for level, name in LEVELS.items():
        columns = list(zip(*shares[level], strict=True))
        widths, found = zip(*at_shipped[level], strict=True)
        print(f"| {name} | " + " | ".join(map(spread, columns)) + f" | {spread(found)} | {spread(widths, 2)} |")
        (line,) = axis.semilogx(WIDTHS, [statistics.mean(column) for column in columns], "o-", label=name)
        axis.fill_between(WIDTHS, *(list(map(one, columns)) for one in (min, max)), color=line.get_color(), alpha=0.15)
        axis.plot(statistics.mean(widths), statistics.mean(found), "*", ms=15, color=line.get_color())
    axis.set(xlabel="clip over the log ratio's standard deviation", ylabel="share of tokens without a gradient")
    axis.set(xticks=WIDTHS, xticklabels=WIDTHS)
    axis.minorticks_off()
    axis.set_title("Stars: the clips as shipped")
    axis.legend()
    save(figure, arguments.pictures, "clip_share")


if __name__ == "__main__":
    main()
