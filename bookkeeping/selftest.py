"""`python gspo.py --selftest`: does this model, with this data and these rewards, do what the algorithm assumes?

It samples a few groups, takes one optimizer step, and prints a table of its findings. It exits with 1 if a line fails.
"""

import sys
from typing import Protocol

import torch

from bookkeeping.run import Trainer
from configs import InputError
from engine.precision import dtype_of_products
from inputs.libraries import quiet_libraries

TOLERANCES = 1e-3, 0.1  # nats, in float32 and in bfloat16; two ways to compute a log-prob may differ by this much
SAME_PASS = 1e-5  # two passes over the same micro-batches may differ by this much in the ratio, in any precision
MOVED = 0.9  # share of the weights with a gradient that a step should change


class TestedTrainer(Trainer, Protocol):
    """Everything that the selftest uses of a trainer: what a run uses, and the steps that it tries."""

    eos_ids: list[int]  # each of them ends a completion
    reference: object  # None without a KL term

    def sample(self, rows, group_size, purpose):
        """Returns Rollouts of some prompts. purpose: the randomness depends on it."""

    def compute_log_probs(self, model, rollouts):
        """Returns log-probs of the completions under a model, (B, T)."""

    def compute_rewards(self, rollouts):
        """Returns rewards, (B,) or (B, T)."""

    def score(self, rollouts):
        """Returns the rewards that a step's advantages are made of. rollouts: with those of compute_rewards."""

    def update(self, rollouts):
        """Takes one optimizer step, and returns its statistics.

        rollouts: completions with old_logps, ref_logps and advantages.
        """

    def compute_values(self, rollouts):
        """Returns the critic's values, (B, T), if the trainer has a critic beside the policy."""

    def update_critic(self, rollouts):
        """Takes one optimizer step of the critic. rollouts: completions with values and returns."""


@quiet_libraries()
def selftest(trainer: TestedTrainer):
    """Prints the table. Raises SystemExit(1) if a line fails. trainer: a new one, because the test changes it."""
    constants, device = trainer.constants, trainer.devices["POLICY_DEVICE"]
    tolerance = TOLERANCES[dtype_of_products(trainer.policy, constants.COMPUTE_DTYPE) == torch.bfloat16]
    size = min(4, constants.BATCH_SIZE, len(trainer.train_rows))
    rows = trainer.train_rows[:size]
    rollouts = trainer.sample(rows, constants.GROUP_SIZE, ("selftest",))
    old_logps = trainer.compute_log_probs(trainer.policy, rollouts).cpu()
    lines = [("first prompt, as the model sees it", repr(rows[0]["prompt_text"]), None)]  # the reader judges it
    lines.append(("first completion", repr(rollouts.texts[0]), None))
    lines += log_prob_lines(trainer, rollouts, old_logps, tolerance)
    lines += end_lines(trainer, rollouts)
    lines.append(reward_line(trainer, rollouts))
    lines += update_lines(trainer, constants, rollouts, old_logps.to(device), tolerance)
    if "critic" in trainer.beside:
        lines += critic_lines(trainer, constants, rollouts, tolerance)
    width = max(len(name) for name, _, _ in lines)
    for name, text, passed in lines:
        mark = "" if passed is None else "ok" if passed else "FAIL"
        print(f"{mark:4}  {name:{width}}  {text}")
    if any(passed is not None and not passed for _, _, passed in lines):
        sys.exit(1)


def log_prob_lines(trainer, rollouts, old_logps, tolerance):
    """Returns the lines about log-probs, which should not depend on the way they are computed."""
    every, mask = torch.arange(len(rollouts.texts)), rollouts.completion_mask
    with torch.no_grad():
        alone = [trainer.compute_log_probs(trainer.policy, rollouts.select(row[None]))[0].cpu() for row in every]
    sampled = (rollouts.sampled_logps - old_logps)[mask].abs()
    batched = (torch.stack(alone) - old_logps).masked_fill(~mask, 0.0)
    noise, c = (batched.sum(1) / mask.sum(1)).square().mean().sqrt(), trainer.constants
    text = f"mean {sampled.mean():.1e}, most {sampled.max():.1e}"
    most = batched.abs().max()
    clip = f"{noise:.1e}; the clip is {c.CLIP_LOW:g} and {c.CLIP_HIGH:g}"
    return [
        ("log-probs, sampler against trainer", text, sampled.mean() < tolerance),
        ("log-probs, batched against alone", f"most {most:.1e}", most < 10 * tolerance),
        ("noise of a sequence's mean log-prob", clip, noise < min(c.CLIP_LOW, c.CLIP_HIGH) / 2),
    ]


