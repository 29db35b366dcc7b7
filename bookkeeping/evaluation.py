"""Measures accuracy on held-out prompts. Nothing here is trained on."""

from math import comb, sqrt

from scoring.rules import check_right


def evaluation_metrics(sampled, greedy, eval_reward, k):
    """Returns the eval_* metrics: held-out accuracy by the rule EVAL_REWARD, of sampled and of greedy completions.

    sampled, greedy: Rollouts. eval_reward: a Rewards with this one rule. k: that of eval_pass_at_k.
    """
    right, right_greedy = (eval_reward(some.prompts, some.texts) for some in (sampled, greedy))
    check_right(right + right_greedy, *eval_reward.weights)
    metrics = accuracy_metrics(right, len(right) // len(right_greedy), k)
    return metrics | {"eval_accuracy_greedy": sum(right_greedy) / len(right_greedy)}


def accuracy_metrics(right, samples, k):
    """Returns eval_* metrics of sampled completions.

    right: 0 or 1 per completion, with `samples` contiguous completions for each prompt. eval_accuracy is pass@1, the
    mean. eval_pass_at_k is the chance that one of k samples is right, by the unbiased estimator 1 − C(n−c, k) / C(n, k)
    with c right of n (Chen et al. 2021, arXiv 2107.03374, eq. 1). Both have Wilson's 95 % interval for as many trials
    as there are prompts. The interval is on the safe side if a prompt has several samples.
    """
    prompts = [right[i : i + samples] for i in range(0, len(right), samples)]
    k = min(k, samples)
    missed = [comb(samples - sum(value > 0 for value in one), k) / comb(samples, k) for one in prompts]
    metrics = {}
    for name, mean in (
        ("eval_accuracy", sum(right) / len(right)),
        ("eval_pass_at_k", 1 - sum(missed) / len(missed)),
    ):
        low, high = wilson_interval(mean, len(prompts))
        metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
    return metrics


def wilson_interval(share, trials, z=1.96):
    """Returns Wilson's score interval of a share: two numbers in [0, 1]."""
    centre = share + z * z / (2 * trials)
    width = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)
