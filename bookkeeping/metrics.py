"""Computes the metrics of a training step, and the rows of its samples."""

import contextlib
import time
from math import inf, isfinite

import torch

from engine.packing import micro_batches, states_before_tokens
from engine.precision import autocast
from engine.rollouts import last_tokens
from engine.routing import experts_of_tokens, loads_of, routing_of


def step_metrics(rollouts, updates, group_size):
    """Returns the metrics of a step.

    updates: the metrics that each optimizer step returned. A step's metric is their mean, or the least of a *_min and
    the greatest of a *_max. If there was no update, because no completion was in the loss, there is no ratio and no
    gradient, and their metrics are None.
    """
    rewards, advantages, old_logps = rollouts.rewards, rollouts.advantages, rollouts.old_logps
    mask = rollouts.completion_mask.to(old_logps.device)
    totals = rewards.view(len(rewards), -1).sum(1)  # (B,)
    per_token = advantages.view(len(advantages), -1).expand(mask.shape).masked_fill(~mask, 0.0)  # (B, T)
    merged = {"policy_loss": 0.0, "entropy_loss": 0.0, "kl_loss": 0.0}
    merged |= dict.fromkeys(("kl_divergence", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "grad_norm"))
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


@torch.no_grad()
def routing_metrics(policy, rollouts, group_size, token_budget):
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
    last = rollouts.select(torch.arange(len(rollouts.texts))[-group_size:])
    changed, entropies = [], []
    for rows in micro_batches(last, token_budget):
        part = last.select(rows)
        before, part.experts = experts_of_tokens(part).sort(-1).values, None
        with autocast(policy.device):
            states_before_tokens(policy, part, replay=True)  # the routers choose, because there are no experts to take
        changed.append((experts_of_tokens(part).sort(-1).values != before).any(-1))  # (tokens, layers)
        logps = torch.stack(routing.logits).float().log_softmax(-1)  # (layers, tokens, experts)
        entropies.append(-(logps.exp() * logps).sum(-1).mean(0))  # (tokens,)
    return {
        "routing_changed": torch.cat(changed).double().mean().item(),
        "router_entropy": torch.cat(entropies).mean().item(),
        "expert_load_max": (loads.amax(1) * loads.shape[1]).mean().item(),
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


def samples_of(step, tokenizer, rollouts, new_logps):
    """Returns a dict per completion of a step, with what a reader wants to see.

    logp_change: for each token, by how many nats the step's updates have moved its log-prob.
    """
    samples, rewards, advantages = [], rollouts.rewards, rollouts.advantages
    for i, change in enumerate((new_logps - rollouts.old_logps).tolist()):
        start, length = int(rollouts.prompt_lengths[i]), int(rollouts.completion_lengths[i])
        tokens = rollouts.input_ids[i, start : start + length].tolist()
        row = rollouts.prompts[i]
        begun = [{"role": "assistant", "content": row["begun"]}] if row["begun"] else []
        samples.append(
            {
                "step": step,
                "prompt": row["prompt"],
                "messages": [{name: one[name] for name in ("role", "content")} for one in row["messages"] + begun],
                "completion": rollouts.texts[i],
                "reward": rewards[i].sum().item(),
                "advantage": (advantages[i] if advantages.dim() == 1 else advantages[i, :length].mean()).item(),
                "answer": row["answer"],
                "tokens": length,
                "truncated": bool(rollouts.truncated[i]),
                "token_texts": token_texts(tokenizer, tokens),
                "logp_change": [round(value, 4) for value in change[:length]],
            }
        )
    return samples


def token_texts(tokenizer, ids):
    """Returns the text that each token adds to the whole, with special tokens shown.

    If a token ends within a character, it adds nothing. The token that completes the character adds all of it.
    """
    texts, first, before = [], 0, ""
    for t in range(len(ids)):
        now = tokenizer.decode(ids[first : t + 1])
        if now.endswith("\ufffd") and t + 1 < len(ids):  # stands for bytes that are not yet a character
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        if t - first > 16:  # starts anew, so that no long text is decoded per token
            first, before = t, tokenizer.decode(ids[t : t + 1])
    return texts
