"""Peak memory of a training step with the vocabulary of Qwen3, against TRL's GRPOTrainer, each in a process of its own.

    python benchmarks/memory.py                      on the CPU: a small body, the full vocabulary, resident memory
    python benchmarks/memory.py --qwen3              on a GPU: Qwen3-0.6B's shape with random weights, allocated memory

Both systems take one step of GRPO by their public interface. They have the same model, 8 completions of 512 tokens
(--qwen3: 8 of 1,024), one optimizer step, and no KL term. It prints a table. Needs requirements-bench.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers
from workloads import ROOT, grpo, make_model, peak_memory

VOCABULARY = {"vocab_size": 151_936, "tie_word_embeddings": True}
SMALL = VOCABULARY | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
QWEN3 = VOCABULARY | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
PROMPT = "t5 t6 t7"


def step_of_ours(folder, tokens, gpu):
    prompts = Path(folder) / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "answer": "t1"}) + "\n")
    vars(grpo).update(
        POLICY_MODEL=folder,
        PROMPTS=str(prompts),
        EVAL_PROMPTS=str(prompts),
        REWARDS="length",
        KL_COEF=0.0,
        GROUP_SIZE=8,
        BATCH_SIZE=1,
        MINI_BATCHES=1,
        MAX_COMPLETION_TOKENS=tokens,
        MICRO_BATCH_TOKENS=8192,
        GRADIENT_CHECKPOINTING=gpu,
        SAMPLE_GROUPS=0,
        WARMUP_STEPS=0,
        LEARNING_RATE=1e-6,
    )
    trainer = grpo.GRPOTrainer()
    metrics = trainer.train_step(1)
    return metrics["completion_tokens"]


def step_of_trl(folder, tokens, gpu):
    import datasets
    import trl

    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    arguments = trl.GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=tokens,
        max_steps=1,
        learning_rate=1e-6,
        loss_type="grpo",
        beta=0.0,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=gpu,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": PROMPT}] * 8),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return sum(len(completion.split()) for completion in seen)


def child(system, folder, tokens, gpu):
    """Takes one step, and prints its peak memory in bytes."""
    tokens_trained = {"ours": step_of_ours, "trl": step_of_trl}[system](folder, tokens, gpu)
    print(json.dumps({"peak": peak_memory(), "tokens": tokens_trained}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qwen3", action="store_true", help="Qwen3-0.6B's shape on a GPU")
    parser.add_argument("--child", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens = 1024 if arguments.qwen3 else 512
    if arguments.child:
        return child(*arguments.child, tokens, arguments.qwen3)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, QWEN3 if arguments.qwen3 else SMALL, ends=0, longest=tokens, context=4096)
        peaks = {}
        print("| system | completion tokens | peak memory, 10⁹ bytes |\n|---|---|---|")
        for system, name in (("trl", "TRL's GRPOTrainer"), ("ours", "grpo.py")):
            command = [sys.executable, __file__, "--child", system, folder, *(["--qwen3"] if arguments.qwen3 else [])]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            peaks[system] = found["peak"]
            print(f"| {name} | {found['tokens']} | {found['peak'] / 1e9:.2f} |", flush=True)
    print(f"\ngrpo.py's peak is {peaks['ours'] / peaks['trl']:.2f} of TRL's")


if __name__ == "__main__":
    main()
