"""Prints a run: its progress bar or a line per step, warnings about what does not act or does harm, and the summary."""

import sys
from math import hypot
from statistics import mean

from tqdm import tqdm

from bookkeeping.evaluation import wilson_interval
from bookkeeping.metrics import idle_clip

IDLE_STEPS = 10  # steps without any clipping, or without any signal, before there is a warning


class Progress:
    """The progress bar of a run. Without a terminal, as in a batch system's log, each step is a line instead."""

    def __init__(self, constants):
        self.algorithm, self.steps, self.resting = constants.algorithm, constants.MAX_STEPS, constants.resting_steps
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, desc=self.algorithm, unit="step", dynamic_ncols=True, disable=hidden)

    def move_to(self, step):
        self.bar.update(step - self.bar.n)

    def show(self, history):
        """Shows the latest step, and the accuracy of the latest evaluation."""
        metrics, evaluated = history[-1], next(row for row in reversed(history) if "eval_accuracy" in row)
        kl, length = metrics["kl_divergence"], metrics["avg_response_length"]
        numbers = "the policy rests, " if metrics["step"] <= self.resting else ""
        numbers += f"reward {metrics['reward']:.2f}, accuracy {evaluated['eval_accuracy']:.2f}, "
        numbers += f"length {length:.0f}, " if kl is None else f"KL {kl:.3f}, "
        numbers += f"clipped {metrics['clip_fraction'] or 0:.0%}, {metrics['tokens_per_second']:.0f} tokens/s"
        self.move_to(metrics["step"])
        self.bar.set_postfix_str(numbers)
        if self.bar.disable:
            print(f"{self.algorithm} step {metrics['step']}/{self.steps}: {numbers}", flush=True)

    def close(self):
        self.bar.close()


def warn_about_learning_rate(constants, policy):
    """Warns if LEARNING_RATE is far too high for a policy of this size, or far too low for adapters.

    Adapters want about 1e-4 at any size, ten times what all weights of a chat model do.
    """
    weights = sum(parameter.numel() for parameter in policy.parameters())
    usual = max(1e3 / weights, 1e-6)  # 7e-6 for 135 M weights, 2e-6 for 0.6 B
    if constants.LORA_RANK == 0 and constants.LEARNING_RATE > 10 * usual:
        too_high = f"LEARNING_RATE = {constants.LEARNING_RATE:g} is far too high for {weights / 1e6:.1f} M weights"
        print(f"Warning: {too_high}, and may undo what they have learned; give about --learning-rate {usual:.0e}")
    elif constants.LORA_RANK > 0 and constants.LEARNING_RATE < 2e-5:
        too_low = f"LEARNING_RATE = {constants.LEARNING_RATE:g} is for all weights, and adapters hardly learn at it"
        print(f"Warning: {too_low}; give about --learning-rate 1e-4")


def say_if_accuracy_fell(history, prompts, files):
    """Warns if held-out accuracy is less than half of the best one before, and if that can hardly be chance.

    Chance is the 95 % interval of the difference of two shares, from Wilson's of each (Newcombe 1998). prompts: how
    many are held out. files: the RunFolder.
    """
    *before, now = (row for row in history if "eval_accuracy" in row)
    best = max(before, key=lambda row: row["eval_accuracy"], default=now)
    accuracy, most = now["eval_accuracy"], best["eval_accuracy"]
    chance = hypot(most - wilson_interval(most, prompts)[0], wilson_interval(accuracy, prompts)[1] - accuracy)
    if accuracy >= most / 2 or most - accuracy <= chance:
        files.well_again("accuracy")
    else:
        fell = f"{most:.3f} after step {best['step']} to {accuracy:.3f} after step {now['step']}"
        path = files.path / "checkpoints" / f"step-{best['step']}"
        remedy = "start a new run with a lower --learning-rate"
        remedy += f"; {path} holds the best weights" if path.is_dir() else ""
        files.complain("accuracy", f"held-out accuracy fell from {fell}; {remedy}")


def say_what_does_not_act(step, history, constants, files):
    """Warns if all rewards of every group are equal, if a critic explains nothing, and if the clip is too wide to act.

    files: the RunFolder.
    """
    latest = [row.get("dead_groups") for row in history[1:]][-IDLE_STEPS:]
    if latest[-1] != 1:
        files.well_again("signal")
    if latest == [1] * IDLE_STEPS:
        files.complain(
            "signal",
            f"in {IDLE_STEPS} steps no group had a signal: all completions of each got the same reward, so that "
            "there is nothing to prefer; look at samples.html, and change --rewards, the prompts or --temperature",
        )
    explained = [row.get("explained_variance") for row in history[1:] if row["updates"]][-IDLE_STEPS:]
    if len(explained) < IDLE_STEPS or any(share is None or share >= 0 for share in explained):
        files.well_again("critic")
    else:
        flag = "--" + constants.policy_rests.lower().replace("_", "-")
        files.complain(
            "critic",
            f"in {IDLE_STEPS} steps the critic's explained variance was below 0, so its values are worse than their "
            f"mean; lower --critic-learning-rate, or raise {flag}",
        )
    first = constants.resting_steps + IDLE_STEPS
    if latest != [1] * IDLE_STEPS and step == first and (ratios := idle_clip(history)):
        tqdm.write(
            f"Warning: in {step} steps the ratio stayed in [{ratios[0]:.6f}, {ratios[1]:.6f}] and the clip never "
            f"acted; lower CLIP_LOW = {constants.CLIP_LOW:g} and CLIP_HIGH = {constants.CLIP_HIGH:g}"
        )


