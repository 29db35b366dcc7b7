"""The noise of the ratio: how far π_old is from the π of an update, before anything was learned.

    python benchmarks/numerics.py                                       the embedded task and gspo.py
    python benchmarks/numerics.py --script grpo.py --flags "--preset gsm8k"
    python benchmarks/numerics.py --flags "--policy-model MODEL --max-completion-tokens 512"      your own

It samples the completions of a step, and computes log π as the step's first updates would. Then it compares log π_old
from three places: the sampler; a pass over all completions, whose micro-batches are others than the updates'; and the
updates' own micro-batches, as the scripts do it. Products are taken in bfloat16, as on a GPU, and in float32; with
bfloat16, the head's logits are also rounded to it, as plain autocast would.

A row has the standard deviation σ of log π/π_old of tokens, its most, and the share of tokens whose ratio is
outside 0.9 to 1.1; of sequences the standard deviation of their mean, log s; and the share of sequences that a clip of
GSPO's paper, 3e-4 and 4e-4, and the script's own would cut. All of that is noise, and should be far below the clip.
"""

import argparse
import contextlib
import importlib
import io
import shlex
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from engine import packing, vocabulary

PAPER = 3e-4, 4e-4


def precision(script, trainer, dtype, rounded):
    """Lets products take a dtype, by its name. Returns a context in which the head's logits may be rounded."""
    script.COMPUTE_DTYPE = trainer.sampler.compute_dtype = dtype
    logits_of = vocabulary.logits_of
    rounding = lambda *a: logits_of(*a).bfloat16().float()  # noqa: E731
    return mock.patch.object(vocabulary, "logits_of", rounding) if rounded else contextlib.nullcontext()


def in_updates(trainer, script, rollouts, grad):
    """Returns log π in the micro-batches of the first updates, (B, T), with or without what a backward pass needs."""
    logps = torch.zeros(rollouts.completion_mask.shape)
    for rows in trainer.mini_batches(rollouts, 1, epoch=0):
        batch = rollouts.select(rows)
        for part in packing.micro_batches(batch, script.MICRO_BATCH_TOKENS):
            with torch.set_grad_enabled(grad):
                logps[rows[part]] = script.completion_logps(trainer.policy, batch.select(part))[0].detach().cpu()
    return logps


def noise(script, logps, old_logps, mask):
    """Returns the numbers of a row."""
    log_ratio = (logps - old_logps).double().masked_fill(~mask, 0.0)
    tokens, sequences = log_ratio[mask], log_ratio.sum(1) / mask.sum(1)
    ratio, s = tokens.exp(), sequences.exp()

    def cut(low, high):
        return ((s < 1 - low) | (s > 1 + high)).double().mean()

    outside = ((ratio < 0.9) | (ratio > 1.1)).double().mean()
    own = cut(script.CLIP_LOW, script.CLIP_HIGH) if hasattr(script, "CLIP_LOW") else torch.tensor(float("nan"))
    spread, of_sequences = (x.square().mean().sqrt() for x in (tokens, sequences))
    return [x.item() for x in (spread, tokens.abs().max(), outside, of_sequences, cut(*PAPER), own)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="gspo.py")
    parser.add_argument("--flags", type=shlex.split, default=[], help="flags of the script, in one string")
    arguments = parser.parse_args()
    script = importlib.import_module(Path(arguments.script).stem)
    with configs.one_line_errors(), contextlib.redirect_stdout(io.StringIO()):
        configs.apply_overrides(vars(script), arguments.flags)
        trainer = next(cls for name, cls in vars(script).items() if name.endswith("Trainer"))()
    print(
        "| products | logits | π_old from | σ of a token | greatest | outside 0.9–1.1 | σ of log s | cut: paper | own |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype, rounded in (("bfloat16", True), ("bfloat16", False), ("float32", False)):
        with precision(script, trainer, dtype, rounded):
            rows = script.prompts_of_step(trainer.train_rows, 1, script.BATCH_SIZE, script.generator_of)
            rollouts = trainer.sample(rows, script.GROUP_SIZE, ("rollout", 1))
            logps, mask = in_updates(trainer, script, rollouts, grad=True), rollouts.completion_mask
            places = {
                "the sampler": rollouts.sampled_logps,
                "other batches": trainer.compute_log_probs(trainer.policy, rollouts).cpu(),
                "the updates' batches": in_updates(trainer, script, rollouts, grad=False),
            }
        kinds = dtype, "bfloat16" if rounded else "float32"
        for place, old_logps in places.items():
            spread, most, outside, of_sequences, paper, own = noise(script, logps, old_logps, mask)
            print(
                f"| {kinds[0]} | {kinds[1]} | {place} | {spread:.1e} | {most:.1e} | {outside:.1%} | "
                f"{of_sequences:.1e} | {paper:.0%} | {own:.0%} |"
            )
    lengths = rollouts.completion_lengths.double()
    print(f"\n{len(lengths)} completions of {lengths.mean():.0f} tokens; {torch.get_num_threads()} threads, ", end="")
    print(torch.cuda.get_device_name() if trainer.policy.device.type == "cuda" else "CPU")


if __name__ == "__main__":
    main()
