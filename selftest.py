"""`python gspo.py --selftest`: does this model, with this data and these rewards, do what the algorithm assumes?

Samples a few groups, takes one optimizer step, prints a table of what was found, and exits with 1 if a line fails.
"""

import sys

import torch

TOLERANCES = 1e-3, 0.1  # nats, in float32 and in bfloat16, for log-probs that two ways of computing should agree on


def selftest(trainer, script):
    """Prints the table; raises SystemExit(1) if a line fails. trainer: new. script: the globals() of its script."""
    tolerance = TOLERANCES[trainer.policy_device.type == "cuda" or script["POLICY_DTYPE"] == "bfloat16"]
    size = min(4, script["BATCH_SIZE"], len(trainer.train_rows))
    rows = trainer.train_rows[:size]
    rollouts = trainer.sample(rows, script["GROUP_SIZE"], ("selftest",))
    every = torch.arange(len(rollouts.texts))
    mask = rollouts.completion_mask
    old_logps = trainer.compute_log_probs(trainer.policy, rollouts).cpu()
    with torch.no_grad():
        alone = [script["completion_logps"](trainer.policy, rollouts, row[None])[0][0].cpu() for row in every]

    lines = [("first prompt, as the model sees it", repr(rows[0]["prompt_text"]), bool(rows[0]["prompt_ids"]))]
    lines.append(("first completion", repr(rollouts.texts[0]), True))
    gap = (rollouts.sampled_logps - old_logps)[mask].abs()
    lines.append(
        ("log-probs, sampler against trainer", f"mean {gap.mean():.1e}, most {gap.max():.1e}", gap.mean() < tolerance)
    )
    gap = (torch.stack(alone) - old_logps)[mask].abs()
    lines.append(("log-probs, batched against alone", f"most {gap.max():.1e}", gap.max() < 10 * tolerance))

    ended = ~rollouts.truncated
    last = [int(ids[n - 1]) for ids, n in zip(rollouts.input_ids, rollouts.lengths, strict=True)]
    eos_kept = all(last[i] in trainer.eos_ids and mask[i].sum() == rollouts.completion_lengths[i] for i in every[ended])
    text = f"{int(ended.sum())} of {len(ended)} ended; ends: {trainer.tokenizer.convert_ids_to_tokens(trainer.eos_ids)}"
    lines.append(("end of sequence is in the mask", text, eos_kept))
    lines.append(
        ("completions that end", f"{ended.double().mean():.0%} within MAX_COMPLETION_TOKENS", bool(ended.any()))
    )

    rewards = trainer.compute_rewards(rollouts)
    report = trainer.rewards.report()
    text = f"first {rewards[0]:.3g}, mean {rewards.mean():.3g}; " + ", ".join(f"{k} {v:.3g}" for k, v in report.items())
    lines.append(("rewards", text, report["reward_failures"] == 0))

    lines += update_lines(trainer, script, rollouts, old_logps.to(trainer.policy_device), tolerance)
    width = max(len(name) for name, _, _ in lines)
    for name, text, passed in lines:
        print(f"{'ok  ' if passed else 'FAIL'}  {name:{width}}  {text}")
    if not all(passed for _, _, passed in lines):
        sys.exit(1)


def update_lines(trainer, script, rollouts, old_logps, tolerance):
    """The lines about one optimizer step: the ratio before it, the gradient, and the weights that it moves."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = script["LEARNING_RATE"]
    advantages = torch.ones(len(rollouts.texts), device=trainer.policy_device)
    advantages[::2] = -1.0  # whatever the rewards are, there is something to learn
    before = [parameter.detach().clone() for parameter in trainer.trained]
    ref_logps = None if script["KL_COEF"] == 0 else old_logps
    stats = trainer.update(rollouts, torch.arange(len(rollouts.texts)), old_logps, ref_logps, advantages)
    low, high = stats["ratio_min"].item(), stats["ratio_max"].item()
    lines = [("ratio before the first update", f"{low:.6f} to {high:.6f}", abs(low - 1) < tolerance > abs(high - 1))]
    norm = stats["grad_norm"].item()
    lines.append(("norm of the gradient", f"{norm:.3g}", 0 < norm < float("inf")))
    asked = moved = still = 0
    for parameter, old in zip(trainer.trained, before, strict=True):
        with_gradient = (
            parameter.grad != 0 if parameter.grad is not None else torch.zeros_like(parameter, dtype=torch.bool)
        )
        changed = (parameter.detach() != old) & with_gradient
        asked, moved = asked + int(with_gradient.sum()), moved + int(changed.sum())
        still += not changed.any()
    share = moved / max(1, asked)
    text = f"{share:.0%} of those with a gradient; {still} of {len(before)} tensors did not move"
    return [*lines, ("weights that the step moved", text, share > 0.5 and still == 0)]
