"""Computes the metrics of a training step, and the rows of its samples."""

import contextlib
import time
from math import inf, isfinite

import torch

from engine.correction import correction_metrics
from engine.packing import micro_batches, states_before_tokens
from engine.precision import autocast
from engine.processes import from_all
from engine.rollouts import last_tokens
from engine.routing import experts_of_tokens, loads_of, routing_of
from engine.steps import learning_rate_at


def step_metrics(rollouts, updates, group_size):
    """Returns the metrics of a step.

    updates: the metrics that each optimizer step returned. A step's metric is their mean, or the least of a *_min and
    the greatest of a *_max. If there was no update, because no completion was in the loss, there is no ratio and no
    gradient, and their metrics are None. first_ratio_min and first_ratio_max are of the first update, before which the
    policy is π_old, so they are 1 but for rounding.
    """
    rewards, advantages, old_logps = rollouts.rewards, rollouts.advantages, rollouts.old_logps
    mask = rollouts.completion_mask.to(old_logps.device)
    totals = rewards.view(len(rewards), -1).sum(1)  # (B,)
    per_token = advantages.view(len(advantages), -1).expand(mask.shape).masked_fill(~mask, 0.0)  # (B, T)
    merged = {"policy_loss": 0.0, "entropy_loss": 0.0, "kl_loss": 0.0}
    merged |= dict.fromkeys(("kl_divergence", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "grad_norm"))
    merged |= dict.fromkeys(("first_ratio_min", "first_ratio_max"))
    if updates:
        merged |= {f"first_{name}": updates[0][name].item() for name in ("ratio_min", "ratio_max")}
    for name in updates[0] if updates else ():
        values = torch.stack([update[name] for update in updates]).double()
        reduce = values.min if name.endswith("_min") else values.max if name.endswith("_max") else values.mean
        merged[name] = reduce().item()
    lengths = rollouts.completion_lengths.double()
    sequences = advantages.abs() if advantages.dim() == 1 else per_token.abs().sum(1) / mask.sum(1)
    if rollouts.correct is not None:
        merged["correct"] = rollouts.correct.double().mean().item()
    return merged | {
        "updates": len(updates),
        "skipped_updates": sum(not isfinite(update["grad_norm"]) for update in updates),
        "reward": totals.mean().item(),
        "reward_std": totals.std().item(),
        "relative_advantage": sequences.mean().item(),
        "dead_groups": (per_token == 0).all(1).view(-1, group_size).all(1).double().mean().item(),
        "entropy": -old_logps[mask].mean().item(),
        "sampled_completions": len(lengths),
        "completion_tokens": int(lengths.sum()),
        "avg_response_length": lengths.mean().item(),
        "truncated": rollouts.truncated.double().mean().item(),
    }


def trainer_metrics(trainer, step, rollouts):
    """Returns the metrics of a trainer itself in a step: its coefficients, memory halvings, rewards and routers."""
    c = trainer.constants
    metrics = {"learning_rate": learning_rate_at(step, c), "kl_coef": trainer.kl_coef}
    metrics |= {"memory_halvings": trainer.fit_to_memory.halvings.total()} | trainer.rewards.report()
    metrics |= correction_metrics(rollouts, trainer.sampler.correction)

    def of_routers(token_budget):
        return routing_metrics(trainer.policy, rollouts, c.GROUP_SIZE, token_budget, c.COMPUTE_DTYPE)

    return metrics | trainer.fit_to_memory("log-probs", c.MICRO_BATCH_TOKENS, of_routers)


def sampler_gap(rollouts, logps):
    """Returns how far log-probs in training are from those at sampling, both before any update, in nats.

    logps: those in training of the last completions, (n, T). sampler_gap: the mean of |difference| over tokens;
    sampler_gap_max: the greatest; sampler_gap_sequence: the root of the mean over sequences of (mean difference over
    the sequence's tokens)², which would be the noise in GSPO's log s if the sampler's log-probs were π_old.
    """
    last = rollouts[-len(logps) :]
    mask = last.completion_mask
    gap = (logps.cpu() - last.sampled_logps).masked_fill(~mask, 0.0).double()
    of_sequences = gap.sum(1) / mask.sum(1)  # (B,)
    return {
        "sampler_gap": (gap.abs().sum() / mask.sum()).item(),
        "sampler_gap_max": gap.abs().max().item(),
        "sampler_gap_sequence": of_sequences.square().mean().sqrt().item(),
    }


