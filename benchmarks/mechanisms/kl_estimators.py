"""Which gradient each estimator of the KL has as a loss, exactly, and where a long run with it ends.

    python benchmarks/mechanisms/kl_estimators.py            five seeds, a minute
    python benchmarks/mechanisms/kl_estimators.py --seeds 1 --steps 200

The policy is a softmax over eight completions of one token. So every expectation is a sum over all of them, without
sampling. π_ref and the rewards R are drawn at random. The losses are those of grpo.py: compute_kl_loss with each
KL_ESTIMATOR, and compute_policy_loss with advantages R − E[R]. A run descends their exact expected gradient. If the
estimator has the gradient of the reverse KL(π ‖ π_ref), it ends at π_ref · exp(R / β) / Z, the optimum of
E[R] − β KL(π ‖ π_ref).

It prints, for each estimator, its expectation over the true KL, the cosines of its gradient with those of the reverse
and of the forward KL, and the total variation between the end of a run and that optimum: mean and standard deviation
over the seeds. It draws docs/mechanisms/kl_estimators.png, with the ends of the first seed's runs.
"""

import statistics

import torch
from common import figure_of, grpo, parse, save, spread
from torch.nn.functional import cosine_similarity

ESTIMATORS = ("k1", "k2", "k3", "ratio_k3")
OUTCOMES, BETA = 8, 0.5


def expected_gradient(theta, loss_of):
    """Returns Σ_a π(a) ∇ loss(a), (outcomes,), where π(a) has no gradient, as that of a sample has none.

    loss_of: a function of log π of all completions, (outcomes, 1), that returns the mean of their losses.
    """
    copies = theta.detach().expand(OUTCOMES, -1).clone().requires_grad_()  # a copy for each completion
    logps = copies.log_softmax(1).diagonal()[:, None]  # (outcomes, 1)
    (gradient,) = torch.autograd.grad(OUTCOMES * loss_of(logps), copies)
    return theta.detach().softmax(0) @ gradient


def kl_gradient(theta, reference, estimator):
    grpo.KL_ESTIMATOR = estimator
    mask, old = torch.ones(OUTCOMES, 1, dtype=torch.bool), theta.detach().log_softmax(0)[:, None]
    return expected_gradient(theta, lambda logps: grpo.compute_kl_loss(logps, old, reference[:, None], mask))


def reward_gradient(theta, rewards):
    mask, old = torch.ones(OUTCOMES, 1, dtype=torch.bool), theta.detach().log_softmax(0)[:, None]
    advantages = rewards - theta.detach().softmax(0) @ rewards
    return expected_gradient(theta, lambda logps: grpo.compute_policy_loss(logps, old, advantages, mask)[0])


def true_gradients(theta, reference):
    """Returns the gradients of KL(π ‖ π_ref) and KL(π_ref ‖ π), and the first KL itself."""
    theta = theta.detach().requires_grad_()
    logps = theta.log_softmax(0)
    reverse, forward = (logps.exp() * (logps - reference)).sum(), (reference.exp() * (reference - logps)).sum()
    return *(torch.autograd.grad(kl, theta, retain_graph=True)[0] for kl in (reverse, forward)), reverse.item()


def value_over_kl(theta, reference, estimator, kl):
    """Returns the estimator's expectation under π over the true KL."""
    grpo.KL_ESTIMATOR, logps = estimator, theta.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.bool)
    values = [
        grpo.compute_kl_loss(p.view(1, 1), p.view(1, 1), r.view(1, 1), one)
        for p, r in zip(logps, reference, strict=True)
    ]
    return (logps.exp() @ torch.stack(values)).item() / kl


def run(theta, reference, rewards, estimator, steps):
    """Returns π after gradient descent on −E[R] + BETA · the estimator, with a step size that falls to zero."""
    theta = theta.clone()
    for step in range(steps):
        gradient = reward_gradient(theta, rewards) + BETA * kl_gradient(theta, reference, estimator)
        theta -= 2.0 * (1 - step / steps) * gradient
    return theta.softmax(0)


def main():
    arguments = parse(__doc__, seeds=5, steps=2000)
    rows = {name: {"value": [], "reverse": [], "forward": [], "distance": []} for name in ESTIMATORS}
    for seed in range(arguments.seeds):
        generator = torch.Generator().manual_seed(seed)
        theta, logits, rewards = torch.randn(3, OUTCOMES, generator=generator, dtype=torch.float64)
        reference = logits.log_softmax(0)
        optimum = (reference + rewards / BETA).softmax(0)
        reverse, forward, kl = true_gradients(theta, reference)
        ends = {}
        for name in ESTIMATORS:
            gradient = kl_gradient(theta, reference, name)
            rows[name]["value"].append(value_over_kl(theta, reference, name, kl))
            for kind, true in (("reverse", reverse), ("forward", forward)):
                none = gradient.norm() < 1e-9 * true.norm()
                rows[name][kind].append(0.0 if none else cosine_similarity(gradient, true, 0).item())
            ends[name] = run(theta, reference, rewards, name, arguments.steps)
            rows[name]["distance"].append((ends[name] - optimum).abs().sum().item() / 2)
        if seed == 0:
            shown = optimum.tolist(), {name: end.tolist() for name, end in ends.items()}
    print(
        "| estimator | E over the KL | cosine with ∇KL(π ‖ π_ref) | with ∇KL(π_ref ‖ π) | distance from the optimum |"
    )
    print("|---|---|---|---|---|")
    for name, columns in rows.items():
        print(f"| {name} | " + " | ".join(spread(values) for values in columns.values()) + " |")
    figure, (left, right) = figure_of(2)
    for offset, kind in ((-0.2, "reverse"), (0.2, "forward")):
        values = [rows[name][kind] for name in ESTIMATORS]
        means = [statistics.mean(one) for one in values]
        ranges = [[mean - min(one) for mean, one in zip(means, values, strict=True)]]
        ranges.append([max(one) - mean for mean, one in zip(means, values, strict=True)])
        label = {"reverse": "∇KL(π ‖ π_ref)", "forward": "∇KL(π_ref ‖ π)"}[kind]
        left.bar([place + offset for place in range(4)], means, 0.38, yerr=ranges, capsize=3, label=f"with {label}")
    left.set_xticks(range(4), ESTIMATORS)
    left.set(title="Which KL's gradient is it?", ylabel="cosine of expected gradients; k1 has none")
    left.set_ylim(0, 1.3)
    left.legend()
    places = range(OUTCOMES)
    right.bar(places, shown[0], color="0.85", label="π_ref · exp(R / β) / Z")
    for marker, name in zip("xo^.", ESTIMATORS, strict=True):
        right.plot(places, shown[1][name], marker, label=name)
    right.set(title="Where does a long run end? (seed 0)", xlabel="completion", ylabel="probability")
    right.legend()
    save(figure, arguments.pictures, "kl_estimators")


if __name__ == "__main__":
    main()
