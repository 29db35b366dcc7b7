"""How the time of grpo.py's step grows with group size, completion length, batch size and model size.

    python benchmarks/scaling.py                 on two cores a few minutes; draws docs/scaling.png, prints a table
    python benchmarks/scaling.py --seconds 10    more steps for each point

The models are random and made on the spot (4 layers, vocabulary of 2,048). Their end never comes, so all completions
have the same length. One constant varies at a time, and the others stay as in BASE. All points are measured in two
sweeps, up and down, each with a first step that warms up. A point is its fastest step, because a busy machine can only
make a step slower. The exponent is the slope of a straight line through a plot's points on log scales. An exponent of 1
means time in proportion. The last exponent is that between the two largest points, at which fixed costs count least.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from workloads import ROOT, SAME, grpo, make_model, parameters_of_layers

VOCABULARY = 2048
BASE = {"GROUP_SIZE": 8, "MAX_COMPLETION_TOKENS": 32, "BATCH_SIZE": 4, "width": 128}
AXES = {
    "GROUP_SIZE": ("group size, completions per prompt", (2, 4, 8, 16, 32)),
    "MAX_COMPLETION_TOKENS": ("completion length, tokens", (16, 32, 64, 128, 256)),
    "BATCH_SIZE": ("batch size, prompts per step", (1, 2, 4, 8, 16)),
    "width": ("model size, weights of matrices", (64, 128, 256, 512)),
}
MOST_STEPS = 8  # per point, with the first one
PHASES = ("rollout", "reward", "logps", "update")


def sizes(width):
    return {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }


def measure(folder, point, seconds):
    """Returns the seconds of the fastest step and of its phases, and the number of weights in matrices."""
    made = Path(folder) / str(point["width"])
    if not made.is_dir():
        make_model(made, sizes(point["width"]), 0, 1)
    constants = {name: value for name, value in point.items() if name != "width"}
    prompts = str(made / "prompts.jsonl")
    vars(grpo).update(SAME | constants | {"POLICY_MODEL": str(made), "PROMPTS": prompts, "EVAL_PROMPTS": prompts})
    vars(grpo).update(REWARDS="length", LEARNING_RATE=1e-6, WARMUP_STEPS=0, MAX_STEPS=MOST_STEPS)
    trainer, rows, began = grpo.GRPOTrainer(), [], time.perf_counter()
    for step in range(1, MOST_STEPS + 1):
        if len(rows) > 1 and time.perf_counter() - began > seconds:
            break
        start = time.perf_counter()
        metrics = trainer.train_step(step)
        rows.append((time.perf_counter() - start, *(metrics[f"seconds_{phase}"] for phase in PHASES)))
        tokens = point["BATCH_SIZE"] * point["GROUP_SIZE"] * point["MAX_COMPLETION_TOKENS"]
        assert metrics["completion_tokens"] == tokens, "a completion ended"
    weights = parameters_of_layers(trainer.policy) + trainer.policy.get_output_embeddings().weight.numel()
    return min(rows[1:]), weights


def slope(x, y):
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(curves, path):
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, (name, (label, _)), (x, y) in zip(figure.subplots(2, 2).flat, AXES.items(), curves, strict=True):
        exponent = slope(x, y)
        centre = math.exp(np.log(y).mean() - exponent * np.log(x).mean())
        axis.loglog(x, y, "o", color="#0072B2", label="fastest step")
        axis.loglog(x, centre * np.array(x) ** exponent, color="#0072B2", linewidth=1, label=f"exponent {exponent:.2f}")
        axis.loglog(x, y[-1] * np.array(x) / x[-1], ":", color="0.5", linewidth=1, label="in proportion")
        ticks = [f"{value / 1e6:.2g} M" for value in x] if name == "width" else [str(value) for value in x]
        axis.set_xticks(x, ticks)
        axis.minorticks_off()
        lowest, highest = min(y) / 1.5, max(y) * 1.5
        marks = [m * 10.0**e for e in range(-3, 4) for m in (1, 2, 5) if lowest <= m * 10.0**e <= highest]
        axis.set_yticks(marks, [f"{mark:g}" for mark in marks])
        axis.set(xlabel=label, ylabel="seconds per step", ylim=(lowest, highest))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper left", fontsize=8)
    figure.suptitle("grpo.py: time of a training step, one constant varied at a time")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="for each point and sweep; at least two steps")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "scaling.png")
    arguments = parser.parse_args()
    points = {tuple((BASE | {name: value}).items()) for name, (_, values) in AXES.items() for value in values}
    found, curves = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for point in [*sorted(points), *sorted(points, reverse=True)]:
            found[point] = min(measure(folder, dict(point), arguments.seconds), found.get(point, ((math.inf,), 0)))
            print(f"{dict(point)}: {found[point][0][0]:.3f} s per step", flush=True)
    print(
        "\n| varied | value | s/step | "
        + " | ".join(f"{phase} s" for phase in PHASES)
        + " |\n|---|---|---|---|---|---|---|"
    )
    for name, (label, values) in AXES.items():
        rows = [found[tuple((BASE | {name: value}).items())] for value in values]
        x = [weights for _, weights in rows] if name == "width" else list(values)
        curves.append((x, [seconds for (seconds, *_), _ in rows]))
        for value, (seconds, _) in zip(x, rows, strict=True):
            print(f"| {label} | {value} | " + " | ".join(f"{one:.3f}" for one in seconds) + " |")
    print("\n| varied | exponent | the last one |\n|---|---|---|")
    for (label, _), (x, y) in zip(AXES.values(), curves, strict=True):
        print(f"| {label} | {slope(x, y):.2f} | {slope(x[-2:], y[-2:]):.2f} |")
    draw(curves, arguments.picture)
    print(f"\n{arguments.picture}")


if __name__ == "__main__":
    main()
