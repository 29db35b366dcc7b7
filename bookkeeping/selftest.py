"""`python gspo.py --selftest`: does this model, with this data and these rewards, do what the algorithm assumes?

Samples a few groups, takes one optimizer step, prints a table of what was found, and exits with 1 if a line fails.
"""

import sys

import torch

from configs import InputError

TOLERANCES = 1e-3, 0.1  # nats, in float32 and in bfloat16, for log-probs that two ways of computing should agree on
MOVED = 0.9  # share of the weights with a gradient that a step should change


def selftest(trainer):
    """Prints the table; raises SystemExit(1) if a line fails. trainer: new."""
    constants = trainer.constants
    tolerance = TOLERANCES[trainer.policy_device.type == "cuda" or constants.POLICY_DTYPE == "bfloat16"]
    size = min(4, constants.BATCH_SIZE, len(trainer.train_rows))
    rows = trainer.train_rows[:size]
    rollouts = trainer.sample(rows, constants.GROUP_SIZE, ("selftest",))
    every = torch.arange(len(rollouts.texts))
    mask = rollouts.completion_mask
    old_logps = trainer.compute_log_probs(trainer.policy, rollouts).cpu()
    with torch.no_grad():
        alone = [trainer.compute_log_probs(trainer.policy, rollouts.select(row[None]))[0].cpu() for row in every]

    lines = [("first prompt, as the model sees it", repr(rows[0]["prompt_text"]), None)]  # for the reader to judge
    lines.append(("first completion", repr(rollouts.texts[0]), None))
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

    try:
        rewards = trainer.compute_rewards(rollouts)
        totals, report = rewards.view(len(rewards), -1).sum(1), trainer.rewards.report()
        text = f"first {totals[0]:.3g}, mean {totals.mean():.3g}; "
        text += ", ".join(f"{name} {value:.3g}" for name, value in report.items())
        lines.append(("rewards", text, report["reward_failures"] == 0))
    except InputError as error:  # where most of them fail
        lines.append(("rewards", str(error).partition(", see ")[0], False))  # a file of a run, which this is not

    lines += update_lines(trainer, constants, rollouts, old_logps.to(trainer.policy_device), tolerance)
    width = max(len(name) for name, _, _ in lines)
    for name, text, passed in lines:
        mark = "" if passed is None else "ok" if passed else "FAIL"
        print(f"{mark:4}  {name:{width}}  {text}")
    if any(passed is not None and not passed for _, _, passed in lines):
        sys.exit(1)


def update_lines(trainer, constants, rollouts, old_logps, tolerance):
    """The lines about one optimizer step: the ratio before it, the gradient, and the weights that it moves."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = constants.LEARNING_RATE
    advantages = torch.ones(len(rollouts.texts), device=trainer.policy_device)
    advantages[::2] = -1.0  # whatever the rewards are, there is something to learn
    before = [parameter.detach().clone() for parameter in trainer.trained]
    rollouts.old_logps, rollouts.advantages = old_logps, advantages
    rollouts.ref_logps = None if trainer.reference is None else old_logps
    stats = trainer.update(rollouts)
    low, high = stats["ratio_min"].item(), stats["ratio_max"].item()
    lines = [("ratio before the first update", f"{low:.6f} to {high:.6f}", abs(low - 1) < tolerance > abs(high - 1))]
    norm = stats["grad_norm"].item()
    lines.append(("norm of the gradient", f"{norm:.3g}", 0 < norm < float("inf")))
    asked = moved = 0
    names, still = [name for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad], []
    for name, parameter, old in zip(names, trainer.trained, before, strict=True):
        gradient = torch.zeros_like(old) if parameter.grad is None else parameter.grad
        counted = gradient.abs() > trainer.optimizer.defaults["eps"]  # a smaller one moves next to nothing, rightly
        changed = (parameter.detach() != old) & counted
        asked, moved = asked + int(counted.sum()), moved + int(changed.sum())
        if not changed.any() and ".lora_A." not in name:  # it has no gradient before LoRA's B, zero at first, has moved
            still.append(name)
    text = f"{moved / max(1, asked):.0%} of those with a gradient; "
    text += f"{len(still)} of {len(names)} tensors did not move" + (f", such as {still[0]}" if still else "")
    return [*lines, ("weights that the step moved", text, moved > MOVED * asked and not still)]