@torch.no_grad()
def routing_metrics(policy, rollouts, group_size, token_budget, compute_dtype):
    """Returns the metrics of a mixture's routers in a step, after its updates; none for a policy that is no mixture.

    They are means over the layers, and over the tokens that predict one. routing_changed: the share of (token, layer)
    whose set of experts is no longer the recorded one, in the last group. router_entropy: that of the router's softmax
    there, nats. expert_load_max: the share of the busiest expert in a layer's recorded choices, times the number of
    experts: 1 if all are as busy.
    """
    routing = routing_of(policy)
    if routing is None:
        return {}
    loads = loads_of(experts_of_tokens(rollouts), routing.routers[0].num_experts)  # (layers, experts)
    last = rollouts[-group_size:]
    changed, entropies = [], []
    for rows in micro_batches(last, token_budget, policy):
        part = last.select(rows)
        before, part.experts = experts_of_tokens(part).sort(-1).values, None
        with autocast(policy.device, compute_dtype):
            states_before_tokens(policy, part, replay=True)  # the routers choose, because there are no experts to take
        changed.append((experts_of_tokens(part).sort(-1).values != before).any(-1))  # (tokens, layers)
        logps = torch.stack(routing.logits).float().log_softmax(-1)  # (layers, tokens, experts)
        entropies.append(-(logps.exp() * logps).sum(-1).mean(0).cpu())  # (tokens,)
    of_all = from_all((changed, entropies), "routing")
    changed, entropies = (sum(lists, []) for lists in zip(*of_all, strict=True))
    return {
        "routing_changed": torch.cat(changed).double().mean().item(),
        "router_entropy": torch.cat(entropies).mean().item(),
        "expert_load_max": (loads.amax(1) * loads.shape[1]).mean().item(),
    }


def drawn_metrics(rollouts, drawn, rewards, dead):
    """Returns the metrics of dynamic sampling: of all that was drawn for a step's batch, and of the batch.

    drawn: the Rollouts of each round of sampling. rewards: the task's, of all completions drawn. dead: which groups
    drawn were dead.
    """
    return {
        "sampled_completions": len(rewards),
        "completion_tokens": sum(int(part.completion_lengths.sum()) for part in drawn),
        "accuracy": (rewards > 0).double().mean().item(),
        "dead_groups_drawn": dead.double().mean().item(),
        "resampled": 1 - 1 / len(drawn),
        "carried_over": rollouts.carried.double().mean().item(),
        **dict.fromkeys(("first_ratio_min", "first_ratio_max") if rollouts.carried.any() else ()),  # no mere noise
    }


def value_metrics(rollouts, updates):
    """Returns the metrics of a critic in a step.

    updates: the statistics of each of its optimizer steps. explained_variance: 1 − Var(returns − values) / Var(returns)
    over all tokens, of the values before the step's updates; explained_variance_last: over the last tokens alone. It is
    None if all returns are equal. kl_in_reward: the mean of log π_old − log π_ref, None without a reference.
    """
    mask = rollouts.completion_mask.to(rollouts.values.device)
    values, returns = rollouts.values.double(), rollouts.returns.double()
    metrics = {name: torch.stack([update[name] for update in updates]).double().mean().item() for name in updates[0]}
    for name, tokens in (("explained_variance", mask), ("explained_variance_last", last_tokens(mask))):
        spread, left = returns[tokens].var().item(), (returns - values)[tokens].var().item()
        metrics[name] = 1 - left / spread if spread > 0 else None
    ref_logps, old_logps = rollouts.ref_logps, rollouts.old_logps
    kl = None if ref_logps is None else (old_logps - ref_logps)[mask].double().mean().item()
    means = {"values_mean": values[mask].mean().item(), "returns_mean": returns[mask].mean().item()}
    return metrics | means | {"kl_in_reward": kl}


def ratio_metrics(ratio, clipped, counted, **sides):
    """Returns metrics of the importance ratio, without gradient.

    ratio: one per sequence or per token. clipped: where the clip removes the gradient. counted: the entries to count.
    sides: {name: where the clip removes the gradient on that side}. All have one shape.
    """
    ratio, number = ratio.detach(), counted.sum()
    removed = {"clip_fraction": clipped} | {f"clip_fraction_{side}": there for side, there in sides.items()}
    shares = {name: (there & counted).to(ratio.dtype).sum() / number for name, there in removed.items()}
    return shares | {
        "ratio_mean": ratio.masked_fill(~counted, 0.0).sum() / number,
        "ratio_min": ratio.masked_fill(~counted, inf).min(),
        "ratio_max": ratio.masked_fill(~counted, -inf).max(),
    }


def idle_clip(history):
    """Returns the least and greatest ratio of some steps if the clip never acted in them, or None.

    It also returns None if no step had a ratio, or if a step had a single update.
    """
    steps = [metrics for metrics in history if metrics.get("clip_fraction") is not None]
    if not steps or any(metrics["clip_fraction"] or metrics["updates"] == 1 for metrics in steps):
        return None
    return min(metrics["ratio_min"] for metrics in steps), max(metrics["ratio_max"] for metrics in steps)


class Clock:
    """Measures the seconds of a step by phase; they add up to the step: `with clock("update"): ...` around the work.

    device: the policy's. At the end of a phase, the clock waits for the work of this device alone, because the other
    models work beside it. The phase that takes their results counts the wait for them.
    """

    def __init__(self, device):
        self.device, self.on_gpu = device, device.type == "cuda"
        self.seconds = dict.fromkeys(("rollout", "reward", "logps", "update", "log"), 0.0)

    @contextlib.contextmanager
    def __call__(self, phase):
        began = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - began

    def metrics(self, tokens):
        """Returns seconds per phase, tokens per second of the step, and the peak memory of the policy's device."""
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.on_gpu else None
        speed = {"tokens_per_second": tokens / sum(self.seconds.values()), "peak_memory_gb": memory}
        return {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()} | speed