def end_lines(trainer, rollouts):
    """Returns the lines about the ends of completions."""
    ended, mask = ~rollouts.truncated, rollouts.completion_mask
    every = torch.arange(len(ended))
    last = [int(ids[n - 1]) for ids, n in zip(rollouts.input_ids, rollouts.lengths, strict=True)]
    eos_kept = all(last[i] in trainer.eos_ids and mask[i].sum() == rollouts.completion_lengths[i] for i in every[ended])
    text = f"{int(ended.sum())} of {len(ended)} ended; ends: {trainer.tokenizer.convert_ids_to_tokens(trainer.eos_ids)}"
    share = f"{ended.double().mean():.0%} within MAX_COMPLETION_TOKENS"
    return [
        ("end of sequence is in the mask", text, eos_kept),
        ("completions that end", share, bool(ended.any())),
    ]


def reward_line(trainer, rollouts):
    """Returns the line about rewards."""
    try:
        rollouts.rewards = rewards = trainer.compute_rewards(rollouts)
        totals, report = rewards.view(len(rewards), -1).sum(1), trainer.rewards.report()
        trainer.score(rollouts)  # adds what else a step scores, such as which completions are right
        trainer.rewards.report()  # drops the scores
        text = f"first {totals[0]:.3g}, mean {totals.mean():.3g}; "
        text += ", ".join(f"{name} {value:.3g}" for name, value in report.items())
        return "rewards", text, report["reward_failures"] == 0
    except InputError as error:  # too many rewards fail
        return "rewards", str(error).partition(", see ")[0], False  # it names a file that only a run writes


def update_lines(trainer, constants, rollouts, old_logps, tolerance):
    """Returns the lines about one optimizer step: the ratio before it, the gradient, and the weights that it moves."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = constants.LEARNING_RATE
    advantages = torch.ones(len(rollouts.texts), device=trainer.devices["POLICY_DEVICE"])
    advantages[::2] = -1.0  # so there is a signal, whatever the rewards are
    trained = {name: parameter for name, parameter in trainer.policy.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    rollouts.old_logps, rollouts.advantages = old_logps, advantages
    rollouts.ref_logps = None if trainer.reference is None else old_logps
    stats = trainer.update(rollouts)
    low, high = stats["ratio_min"].item(), stats["ratio_max"].item()
    exact = 1 - SAME_PASS < low <= high < 1 + SAME_PASS
    lines = [("ratio before the first update", f"{low:.6f} to {high:.6f}", exact)]
    norm = stats["grad_norm"].item()
    lines.append(("norm of the gradient", f"{norm:.3g}", 0 < norm < float("inf")))
    return [*lines, moved_line("weights that the step moved", trained, before, trainer.optimizer)]


def critic_lines(trainer, constants, rollouts, tolerance):
    """Returns the lines about two steps of the critic, towards returns that are 1 above its values.

    The second is judged, because in the first a new head is zero and gives the body no gradient.
    """
    critic = trainer.beside["critic"]
    for group in critic.optimizer.param_groups:
        group["lr"] = constants.CRITIC_LEARNING_RATE
    rollouts.values = trainer.compute_values(rollouts)
    rollouts.returns = rollouts.values + 1
    mask, trained = rollouts.completion_mask.to(rollouts.values.device), critic.trained()
    trainer.update_critic(rollouts)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    stats = trainer.update_critic(rollouts)
    values = trainer.compute_values(rollouts)
    alone = [trainer.compute_values(rollouts.select(torch.tensor([row])))[0] for row in range(len(rollouts.texts))]
    apart = (torch.stack(alone) - values)[mask].abs().max().item()
    old, new = rollouts.values[mask].mean().item(), values[mask].mean().item()
    norm = stats["critic_grad_norm"].item()
    return [
        ("values, batched against alone", f"most {apart:.1e}", apart < 10 * tolerance),
        ("critic: norm of the gradient", f"{norm:.3g}", 0 < norm < float("inf")),
        ("critic: mean value, two steps upwards", f"{old:.3g} before, {new:.3g} after", new > old),
        moved_line("critic: weights that a step moved", trained, before, critic.optimizer),
    ]


def moved_line(title, trained, before, optimizer):
    """Returns the line about the weights that a step moved, of those that AdamW's average of gradients asks to move."""
    asked, moved, still = 0, 0, []
    for name, parameter in trained.items():
        old = before[name]
        gradient = optimizer.state.get(parameter, {}).get("exp_avg", torch.zeros_like(old))
        counted = gradient.abs() > optimizer.defaults["eps"]  # a smaller one should hardly move its weight
        changed = (parameter.detach() != old) & counted
        asked, moved = asked + int(counted.sum()), moved + int(changed.sum())
        # LoRA's A has no gradient at first, because B is still zero.
        if not changed.any() and ".lora_A." not in name:
            still.append(name)
    text = f"{moved / max(1, asked):.0%} of those with a gradient; "
    text += f"{len(still)} of {len(trained)} tensors did not move" + (f", such as {still[0]}" if still else "")
    return title, text, moved > MOVED * asked and not still
