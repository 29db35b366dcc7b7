"""What is measured of a training step, and what is kept of its samples."""

import contextlib
import time
from math import inf, isfinite

import torch


def step_metrics(rollouts, updates, group_size):
    """The metrics of a step; those of its updates by their mean, or by the least and greatest of a *_min and *_max.

    updates: what each optimizer step returned. Without any, where no completion was in the loss, there is no ratio and
    no gradient: None.
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


def ratio_metrics(ratio, clipped, counted):
    """What is logged of the importance ratio, one per sequence or per token, of those that are counted. No gradient.

    clipped: where the clip removes the gradient. All three of one shape.
    """
    ratio, number = ratio.detach(), counted.sum()
    return {
        "clip_fraction": (clipped & counted).to(ratio.dtype).sum() / number,
        "ratio_mean": ratio.masked_fill(~counted, 0.0).sum() / number,
        "ratio_min": ratio.masked_fill(~counted, inf).min(),
        "ratio_max": ratio.masked_fill(~counted, -inf).max(),
    }


def idle_clip(history):
    """The least and greatest ratio of some steps in which the clip never acted though there was a ratio; else None."""
    steps = [metrics for metrics in history if metrics.get("clip_fraction") is not None]
    if not steps or any(metrics["clip_fraction"] or metrics["updates"] == 1 for metrics in steps):
        return None
    return min(metrics["ratio_min"] for metrics in steps), max(metrics["ratio_max"] for metrics in steps)


class Clock:
    """The seconds of a step by phase, which add up to it: `with clock("update"): ...` where the work is done.

    devices: what a phase has asked of them is waited for at its end, so that its seconds are its own.
    """

    def __init__(self, *devices):
        self.devices = [device for device in {*devices} if device.type == "cuda"]
        self.memory_of = devices[0]
        self.seconds = dict.fromkeys(("rollout", "reward", "logps", "update", "log"), 0.0)

    @contextlib.contextmanager
    def __call__(self, phase):
        began = time.perf_counter()
        yield
        for device in self.devices:
            torch.cuda.synchronize(device)
        self.seconds[phase] += time.perf_counter() - began

    def metrics(self, tokens):
        """Seconds per phase, tokens per second of the whole step, and the policy device's memory."""
        on_gpu = self.memory_of.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.memory_of) / 1e9 if on_gpu else None
        speed = {"tokens_per_second": tokens / sum(self.seconds.values()), "peak_memory_gb": memory}
        return {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()} | speed


def samples_of(step, tokenizer, rollouts, new_logps):
    """What a reader wants to see of a step's completions, a dict each.

    logp_change: of each token, by how much the step's updates have moved its log-prob, nats.
    """
    samples, rewards, advantages = [], rollouts.rewards, rollouts.advantages
    for i, change in enumerate((new_logps - rollouts.old_logps).tolist()):
        start, length = int(rollouts.prompt_lengths[i]), int(rollouts.completion_lengths[i])
        tokens = rollouts.input_ids[i, start : start + length].tolist()
        samples.append(
            {
                "step": step,
                "prompt": rollouts.prompts[i]["prompt"],
                "completion": rollouts.texts[i],
                "reward": rewards[i].sum().item(),
                "advantage": (advantages[i] if advantages.dim() == 1 else advantages[i, :length].mean()).item(),
                "answer": rollouts.prompts[i]["answer"],
                "tokens": length,
                "truncated": bool(rollouts.truncated[i]),
                "token_texts": token_texts(tokenizer, tokens),
                "logp_change": [round(value, 4) for value in change[:length]],
            }
        )
    return samples


def token_texts(tokenizer, ids):
    """What each token adds to the text of all, special tokens shown.

    A token that ends within a character adds nothing: the one that completes it adds it whole.
    """
    texts, first, before = [], 0, ""
    for t in range(len(ids)):
        now = tokenizer.decode(ids[first : t + 1])
        if now.endswith("\ufffd") and t + 1 < len(ids):  # what stands for bytes that are no character, or not yet
            texts.append("")
            continue
        texts.append(now[len(before) :])
        before = now
        if t - first > 16:  # a new beginning, or a long text would be decoded once per token
            first, before = t, tokenizer.decode(ids[t : t + 1])
    return texts
