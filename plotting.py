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

PANELS = "policy_loss entropy_loss kl_loss reward relative_advantage kl_divergence kl_coef avg_response_length"
TERMS = ("entropy_loss", "kl_loss", "kl_divergence", "kl_coef", "positive_loss")  # 0 or None in a run without the term
SUBSTITUTES = ("entropy", "clip_fraction", "grad_norm", "dead_groups", "ratio_max")  # drawn in place of such a term


def plot_metrics(rows, panels=PANELS, *, constants=None, evaluations=None, title=None, path=None):
    """Draws a run as 4x2 panels, one per metric, and returns the matplotlib Figure.

    rows: the run's training steps as in metrics.jsonl, with None for a number that was not computed. panels: the names
    of eight metrics; a term that the run does not have leaves its panel to another metric. constants: the run's
    constants, {name: value}; some panels draw one as a line. evaluations: [(step, sampled, greedy)], held-out
    accuracies. title: stands above all panels. path: the picture is saved there, if given.
    """
    steps, panels = [row["step"] for row in rows], _without_absent_terms(panels.split(), rows)
    resting = [row["step"] for row in rows if row.get("updates") == 0 and row.get("value_loss") is not None]
    if resting:
        title = f"{title or ''} (the policy rests in steps {resting[0]} to {resting[-1]})".strip()
    figure, axes = _panels(title, panels)
    for name, axis in zip(panels, axes, strict=True):
        values = _column(rows, name)
        if resting:
            axis.axvspan(resting[0] - 0.5, resting[-1] + 0.5, color="0.9", zorder=0, gid="rests")
        if all(value != value for value in values):
            axis.text(0.5, 0.5, "not computed", transform=axis.transAxes, ha="center", va="center", color="0.4")
            axis.set_xlim(0, max(steps, default=1))
            axis.set_yticks([])
            continue
        _line(axis, steps, values, BLUE, LABELS.get(name))
        lines = axis.lines
        if name in BESIDE:
            lines = [*lines, *(BESIDE[name](axis, rows, constants or {}, evaluations) or ())]
        _log_if_spiky(axis, name, values)
        handles, _ = axis.get_legend_handles_labels()
        handles += [line for line in lines if line.axes is not axis]
        if handles:
            axis.legend(handles=handles, fontsize=8, framealpha=0.9)
    return _save(figure, path)


# ---- How a metric is drawn. Any logged metric can be a panel; the tables below hold special cases.

TITLES = {  # metric: (title of the panel, unit of the y axis); another metric has its own name as title
    "policy_loss": ("Policy loss", "loss"),
    "entropy_loss": ("Entropy loss", "loss"),
    "kl_loss": ("KL loss", "loss"),
    "reward": ("Reward", "reward"),
    "accuracy": ("Reward and accuracy", "reward, share right"),
    "relative_advantage": ("Relative advantage, mean size", "reward"),
    "kl_divergence": ("KL divergence to the reference", "nats per token"),
    "kl_coef": ("KL coefficient", "weight"),
    "entropy": ("Entropy of the sampled tokens", "nats per token"),
    "clip_fraction": ("Clip fraction", "share"),
    "value_loss": ("Value loss", "loss"),
    "explained_variance": ("Explained variance of the returns", "share"),
    "positive_loss": ("Loss of right completions", "loss"),
    "ratio_max": ("Greatest importance ratio", "ratio"),
    "rare_gradient": ("Rare tokens", "share"),
    "resampled": ("Prompts resampled", "share of the prompts sampled"),
    "dead_groups": ("Dead groups", "share of the groups"),
    "dead_groups_drawn": ("Dead groups before resampling", "share of the groups"),
    "avg_response_length": ("Response length", "tokens"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
}
LABELS = {
    "reward": "mean of the step",
    "accuracy": "right, of all completions sampled",
    "clip_fraction": "either side",
    "rare_gradient": "share of the gradient",
    "explained_variance": "all tokens",
    "dead_groups_drawn": "measured",
    "avg_response_length": "response length",
}


def _beside_reward(axis, rows, _, evaluations):
    rewards, spread = _column(rows, "reward"), _column(rows, "reward_std")
    low, high = ([r + sign * s for r, s in zip(rewards, spread, strict=True)] for sign in (-1, 1))
    steps = [row["step"] for row in rows]
    axis.fill_between(steps, low, high, color=BLUE, alpha=0.15, linewidth=0, label="± one standard deviation")
    _evaluations(axis, evaluations)


def _beside_accuracy(axis, rows, _, evaluations):
    _line(axis, [row["step"] for row in rows], _column(rows, "reward"), SKY, "reward of the batch")
    _evaluations(axis, evaluations)


def _beside_kl(axis, _, constants, __):
    if constants.get("ADAPTIVE_KL"):
        target = constants["TARGET_KL"]
        axis.axhline(target, color=BLACK, linestyle=":", label=f"target {target:g}")


def _beside_clip(axis, rows, _, __):
    for side, colour in (("low", SKY), ("high", ORANGE)):
        if f"clip_fraction_{side}" in rows[0]:
            _line(axis, [row["step"] for row in rows], _column(rows, f"clip_fraction_{side}"), colour, side)


def _beside_rare(axis, rows, _, __):
    _line(axis, [row["step"] for row in rows], _column(rows, "rare_tokens"), SKY, "share of tokens")


def _beside_explained(axis, rows, _, __):
    last = _column(rows, "explained_variance_last")
    _line(axis, [row["step"] for row in rows], last, SKY, "last tokens")
    axis.set_ylim(bottom=max(-1, axis.get_ylim()[0]))


def _beside_dead_groups(axis, rows, constants, _):
    size = constants.get("GROUP_SIZE", 8)
    expected = [p**size + (1 - p) ** size for p in _column(rows, "accuracy")]
    label = "expected if all prompts were alike: $p^G+(1-p)^G$"
    _line(axis, [row["step"] for row in rows], expected, BLACK, label, ":")
    axis.set_ylim(-0.05, 1.05)


def _as_share(axis, *_):
    axis.set_ylim(-0.05, 1.05)


def _beside_length(axis, rows, _, __):
    """Draws the share of truncated completions on a second axis at the right, and returns its lines."""
    beside = axis.twinx()
    _line(beside, [row["step"] for row in rows], _column(rows, "truncated"), VERMILION, "truncated")
    beside.set_ylim(-0.05, 1.05)
    beside.set_ylabel("share truncated")
    beside.spines["top"].set_visible(False)
    return beside.lines


BESIDE = {
    "reward": _beside_reward,
    "accuracy": _beside_accuracy,
    "kl_divergence": _beside_kl,
    "clip_fraction": _beside_clip,
    "rare_gradient": _beside_rare,
    "explained_variance": _beside_explained,
    "resampled": _as_share,
    "dead_groups": _as_share,
    "dead_groups_drawn": _beside_dead_groups,
    "avg_response_length": _beside_length,
}


# ---- Runs


def compare_runs(folders, path=None):
    """Overlays several runs in the panels of the first one, and returns the Figure. It has a legend.

    In the panel of the reward, dots show held-out accuracy.
    """
    runs = [load_metrics(folder) for folder in folders]
    panels = constants_of(folders[0]).get("PANELS", PANELS).split()
    panels = _without_absent_terms(panels, [row for steps, _ in runs for row in steps])
    figure, axes = _panels("Comparison", panels)
    for number, (folder, (steps, evaluations)) in enumerate(zip(folders, runs, strict=True)):
        colour, style = RUN_COLOURS[number % len(RUN_COLOURS)], ("-", "--", ":")[number // len(RUN_COLOURS) % 3]
        for name, axis in zip(panels, axes, strict=True):
            _line(axis, [row["step"] for row in steps], _column(steps, name), colour, Path(folder).name, style)
            if name in ("reward", "accuracy"):
                axis.plot([e[0] for e in evaluations], [e[1] for e in evaluations], "o", color=colour)
                axis.set_title(f"{TITLES[name][0]} (line) and held-out accuracy, sampled (dots)")
    for name, axis in zip(panels, axes, strict=True):
        _log_if_spiky(axis, name, [value for line in axis.lines if any(line.get_ydata()) for value in line.get_ydata()])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(folders)))
    return _save(figure, path)


