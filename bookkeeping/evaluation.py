"""Accuracy on held-out prompts. Nothing here is trained on."""

from math import comb, sqrt

from scoring.rules import check_right


def evaluation_metrics(sampled, greedy, eval_reward, k):
    """Held-out accuracy by the rule EVAL_REWARD, eval_*: of sampled completions and of greedy ones, both Rollouts.

    eval_reward: a Rewards of that rule. k: of eval_pass_at_k.
    """
    right, right_greedy = (eval_reward(some.prompts, some.texts) for some in (sampled, greedy))
    eval_reward.report()  # which nobody logs, but which would keep all scores of the run
    check_right(right + right_greedy, *eval_reward.weights)
    metrics = accuracy_metrics(right, len(right) // len(right_greedy), k)
    return metrics | {"eval_accuracy_greedy": sum(right_greedy) / len(right_greedy)}


def accuracy_metrics(right, samples, k):
    """Held-out accuracy from 0 and 1 per completion, `samples` for each prompt, contiguous: what eval_* metrics hold.

    eval_accuracy: pass@1, the mean. eval_pass_at_k: the chance that one of k samples is right, by the unbiased
    estimator 1 − C(n−c, k) / C(n, k) with c right of n (Chen et al. 2021, arXiv 2107.03374, eq. 1). Both with Wilson's
    95 % interval for as many trials as there are prompts, on the safe side where a prompt has several samples.
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
    """Wilson's score interval of a share: two numbers in [0, 1]."""
    centre = share + z * z / (2 * trials)
    width = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - width) / scale), min(1.0, (centre + width) / scale)
