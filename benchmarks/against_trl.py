"""grpo.py beside TRL's GRPOTrainer: speed, memory and learning on equal work, the two taking turns in one run.

    python benchmarks/against_trl.py smollm2                 the preset smollm2, a chat model of 135 M parameters
    python benchmarks/against_trl.py embedded                the shipped task, rewarded by its rule exact_match
    python benchmarks/against_trl.py longtail                15 M parameters, vocabulary of 32,768, few long completions
    python benchmarks/against_trl.py qwen3                   on a GPU: Qwen3-0.6B's shape, full vocabulary, bfloat16
    python benchmarks/against_trl.py embedded --rounds 1 --steps 5 --flags "--group-size 16"

These are equal: initial weights, prompts and their order, group size, sampling (the whole distribution), numbers of
completions and of optimizer steps, rewards, loss, clip, k3 to a reference model, learning rate at each step, AdamW,
norm clipping, and precision. Each round has its own seed. Each system runs in its own process, which does not count its
first step. One thing is not: TRL's mini-batches are random completions, and smollm2's here are random groups
(WHOLE_GROUPS).

Every free choice is meant to be the best one for TRL. A mini-batch is one micro-batch; --trl-micro-batch makes it
several, for less memory. If it has several values, two steps of each are tried first, and the fastest is taken. There
is no checkpointing unless grpo.py does it too. AdamW is TRL's default, the fused one. The reward rule is called in
TRL's own process; grpo.py runs it in others, whose memory is not counted. Nothing is logged or saved, and there are no
loader workers. grpo.py runs with its constants as shipped, but writes no samples or events either. Each system has one
GPU at most. vLLM is not used.

TRL's rollout is its `_generate`. Its scoring is the rest of `_generate_and_score_completions`: rewards, and log-probs
under the reference and under the policy that sampled. Its update is the rest of the step. On the CPU, peak memory is
the kernel's VmHWM of the process, libraries included, because ru_maxrss would inherit the parent's. On a GPU, it is the
memory that torch had allocated. Held-out accuracy is grpo.py's evaluate() for both.

workloads.py says how operations are counted. Utilisation compares them with float32 matrix products (on a GPU:
bfloat16) of the same minutes. After each step a few products run, and the best counts; the median over the steps is
taken. Needs requirements-bench.txt.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # the scripts set it, too, before they import torch

import torch
import transformers
from workloads import (
    ROOT,
    WORKLOADS,
    flops,
    grpo,
    peak_flops,
    peak_memory,
    prepare,
    set_constants,
    sizes_of,
    sizes_of_rollouts,
    synchronize,
    useful_tokens,
)

import configs
from scoring.rules import find_reward, parse_rewards

NAMES = {"ours": "grpo.py", "trl": "TRL's GRPOTrainer"}
PHASES = ("rollout", "scoring", "update")
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}  # for both systems
CURVE = 6  # points of the learning curve; each is the mean of equally many steps


class Padding:
    """Counts the token places that go through the layers with gradients on, which happens only in the update."""

    def __init__(self, model):
        self.places = 0
        model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        if torch.is_grad_enabled():
            self.places += (args[0] if args else kwargs["input_ids"]).numel()


def start_memory():
    """Returns the memory before the first step, measured as peak_memory() does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return peak_memory()


def peak_now():
    return peak_flops("cuda" if torch.cuda.is_available() else "cpu", seconds=0.3)


def accuracy(trainer, workload):
    if WORKLOADS[workload]["model"]:  # made on the spot, and without a task
        return {}
    found = trainer.evaluate()
    return {"sampled": found["eval_accuracy"], "greedy": found["eval_accuracy_greedy"]}


def run_ours(workload, steps):
    trainer = grpo.GRPOTrainer()
    padding, sampled, rows = Padding(trainer.policy), [], []
    generate = trainer.generate_responses_with_group_sampling

    def keep(step):
        sampled.append(generate(step))
        return sampled[-1]

    trainer.generate_responses_with_group_sampling = keep
    before = start_memory()
    for step in range(1, steps + 1):
        padding.places = 0
        start = time.perf_counter()
        metrics = trainer.train_step(step)
        synchronize()
        seconds, rollouts = time.perf_counter() - start, sampled.pop()
        rows.append(
            {
                "seconds": seconds,
                "rollout": metrics["seconds_rollout"],
                "scoring": metrics["seconds_reward"] + metrics["seconds_logps"],
                "update": metrics["seconds_update"],
                "reward": metrics["reward"],
                "sizes": sizes_of_rollouts(rollouts),
                "moving": trainer.moving(rollouts).tolist(),
                "places": padding.places,
                "peak": peak_now(),
            }
        )
    return trainer.policy, rows, (before, peak_memory()), accuracy(trainer, workload)