def draw_run(folder):
    """Redraws a run's metrics.png from its metrics.jsonl, and returns the picture's path."""
    steps, evaluations = load_metrics(folder)
    constants, folder = constants_of(folder), Path(folder)
    of_run = {"constants": constants, "evaluations": evaluations, "title": folder.resolve().name}
    plot_metrics(steps, constants.get("PANELS", PANELS), **of_run, path=folder / "metrics.png")
    return folder / "metrics.png"


def constants_of(folder):
    """Returns a run's constants from its config.json, or {} if there is none."""
    path = Path(folder) / "config.json"
    return json.loads(path.read_text(encoding="utf-8"))["constants"] if path.is_file() else {}


def load_metrics(folder):
    """Returns the training steps in a run's metrics.jsonl, and its evaluations as (step, sampled, greedy).

    Raises InputError with the line's number if a line cannot be read.
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


def _without_absent_terms(panels, rows):
    """Returns the names of a picture's panels, with SUBSTITUTES in place of the TERMS that its runs do not have.

    panels: names of metrics. rows: the steps of all runs in the picture.
    """
    logged = [name for name in SUBSTITUTES if name not in panels and any(row.get(name) is not None for row in rows)]
    absent = [name for name in panels if name in TERMS and not any(row.get(name) for row in rows)]
    in_place_of = dict(zip(absent, logged, strict=False))
    return [in_place_of.get(name, name) for name in panels]


def _panels(title, panels):
    figure = Figure(figsize=(12, 14), layout="constrained")
    axes = figure.subplots(4, 2).flatten()
    for name, axis in zip(panels, axes, strict=True):
        heading, unit = TITLES.get(name, (name, "value"))
        axis.set_title(heading)
        axis.set_xlabel("training step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    return figure, axes


def _column(rows, name):
    """Returns a metric of all steps. A value that was not computed is NaN, which is not drawn."""
    return [float("nan") if row.get(name) is None else row[name] for row in rows]


def _line(axis, steps, values, colour, label, style="-"):
    axis.plot(steps, values, style, color=colour, linewidth=1.5, label=label, marker="." if len(steps) < 3 else None)


def _evaluations(axis, evaluations):
    if evaluations:
        at, sampled, greedy = zip(*evaluations, strict=True)
        axis.plot(at, sampled, "o-", color=VERMILION, label="held-out accuracy, sampled")
        axis.plot(at, greedy, "s--", color=GREEN, label="held-out accuracy, greedy")


def _log_if_spiky(axis, key, values):
    """Sets a log scale for a KL panel if one rare token makes a spike that would flatten the rest."""
    values = [value for value in values if value == value]  # leaves out NaN: some runs have no KL
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
