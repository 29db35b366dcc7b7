"""What an update does to a mixture's routing, and what routing replay does to the importance ratios.

    python benchmarks/mechanisms/experts.py                  three seeds
    python benchmarks/mechanisms/experts.py --updates 1      after one update in place of a step's four
    python benchmarks/mechanisms/experts.py --seeds 1 --prompts 32

The policy is the trained mixture of the embedded task, which `python data/make_arithmetic.py --stages moe` makes: on
random weights routing hardly enters the ratio.
gspo.py takes some steps, without replay. After the updates of the last one, log π/π_old is computed with the experts
that the routers choose now, and with those of sampling (ROUTING_REPLAY "r3"). It prints the share of (token, layer)
whose set of experts has changed, and the standard deviations of log r over tokens (GRPO's ratio) and of log s over
completions (GSPO's), without and with replay.

The last rows are about a sampler that differs: the weights of its routers are off by a tenth of their standard
deviation, as a quantized or older copy might be. Before any update, log π/π_sampler should be 0. It prints its standard
deviation over tokens with the trainer's own experts, and with the sampler's. It draws docs/mechanisms/experts.png: the
standard deviations, and those with replay over those without for each seed.
"""

import contextlib

import torch
from common import figure_of, gspo, parse, save, scored_rollouts, spread, trainer_of

from bookkeeping.metrics import routing_metrics
from configs import PRESETS

QUANTITIES = ("std of log r", "std of log s", "std of log r, another router")


@contextlib.contextmanager
def other_routers(policy, noise, seed):
    """Adds noise to the routers' weights inside, in standard deviations of each."""
    generator, before = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for router in policy.routing.routers:
            before.append(router.weight.clone())
            router.weight += noise * router.weight.std() * torch.randn(router.weight.shape, generator=generator)
        yield
        for router, weight in zip(policy.routing.routers, before, strict=True):
            router.weight.copy_(weight)


def spreads(trainer, rollouts, old_logps, replay):
    """Returns the standard deviations of log r over tokens, and of log s over completions."""
    gspo.ROUTING_REPLAY, mask = replay, rollouts.completion_mask
    logps = trainer.compute_log_probs(trainer.policy, rollouts)
    sequences = gspo.compute_sequence_ratio(logps, old_logps, mask).log()
    return (logps - old_logps)[mask].std().item(), sequences.std().item()


def main():
    arguments = parse(__doc__, seeds=3, prompts=128, steps=5, updates=4, model="data/models/arithmetic-moe")
    changed, found = [], {quantity: {"": [], "r3": []} for quantity in QUANTITIES}
    for seed in range(arguments.seeds):
        settings = {"SEED": seed, "BATCH_SIZE": arguments.prompts, "REWARDS": "exact_match", "KL_COEF": 0.0}
        settings |= {"WARMUP_STEPS": 0, "LR_SCHEDULE": "constant", "LEARNING_RATE": PRESETS["moe"]["LEARNING_RATE"]}
        trainer = trainer_of(gspo, **settings, POLICY_MODEL=arguments.model, ROUTING_REPLAY="")
        rows = gspo.prompts_of_step(trainer.train_rows, 1, arguments.prompts, gspo.generator_of)
        with other_routers(trainer.policy, 0.1, seed):
            others = trainer.sample(rows, gspo.GROUP_SIZE, ("other routers",))
        for replay in ("", "r3"):
            found[QUANTITIES[2]][replay].append(spreads(trainer, others, others.sampled_logps, replay)[0])
        gspo.ROUTING_REPLAY = ""
        for step in range(1, arguments.steps + 1):
            gspo.MINI_BATCHES = arguments.updates if step == arguments.steps else 4
            rollouts = scored_rollouts(trainer, step)
            trainer.update_policy(rollouts, step)
        metrics = routing_metrics(trainer.policy, rollouts, len(rollouts.texts), gspo.MICRO_BATCH_TOKENS, "auto")
        changed.append(metrics["routing_changed"])
        for replay in ("", "r3"):
            for quantity, value in zip(
                QUANTITIES, spreads(trainer, rollouts, rollouts.old_logps, replay), strict=False
            ):
                found[quantity][replay].append(value)
    print(f"expert sets changed by the updates, {arguments.updates}: {spread(changed)} of (token, layer)\n")
    print("| quantity | own experts | replayed | replayed over own |\n|---|---|---|---|")
    figure, (axis, beside) = figure_of(2)
    for place, (quantity, by_replay) in enumerate(found.items()):
        own, replayed = by_replay[""], by_replay["r3"]
        ratios = [b / a for a, b in zip(own, replayed, strict=True)]
        print(f"| {quantity} | {spread(own, 4)} | {spread(replayed, 4)} | {spread(ratios, 2)} |")
        for offset, values, colour in ((-0.2, own, "C0"), (0.2, replayed, "C1")):
            label = None if place else "own experts" if offset < 0 else "replayed"
            axis.bar(place + offset, sum(values) / len(values), 0.36, color=colour, label=label)
            axis.plot([place + offset] * len(values), values, "k.", ms=5)
        beside.plot([place] * len(ratios), ratios, "k.", ms=5)
        beside.plot([place - 0.15, place + 0.15], [sum(ratios) / len(ratios)] * 2, color="C1")
    beside.axhline(1, color="grey", linewidth=1, linestyle=":")
    for one in (axis, beside):
        one.set_xticks(range(3), [quantity.replace(", ", "\n") for quantity in QUANTITIES])
    axis.set(ylabel="nats", title="Spread of the ratios (dots: seeds)")
    beside.set(title="Replayed over own; below 1 replay narrows the ratios", ylim=(0, None), xlim=(-0.5, 2.5))
    axis.legend()
    save(figure, arguments.pictures, "experts")


if __name__ == "__main__":
    main()
