"""Pictures of runs, from their metrics.jsonl.

python plotting.py outputs/<run>                     redraws outputs/<run>/metrics.png
python plotting.py outputs/<run A> outputs/<run B>   overlays runs in comparison.png
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from configs import InputError, one_line_errors

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)

# The eight panels of a figure, row by row: key in metrics.jsonl, title, unit on the y axis.
PANELS = (
    ("policy_loss", "Policy loss", "loss"),
    ("entropy_loss", "Entropy loss", "loss"),
    ("kl_loss", "KL loss", "loss"),
    ("reward", "Reward", "reward"),
    ("relative_advantage", "Relative advantage, mean size", "reward"),
    ("kl_divergence", "KL divergence to the reference", "nats per token"),
    ("kl_coef", "KL coefficient", "weight"),
    ("avg_response_length", "Response length", "tokens"),
)
DAPO_PANELS = (
    ("policy_loss", "Policy loss", "loss"),
    ("accuracy", "Reward and accuracy", "reward, share right"),
    ("entropy", "Entropy of the sampled tokens", "nats per token"),
    ("clip_fraction", "Clip fraction", "share of tokens"),
    ("resampled", "Prompts resampled", "share of the prompts sampled"),
    ("dead_groups_drawn", "Dead groups before resampling", "share of the groups"),
    ("avg_response_length", "Response length", "tokens"),
    ("grad_norm", "Gradient norm, before clipping", "norm"),
)


def plot_gspo_metrics(
    policy_losses,
    entropy_losses,
    kl_losses,
    rewards,
    relative_advantages,
    kl_divergences,
    kl_coefs,
    avg_response_lengths,
    *,
    steps=None,
    reward_stds=None,
    target_kl=None,
    evaluations=None,
    title=None,
    path=None,
):
    """Draws a run as 4x2 panels and returns the matplotlib Figure.

    The eight lists hold one number per training step; None where nothing was computed.
    steps: their numbers, from 1 if not given. reward_stds: a band around the reward. target_kl: a line in the KL panel,
    nats per token. evaluations: [(step, sampled, greedy)], held-out accuracies in the reward panel.
    title: above all. path: where the picture is saved, if given.
    """
    series = (
        policy_losses, entropy_losses, kl_losses, rewards,
        relative_advantages, kl_divergences, kl_coefs, avg_response_lengths,
    )  # fmt: skip
    steps = list(range(1, len(policy_losses) + 1)) if steps is None else steps
    figure, axes = _panels(title)
    for (key, _, _), values, axis in zip(PANELS, series, axes, strict=True):
        if all(value is None for value in values):
            axis.text(0.5, 0.5, "not computed", transform=axis.transAxes, ha="center", va="center", color="0.4")
            axis.set_xlim(0, max(steps, default=1))
            axis.set_yticks([])
            continue
        values = [float("nan") if value is None else value for value in values]
        _line(axis, steps, values, BLUE, "mean of the step" if key == "reward" else None)
        if key == "reward" and reward_stds:
            low, high = zip(*[(r - s, r + s) for r, s in zip(values, reward_stds, strict=True)], strict=True)
            axis.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± one standard deviation")
        if key == "reward":
            _evaluations(axis, evaluations)
        if key == "kl_divergence" and target_kl is not None:
            axis.axhline(target_kl, color=BLACK, linestyle=":", label=f"target {target_kl:g}")
        _log_if_spiky(axis, key, values)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.9)
    return _save(figure, path)


def plot_dapo_metrics(rows, *, group_size, evaluations=None, title=None, path=None):
    """Draws a run of dapo.py as 4x2 panels and returns the matplotlib Figure.

    rows: its training steps as metrics.jsonl has them. group_size: G of the dead groups' expectation p^G + (1 − p)^G,
    where p is the share of the step's completions that are right. evaluations, title, path: as in plot_gspo_metrics.
    """
    steps = [row["step"] for row in rows]
    keys = set().union(*rows)
    columns = {key: [float("nan") if row.get(key) is None else row[key] for row in rows] for key in keys}
    figure, axes = _panels(title, DAPO_PANELS)
    axes = {key: axis for (key, _, _), axis in zip(DAPO_PANELS, axes, strict=True)}
    for key, colour, label in (
        ("policy_loss", BLUE, None),
        ("entropy", BLUE, None),
        ("resampled", BLUE, None),
        ("grad_norm", BLUE, None),
        ("accuracy", SKY, "right, of all completions sampled"),
        ("dead_groups_drawn", BLUE, "measured"),
        ("avg_response_length", BLUE, "response length"),
    ):
        _line(axes[key], steps, columns[key], colour, label)
    _line(axes["accuracy"], steps, columns["reward"], BLUE, "reward of the batch")
    _evaluations(axes["accuracy"], evaluations)
    for key, colour in (("clip_fraction_low", BLUE), ("clip_fraction_high", ORANGE)):
        _line(axes["clip_fraction"], steps, columns.get(key, [float("nan")] * len(rows)), colour, key[14:])
    expected = [p**group_size + (1 - p) ** group_size for p in columns["accuracy"]]
    _line(axes["dead_groups_drawn"], steps, expected, BLACK, "expected if all prompts were alike: $p^G+(1-p)^G$", ":")
    for key in ("resampled", "dead_groups_drawn"):
        axes[key].set_ylim(-0.05, 1.05)
    beside = axes["avg_response_length"].twinx()
    _line(beside, steps, columns["truncated"], VERMILION, "truncated")
    beside.set_ylim(-0.05, 1.05)
    beside.set_ylabel("share truncated")
    beside.spines["top"].set_visible(False)
    for axis in axes.values():
        lines = [*axis.lines, *beside.lines] if axis is axes["avg_response_length"] else axis.lines
        if named := [line for line in lines if not line.get_label().startswith("_")]:
            axis.legend(handles=named, fontsize=8, framealpha=0.9)
    return _save(figure, path)


def compare_runs(folders, path=None):
    """Overlays the eight panels of several runs, with a legend; the reward panel adds held-out accuracy as dots."""
    figure, axes = _panels("Comparison")
    for number, folder in enumerate(folders):
        steps, evaluations = load_metrics(folder)
        colour, style = RUN_COLOURS[number % len(RUN_COLOURS)], ("-", "--", ":")[number // len(RUN_COLOURS) % 3]
        for (key, _, _), axis in zip(PANELS, axes, strict=True):
            values = [float("nan") if row[key] is None else row[key] for row in steps]
            _line(axis, [row["step"] for row in steps], values, colour, Path(folder).name, style)
            if key == "reward":
                axis.plot([e[0] for e in evaluations], [e[1] for e in evaluations], "o", color=colour)
    for (key, _, _), axis in zip(PANELS, axes, strict=True):
        _log_if_spiky(axis, key, [value for line in axis.lines if any(line.get_ydata()) for value in line.get_ydata()])
    axes[3].set_title("Reward (line) and held-out accuracy, sampled (dots)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(folders)))
    return _save(figure, path)


def draw_run(folder):
    """Redraws a run's metrics.png from its metrics.jsonl; returns the picture's path."""
    steps, evaluations = load_metrics(folder)
    folder, constants = Path(folder), {}
    if (folder / "config.json").is_file():
        constants = json.loads((folder / "config.json").read_text(encoding="utf-8"))["constants"]
    if all(key in steps[0] for key, _, _ in DAPO_PANELS):
        plot_dapo_metrics(
            steps,
            group_size=constants.get("GROUP_SIZE", 8),
            evaluations=evaluations,
            title=folder.resolve().name,
            path=folder / "metrics.png",
        )
        return folder / "metrics.png"
    columns = [[row[key] for row in steps] for key, _, _ in PANELS]
    plot_gspo_metrics(
        *columns,
        steps=[row["step"] for row in steps],
        reward_stds=[row["reward_std"] for row in steps],
        target_kl=constants.get("TARGET_KL") if constants.get("ADAPTIVE_KL") else None,
        evaluations=evaluations,
        title=folder.resolve().name,
        path=folder / "metrics.png",
    )
    return folder / "metrics.png"


def load_metrics(folder):
    """A run's metrics.jsonl: its training steps, and its evaluations as (step, sampled, greedy).

    Raises InputError, with the line's number, where it cannot be read.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no metrics.jsonl there; give the folder of a run, such as outputs/gspo-<time>")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["step"], row)[1])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: not a row of metrics; remove the line and draw again") from None
    steps = [row for row in rows if "policy_loss" in row]
    if not steps:
        raise InputError(f"{path}: no training step yet; draw again after the first")
    evaluations = [(r["step"], r["eval_accuracy"], r["eval_accuracy_greedy"]) for r in rows if "eval_accuracy" in r]
    return steps, evaluations


