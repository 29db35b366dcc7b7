"""How large the gradient of stale samples is, with and without the dual clip.

    python benchmarks/mechanisms/dual_clip.py                three seeds
    python benchmarks/mechanisms/dual_clip.py --seeds 1 --prompts 8

A token of negative advantage whose ratio has grown to r, because the sample is old, has the loss r |A|: PPO's clip does
not bound it. Dual clip (Ye et al. 2020, arXiv 1912.09729) bounds it by c |A|, so that beyond c it has no gradient.
Completions of the embedded task are sampled, and scored by the rule. Then π_old is lowered at one token in ten of the
completions that were worse than their group, so that its ratio is r. The loss is compute_policy_loss of ppo.py with
whitened advantages, and its gradient goes through the whole policy. It prints the norm of the gradient over that of the
same batch at r = 1, for DUAL_CLIP 0 (off) and 3. It draws docs/mechanisms/dual_clip.png.
"""

import statistics

import torch
from common import figure_of, gspo, parse, ppo, save, scored_rollouts, spread, trainer_of

RATIOS, BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0), (0.0, 3.0)


def norm_of_gradient(trainer, rollouts, stale, ratio, bound):
    """Returns the norm of the gradient of the loss over the policy's weights."""
    ppo.DUAL_CLIP = bound
    trainer.policy.zero_grad()
    logps, _ = gspo.completion_logps(trainer.policy, rollouts)
    old_logps = logps.detach() - stale * torch.tensor(ratio).log()
    loss, _ = ppo.compute_policy_loss(logps, old_logps, rollouts.advantages, rollouts.completion_mask)
    loss.backward()
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in trainer.trained]).item()


def main():
    arguments = parse(__doc__, seeds=3, prompts=16)
    found = {bound: [] for bound in BOUNDS}
    for seed in range(arguments.seeds):
        settings = {"SEED": seed, "BATCH_SIZE": arguments.prompts, "REWARDS": "exact_match", "KL_COEF": 0.0}
        trainer = trainer_of(gspo, **settings)
        rollouts = scored_rollouts(trainer, 1)
        mask = rollouts.completion_mask
        per_token = rollouts.advantages[:, None].expand(mask.shape).masked_fill(~mask, 0.0)
        rollouts.advantages = ppo.whiten(per_token, mask)
        chosen = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
        stale = mask & chosen & (rollouts.advantages < 0)
        for bound in BOUNDS:
            norms = [norm_of_gradient(trainer, rollouts, stale, ratio, bound) for ratio in RATIOS]
            found[bound].append([norm / norms[0] for norm in norms])
    print("| r of stale tokens | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |\n|---|" + "---|" * len(RATIOS))
    figure, (axis,) = figure_of(1)
    for bound, runs in found.items():
        name = f"c = {bound:g}" if bound else "off"
        columns = list(zip(*runs, strict=True))
        print(f"| {name} | " + " | ".join(spread(column, 2) for column in columns) + " |")
        (line,) = axis.loglog(RATIOS, [statistics.mean(column) for column in columns], "o-", label=f"dual clip: {name}")
        axis.fill_between(RATIOS, *(list(map(one, columns)) for one in (min, max)), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="ratio of a tenth of the tokens with A < 0", ylabel="norm of the gradient, over that at r = 1")
    axis.legend()
    save(figure, arguments.pictures, "dual_clip")


if __name__ == "__main__":
    main()