def timed_trainer(rows, steps, places):
    """Returns a class of TRL's trainer that adds to rows how long each part of a step took.

    places: a function that returns the number of token places that went through the model.
    """
    import trl

    class Timed(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            synchronize()
            rows.append({"end": time.perf_counter(), "peak": peak_now(), "places": places()})
            rows[-1]["start"] = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            synchronize()
            rows[-1]["scoring"] = time.perf_counter() - rows[-1]["start"] - rows[-1]["rollout"]
            return outputs

        def _generate(self, prompts):
            start = time.perf_counter()
            outputs = super()._generate(prompts)
            synchronize()
            rows[-1]["rollout"] = time.perf_counter() - start
            rows[-1]["sizes"] = sizes_of(outputs[0], list(map(len, outputs[1])), grpo.GROUP_SIZE)
            return outputs

        def create_scheduler(self, num_training_steps, optimizer=None):  # grpo.py's rate
            constants = configs.snapshot(vars(grpo))

            def factor(update):
                step = min(update // grpo.MINI_BATCHES + 1, steps)
                return grpo.learning_rate_at(step, constants) / grpo.LEARNING_RATE

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

    return Timed


def trl_arguments(steps, folder, micro_batch, continuous_batching):
    """Returns the configuration with which TRL does the work of grpo.py's constants."""
    import trl

    gpu, mini_batch = torch.cuda.is_available(), grpo.BATCH_SIZE * grpo.GROUP_SIZE // grpo.MINI_BATCHES
    accumulated, rest = divmod(mini_batch, micro_batch or mini_batch)
    if rest:
        sys.exit(f"--trl-micro-batch {micro_batch}: give divisors of the mini-batch, which is {mini_batch}")
    return trl.GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        seed=grpo.SEED,
        max_steps=steps * grpo.MINI_BATCHES,
        per_device_train_batch_size=micro_batch or mini_batch,
        steps_per_generation=grpo.MINI_BATCHES * accumulated,
        gradient_accumulation_steps=accumulated,
        num_iterations=1,
        num_generations=grpo.GROUP_SIZE,
        max_completion_length=grpo.MAX_COMPLETION_TOKENS,
        temperature=grpo.TEMPERATURE,
        top_p=1.0,
        top_k=0,
        loss_type="grpo",
        epsilon=grpo.CLIP_LOW,
        epsilon_high=grpo.CLIP_HIGH,
        beta=grpo.KL_COEF,
        use_bias_correction_kl=False,
        scale_rewards="group" if grpo.ADVANTAGE_TYPE == "normalized" else "none",
        mask_truncated_completions=False,
        shuffle_dataset=False,
        use_transformers_continuous_batching=continuous_batching,
        learning_rate=grpo.LEARNING_RATE,
        weight_decay=grpo.WEIGHT_DECAY,
        max_grad_norm=grpo.MAX_GRAD_NORM,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=grpo.GRADIENT_CHECKPOINTING,
        dataloader_pin_memory=gpu,
        **dict.fromkeys(("save_strategy", "logging_strategy"), "no"),
        **{"dataloader_num_workers": 0, "report_to": [], "disable_tqdm": True},
    )


def reward_of(rows):
    """Returns a reward function for TRL, the weighted sum of REWARDS, which adds to the last of rows what it found."""
    weights = parse_rewards(grpo.REWARDS)
    rules = [(find_reward(name, "REWARDS"), weight) for name, weight in weights.items()]

    def reward(prompts, completions, answer, **_):
        rewards = [
            sum(weight * rule(p, c, {"answer": a}) for rule, weight in rules)
            for p, c, a in zip(prompts, completions, answer, strict=True)
        ]
        groups = torch.tensor(rewards).view(-1, grpo.GROUP_SIZE)
        alive = groups.amax(1) > groups.amin(1)
        rows[-1]["reward"] = statistics.mean(rewards)
        rows[-1]["moving"] = (alive | (grpo.KL_COEF > 0)).repeat_interleave(grpo.GROUP_SIZE).tolist()
        return rewards

    return reward


def run_trl(workload, steps, prompts, folder, micro_batch, continuous_batching):
    import datasets

    rows, padding, folder_of_model = [], None, ROOT / grpo.POLICY_MODEL
    name = str(folder_of_model) if folder_of_model.is_dir() else grpo.POLICY_MODEL
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    trainer = timed_trainer(rows, steps, lambda: padding.places)(
        model=name,
        reward_funcs=reward_of(rows),
        args=trl_arguments(steps, folder, micro_batch, continuous_batching),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    padding = Padding(trainer.model)
    before = start_memory()
    trainer.train()
    synchronize()
    rows.append({"end": time.perf_counter(), "places": padding.places})
    peak = peak_memory()
    for row, after in zip(rows, rows[1:], strict=False):
        row["seconds"], row["places"] = after["end"] - row["start"], after["places"] - row["places"]
        row["update"] = row["seconds"] - row["rollout"] - row["scoring"]
    rows.pop()
    assert len(rows) == steps and all(
        [p for *_, p, _ in row["sizes"]] == [one["tokens"] for one in of_step for _ in range(grpo.GROUP_SIZE)]
        for row, of_step in zip(rows, batches(prompts), strict=True)
    ), "TRL was given other prompts"
    found = {}
    if WORKLOADS[workload]["model"] is None:
        judge = grpo.GRPOTrainer()
        judge.policy.load_state_dict(trainer.model.state_dict())
        found = accuracy(judge, workload)
    return trainer.model, rows, (before, peak), found


def batches(prompts):
    return [prompts[i : i + grpo.BATCH_SIZE] for i in range(0, len(prompts), grpo.BATCH_SIZE)]


def child(system, workload, folder, steps, *of_trl):
    """Runs one system for some steps, and prints its measurements."""
    if system == "trl":
        prompts = json.loads((Path(folder) / "steps.json").read_text())
        model, rows, memory, found = run_trl(workload, steps, prompts, folder, *of_trl)
    else:
        model, rows, memory, found = run_ours(workload, steps)
    rewards, counted = [row["reward"] for row in rows], rows[1:]
    total = {name: sum(row[name] for row in counted) for name in ("seconds", "places", *PHASES)}
    lengths = [t for row in counted for *_, t in row["sizes"]]
    moving = [list(itertools.compress(row["sizes"], row["moving"])) for row in counted]
    done = [flops(model, row["sizes"], some, grpo.KL_COEF > 0) for row, some in zip(counted, moving, strict=True)]
    peak = statistics.median(row["peak"] for row in counted)
    rates = {name: sum(one[name] for one in done) / total["seconds" if name == "step" else name] for name in done[0]}
    points = min(CURVE, steps)
    curve = [rewards[i * steps // points : (i + 1) * steps // points] for i in range(points)]
    result = {name: statistics.median(row[name] for row in counted) for name in ("seconds", *PHASES)}
    result |= {"tokens_per_second": sum(lengths) / total["seconds"], "curve": [statistics.mean(one) for one in curve]}
    result |= {"length": statistics.mean(lengths) / grpo.MAX_COMPLETION_TOKENS, "accuracy": found, "flops": rates}
    result |= {"peak": peak, "places": total["places"] / len(counted)}
    result |= {"useful": statistics.mean(map(useful_tokens, moving)), "moving": statistics.mean(map(len, moving))}
    print(json.dumps(result | {"start_memory": memory[0], "peak_memory": memory[1]}))


def spread(values, digits=2):
    """Returns the median as text, and the range if there are several values."""
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_tables(results, workload):
    columns = ("seconds", *PHASES, "tokens_per_second")
    print("\n| system | s/step | rollout s | scoring s | update s | completion tokens/s | peak GB | at the start |")
    print("|---|---|---|---|---|---|---|---|")
    for system, rounds in results.items():
        cells = [f"{statistics.median(one[name] for one in rounds):.3f}" for name in columns[:-1]]
        cells += [f"{statistics.median(one['tokens_per_second'] for one in rounds):.0f}"]
        cells += [
            f"{statistics.median(one[name] for one in rounds) / 1e9:.2f}" for name in ("peak_memory", "start_memory")
        ]
        print(f"| {NAMES[system]} | " + " | ".join(cells) + " |")
    pairs = list(zip(results["ours"], results["trl"], strict=True))
    print(f"\nTRL over grpo.py, median and range of {len(pairs)} rounds:")
    for name in columns[:-1]:
        print(f"  {name:17} {spread([trl[name] / ours[name] for ours, trl in pairs])}")
    print(f"  memory            {spread([trl['peak_memory'] / ours['peak_memory'] for ours, trl in pairs])}")
    speeds = [ours["tokens_per_second"] / trl["tokens_per_second"] for ours, trl in pairs]
    print(f"grpo.py over TRL, completion tokens per second: {spread(speeds)}")

    points = len(results["ours"][0]["curve"])
    columns = (f"reward, by {points} parts of the steps", "the last", "held-out sampled", "greedy")
    print(f"\n| system | {' | '.join(columns)} | mean length / maximum |\n|---|---|---|---|---|---|")
    for system, rounds in results.items():
        curve = [[one["curve"][i] for one in rounds] for i in range(points)]
        cells = [" ".join(f"{statistics.median(one):.3f}" for one in curve), spread(curve[-1], 3)]
        for how in ("sampled", "greedy"):
            cells += [spread([one["accuracy"][how] for one in rounds], 3) if rounds[0]["accuracy"] else "none"]
        print(f"| {NAMES[system]} | " + " | ".join(cells) + f" | {spread([one['length'] for one in rounds])} |")

    peaks = spread([one["peak"] / 1e9 for rounds in results.values() for one in rounds], 0)
    print(f"\nMatrix products between the steps: {peaks} · 10⁹ operations per second\n")
    print("| system | tokens through a step's update | useful | completions that move the policy |", end="")
    print(" utilisation: rollout | update | whole step |\n|---|---|---|---|---|---|---|")
    for system, rounds in results.items():
        names = rounds[0]["flops"]
        cells = [f"{statistics.median(one['flops'][name] / one['peak'] for one in rounds):.2%}" for name in names]
        counts = (statistics.median(one[name] for one in rounds) for name in ("places", "useful", "moving"))
        print(f"| {NAMES[system]} | " + " | ".join(f"{count:.0f}" for count in counts), *cells, sep=" | ", end=" |\n")


def write_prompts(folder, workload, steps, seed, flags):
    """Writes the prompts of all steps of a seed, in their order, for TRL."""
    set_constants(workload, folder, steps, seed, flags)
    train_rows = grpo.GRPOTrainer().train_rows
    rows = [
        row
        for step in range(1, steps + 1)
        for row in grpo.prompts_of_step(train_rows, step, grpo.BATCH_SIZE, grpo.generator_of)
    ]
    prompts = [{"prompt": r["prompt_text"], "answer": r["answer"], "tokens": len(r["prompt_ids"])} for r in rows]
    (Path(folder) / "steps.json").write_text(json.dumps(prompts))


def measure(system, arguments, steps, micro_batch, folder, seed):
    """Returns what a process of its own found of a system, the last line that it printed."""
    command = [sys.executable, __file__, arguments.workload, "--steps", str(steps), f"--flags={arguments.flags}"]
    command += [f"--trl-micro-batch={micro_batch}", "--child", system, folder, str(seed)]
    command += ["--continuous-batching"] * arguments.continuous_batching
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | ONE_GPU)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"seed {seed}, {NAMES[system]}: {found['seconds']:.3f} s per step", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps per run; the first is not counted")
    parser.add_argument("--flags", default="", help="flags of grpo.py, in one string; TRL gets those it has")
    parser.add_argument("--trl-micro-batch", type=int, nargs="+", default=[0], help="divisors of the mini-batch")
    parser.add_argument("--continuous-batching", action="store_true", help="TRL samples by that of transformers")
    parser.add_argument("--child", nargs=3, metavar=("SYSTEM", "FOLDER", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    workload, steps, flags = arguments.workload, arguments.steps, shlex.split(arguments.flags)
    steps = steps or WORKLOADS[workload]["steps"]
    if workload == "qwen3" and not torch.cuda.is_available():
        sys.exit("qwen3 needs a GPU, and there is none; embedded and longtail run on the CPU")
    if steps < 2:
        parser.error("--steps: give at least two, because the first is not counted")
    if arguments.child:
        system, folder, seed = arguments.child
        set_constants(workload, folder, steps, int(seed), flags)
        return child(system, workload, folder, steps, arguments.trl_micro_batch[0], arguments.continuous_batching)
    results, best = {name: [] for name in NAMES}, arguments.trl_micro_batch[0]
    with tempfile.TemporaryDirectory() as folder:
        prepare(workload, folder)
        if len(arguments.trl_micro_batch) > 1:
            write_prompts(folder, workload, 2, 0, flags)
            tried = {n: measure("trl", arguments, 2, n, folder, 0)["seconds"] for n in arguments.trl_micro_batch}
            best = min(tried, key=tried.get)
            print(f"TRL's micro-batches: {tried} s per step; the rounds have {best}")
        for seed in range(arguments.rounds):
            write_prompts(folder, workload, steps, seed, flags)
            for system in NAMES if seed % 2 == 0 else reversed(NAMES):
                results[system].append(measure(system, arguments, steps, best, folder, seed))
    print_tables(results, workload)


if __name__ == "__main__":
    main()