def say_what_looks_wrong(history, constants, files):
    """Warns of noise in the ratio or between sampler and trainer, of cut or dead completions, and of a rising entropy.

    Each is said once in a run. files: the RunFolder.
    """
    rows = history[1:]
    now, latest = rows[-1], rows[-IDLE_STEPS:]
    clip = min(constants.CLIP_LOW, constants.CLIP_HIGH)
    first = now["first_ratio_min"], now["first_ratio_max"]
    noise = 0.0 if None in first else max(1 - first[0], first[1] - 1)
    cut, dead = (min(row[name] for row in latest) for name in ("truncated", "dead_groups"))
    lasts = len(latest) == IDLE_STEPS
    wrong = {
        "noise": noise > clip / 2
        and f"before the first update of step {now['step']} ratios were off by {noise:.1e}, more than half of the clip "
        f"at {clip:g}, and nothing was learned yet; set a wider --clip-low and --clip-high, or see docs/numerics.md",
        "gap": now["sampler_gap"] > 0.1
        and f"in step {now['step']} the sampler's log-probs were {now['sampler_gap']:.2f} nats per token off the "
        "trainer's, so that it samples from another policy; --selftest tells which completions differ",
        "truncated": lasts
        and cut > 0.5
        and f"in {IDLE_STEPS} steps more than half of the completions were cut at MAX_COMPLETION_TOKENS = "
        f"{constants.MAX_COMPLETION_TOKENS}, before their answer; raise --max-completion-tokens",
        "dead": lasts
        and 0.9 < dead < 1
        and f"in {IDLE_STEPS} steps more than 90 % of the groups had equal rewards and taught nothing; give prompts of "
        "medium difficulty, or a larger --group-size, or train with dapo.py",
        "entropy": now["entropy"] > 2 * rows[0]["entropy"]
        and f"entropy rose from {rows[0]['entropy']:.2f} in step 1 to {now['entropy']:.2f} nats per token in step "
        f"{now['step']}, as it does before a collapse; lower --learning-rate"
        + (" or --entropy-coef" if constants.ENTROPY_COEF > 0 else ""),
    }
    for topic, message in wrong.items():
        if message:
            files.complain(topic, message)


def print_summary(history, seconds, rows, texts_before, texts_after, folder):
    """Prints held-out accuracy and the first completions, before and after training.

    It also prints whether most groups were dead at the end, the time that each part of the run and each phase of its
    steps took, and the paths of the model and the pictures. seconds: {part: its wall time}.
    """
    evaluations = [metrics for metrics in history if "eval_accuracy" in metrics]
    before, after = evaluations[0], evaluations[-1]
    for name, how in (("eval_accuracy", "sampled"), ("eval_accuracy_greedy", "greedy")):
        print(f"Held-out accuracy, {how}: {before[name]:.3f} before, {after[name]:.3f} after")
    for row, old, new in zip(rows, texts_before, texts_after, strict=False):
        prompt, answer = in_brief(row["messages"][-1]["content"]), in_brief(row["answer"])
        print(f"  {prompt!r} (answer {answer})\n    before {old!r}\n    after  {new!r}")
    steps = history[1:]
    quarter = steps[-max(1, len(steps) // 4) :]
    if (dead := mean(row.get("dead_groups", 0) for row in quarter)) > 0.5:
        remedy = f"give {'harder' if after['eval_accuracy'] > 0.5 else 'easier'} prompts, or train with dapo.py"
        where = f"of the groups in the last {len(quarter)} of {len(steps)} steps had equal rewards, and taught nothing"
        print(f"Dead:    {dead:.0%} {where}; {remedy}, which samples until each group has a signal")
    names = [name for name in history[-1] if name.startswith("seconds_")]
    of_steps = {name.removeprefix("seconds_"): sum(row.get(name, 0.0) for row in history) for name in names}
    print(f"Time:    {sum(seconds.values()):.0f} s after loading: {in_shares(seconds)}")
    print(f"Steps:   {sum(of_steps.values()):.0f} s in {len(steps)} steps: {in_shares(of_steps)}")
    print(f"Model:   {folder / 'final'}")
    if (folder / "final-critic").is_dir():
        print(f"Critic:  {folder / 'final-critic'}")
    print(f"Picture: {folder / 'metrics.png'}")
    print(f"Samples: {folder / 'samples.html'}")


def in_shares(seconds):
    return ", ".join(f"{name} {value / sum(seconds.values()):.0%}" for name, value in seconds.items())


def in_brief(text, most=80):
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."
