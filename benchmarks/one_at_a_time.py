"""A training step of gspo.py beside the same work done one response at a time, as most tutorials do it.

    python benchmarks/one_at_a_time.py
    python benchmarks/one_at_a_time.py --rounds 1 --flags "--preset smollm2"

Both ways have the same policy, prompts, group size and updates, and take turns in one run. "One at a time" means one
call of `generate()` for each response. Then each response goes alone through the reward, reference and policy models,
forward and backward. It prints medians over the rounds, and the median of the ratios.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
import gspo
from engine.sampling import assemble


class OneAtATime(gspo.GSPOTrainer):
    def generate_responses_with_group_sampling(self, step):
        torch.manual_seed(step)
        rows, completions = gspo.prompts_of_step(self.train_rows, step, gspo.BATCH_SIZE, gspo.generator_of), []
        for row in rows:
            for _ in range(gspo.GROUP_SIZE):
                ids = torch.tensor([row["prompt_ids"]], device=self.policy_device)
                output = self.policy.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=gspo.MAX_COMPLETION_TOKENS,
                    do_sample=True,
                    top_k=0,
                    temperature=gspo.TEMPERATURE,
                    eos_token_id=self.eos_ids,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                completions.append(output[0, ids.shape[1] :].cpu())
        lengths = torch.tensor([len(ids) for ids in completions])
        padded = torch.nn.utils.rnn.pad_sequence(completions, True, self.tokenizer.pad_token_id)
        truncated = torch.tensor([int(ids[-1]) not in self.eos_ids for ids in completions])
        no_logps = torch.zeros(padded.shape)
        return assemble(self.tokenizer, rows, gspo.GROUP_SIZE, padded, lengths, no_logps, truncated)

    def compute_old_logps(self, rollouts):
        return self.compute_log_probs(self.policy, rollouts)

    def train_step(self, step):
        budget, gspo.MICRO_BATCH_TOKENS = gspo.MICRO_BATCH_TOKENS, 1
        try:
            return super().train_step(step)
        finally:
            gspo.MICRO_BATCH_TOKENS = budget


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", type=shlex.split, default=[], help="flags of gspo.py, in one string")
    arguments = parser.parse_args()
    configs.apply_overrides(vars(gspo), arguments.flags)
    trainers = {"gspo.py": gspo.GSPOTrainer(), "one at a time": OneAtATime()}
    figures = {name: [] for name in trainers}
    for step in range(arguments.rounds + 1):
        for name, trainer in trainers.items():
            metrics = trainer.train_step(step + 1)
            seconds = [metrics[f"seconds_{part}"] for part in ("rollout", "reward", "logps", "update")]
            if step:  # the first round warms up
                figures[name].append((sum(seconds), metrics["tokens_per_second"], *seconds))
    print("| way | s/step | completion tokens/s | rollout s | reward s | log-probs s | update s |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in figures.items():
        step, speed, *parts = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {step:.3f} | {speed:.0f} | " + " | ".join(f"{part:.3f}" for part in parts) + " |")
    pairs = list(zip(figures["gspo.py"], figures["one at a time"], strict=True))
    print(f"\nratios, median of {len(pairs)} rounds: ", end="")
    print(f"{statistics.median(slow[0] / fast[0] for fast, slow in pairs):.1f} x faster per step, ", end="")
    print(f"{statistics.median(slow[2] / fast[2] for fast, slow in pairs):.1f} x faster rollouts, ", end="")
    print(f"{statistics.median(fast[1] / slow[1] for fast, slow in pairs):.1f} x the tokens per second")


if __name__ == "__main__":
    main()