def _panels(title, panels=PANELS):
    figure = Figure(figsize=(12, 14), layout="constrained")
    axes = figure.subplots(4, 2).flatten()
    for (_, name, unit), axis in zip(panels, axes, strict=True):
        axis.set_title(name)
        axis.set_xlabel("training step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    return figure, axes


def _line(axis, steps, values, colour, label, style="-"):
    axis.plot(steps, values, style, color=colour, linewidth=1.5, label=label, marker="." if len(steps) < 3 else None)


def _evaluations(axis, evaluations):
    if evaluations:
        at, sampled, greedy = zip(*evaluations, strict=True)
        axis.plot(at, sampled, "o-", color=VERMILION, label="held-out accuracy, sampled")
        axis.plot(at, greedy, "s--", color=GREEN, label="held-out accuracy, greedy")


def _log_if_spiky(axis, key, values):
    """A log scale for a KL panel where one rare token makes a spike that would flatten the rest."""
    values = [value for value in values if value == value]  # without NaN, of runs that have no KL
    if key.startswith("kl") and values and min(values) > 0 and max(values) > 20 * median(values):
        axis.set_yscale("log")


def _save(figure, path):
    if path is not None:
        beside = Path(path).with_stem(Path(path).stem + ".part")
        figure.savefig(beside, dpi=100)
        os.replace(beside, path)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws a run's metrics, or several runs overlaid.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as outputs/gspo-<time>")
    parser.add_argument("--output", type=Path, help="picture of several runs (default: comparison.png)")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if len(arguments.runs) == 1:
            print(draw_run(arguments.runs[0]))
        else:
            path = arguments.output or Path("comparison.png")
            compare_runs(arguments.runs, path)
            print(path)


if __name__ == "__main__":
    main()
