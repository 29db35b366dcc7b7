"""The embedded task: written addition, with a policy that can do it but mostly does not.

    python data/make_arithmetic.py            # about half an hour on two CPU cores

A prompt is `47+85=`. The completion is free text that ends in `#` and the answer. The policy is pre-trained on four
styles. Its mix makes the two common styles the wrong ones, like the first guess of a large base model:

    style    share  right  what it writes
    direct   0.54   0.29   `#22`: the answer at once, column by column, every carry forgotten
    slip     0.20   0.0    works the columns out, but slips: forgets carries or miscounts
    worked   0.14   1.0    `7+5=12,4+8+1=13#132`
    ramble   0.12   0.5    works it out, checks, and checks again; the last check gives the answer

So pass@1 is about a third. Greedy decoding picks the commonest style, and is no better. The policy already knows how to
be right, and reinforcement learning only has to find it.

It writes these, all from one seed:

    data/arithmetic/{train,test}.jsonl    prompts and answers, disjoint
    data/models/arithmetic-policy/        Qwen3ForCausalLM
    data/models/arithmetic-moe/           Qwen3MoeForCausalLM, trained as the policy is
    data/models/arithmetic-reward/        Qwen3ForSequenceClassification, one logit, trained on 0 and 1
    data/models/accuracy.json             the accuracy of the models on the held-out prompts
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

HERE = Path(__file__).parent
PAD, EOS, CHARACTERS = 0, 1, "0123456789+=,#?"
STYLES = {"direct": 0.54, "slip": 0.20, "worked": 0.14, "ramble": 0.12}
TRAIN_PROMPTS, TEST_PROMPTS = 4096, 512
LONGEST = 96  # tokens of prompt and completion, the models' context
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
BALANCE = 0.01  # weight of the load-balancing loss in pre-training; without it some experts get no tokens


# ---- Problems and the styles of solving them


def draw_problem(rng):
    """Returns two numbers from 1 to 99."""
    return rng.randrange(1, 100), rng.randrange(1, 100)


def columns(a, b):
    """Returns the pairs of digits, units first."""
    width = max(len(str(a)), len(str(b)))
    return list(zip(map(int, reversed(f"{a:0{width}d}")), map(int, reversed(f"{b:0{width}d}")), strict=True))


def work_out(rng, a, b, forget=0.0, miscount=0.0):
    """Returns the columns added one after the other, and the answer.

    forget, miscount: the chances of these slips in each column.
    """
    steps, digits, carry = [], "", 0
    for x, y in columns(a, b):
        if carry and rng.random() < forget:
            carry = 0
        total = x + y + carry
        if rng.random() < miscount:
            total = max(0, total + rng.choice((-1, 1)))
        steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        digits, carry = str(total % 10) + digits, total // 10
    return ",".join(steps), str(int(("1" if carry else "") + digits))


def slip(rng, a, b):
    while True:
        steps, answer = work_out(rng, a, b, forget=0.7, miscount=0.1)
        if answer != str(a + b):
            return steps, answer


def one_slip(rng, a, b):
    """Returns a worked completion with exactly one slip: in a digit, a carry, a sum, or the written answer."""
    pairs, steps, digits, carry = columns(a, b), [], "", 0
    where, kind = rng.randrange(len(pairs)), rng.choice(("digit", "carry", "sum", "answer"))
    for i, (x, y) in enumerate(pairs):
        if i == where and kind == "digit":
            x, y = rng.choice(((x, int(rng.choice(f"{a}{b}0"))), (int(rng.choice(f"{a}{b}0")), y)))
        if i == where and kind == "carry":
            carry = 1 - carry
        total = x + y + carry
        if i == where and kind == "sum":
            total = max(0, total + rng.choice((-10, -2, -1, 1, 2, 10)))
        steps.append(f"{x}+{y}" + ("+1" if carry else "") + f"={total}")
        digits, carry = str(total % 10) + digits, int(total >= 10)
    answer = str(int(("1" if carry else "") + digits))
    if kind == "answer":
        at = rng.randrange(len(answer))
        answer = answer[:at] + rng.choice(("", rng.choice("0123456789"))) + answer[at + 1 :]
    return ",".join(steps) + "#" + answer


def solve(rng, a, b, style):
    """Returns a completion in that style."""
    if style == "direct":
        return "#" + str(int("".join(str((x + y) % 10) for x, y in reversed(columns(a, b)))))
    if style == "worked":
        return "#".join(work_out(rng, a, b))
    if style == "slip":
        return "#".join(slip(rng, a, b))
    passes = [slip(rng, a, b) if rng.random() < 0.5 else work_out(rng, a, b) for _ in range(3)]
    return "?".join(steps for steps, _ in passes) + "#" + passes[-1][1]


def is_right(completion, answer):
    return completion.rpartition("#")[2] == answer and "#" in completion


# ---- Tokenizer and training


def make_tokenizer():
    """Returns a tokenizer with one token per character. Its chat template adds nothing to the text."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=LONGEST,
        padding_side="left",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def make_config(kind=Qwen3Config, **extra):
    return kind(
        vocab_size=3 + len(CHARACTERS),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        **extra,
    )


def batches(rows, size, rng):
    """Yields batches of rows of similar length, in random order, right-padded: ids (rows, tokens)."""
    rows.sort(key=lambda row: len(row[0]))
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        longest = max(len(ids) for ids, _ in chunk)
        yield torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in chunk]), [extra for _, extra in chunk]


def fit(model, draw_rows, loss_of, steps, batch_size, peak_rate, rng, name):
    """Trains with AdamW, with warm-up and then linear decay to zero, on rows that are drawn anew each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 100) * (1 - s / steps))
    step, running, start = 0, None, time.time()
    while step < steps:
        for ids, extra in batches(draw_rows(batch_size * 16), batch_size, rng):
            loss = loss_of(model, ids, extra)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            step += 1
            if step % 200 == 0:
                print(f"{name} step {step}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True)
            if step == steps:
                break


def policy_loss(model, ids, prompt_lengths):
    """Returns next-token cross-entropy on completion tokens and their end.

    It is a sum over a constant, and not a mean over the batch's tokens. Each batch holds rows of one length, so a mean
    would give the first token of the short styles more weight.
    """
    routers = {"output_router_logits": True} if isinstance(model, Qwen3MoeForCausalLM) else {}
    output = model(input_ids=ids, use_cache=False, **routers)
    logits = output.logits[:, :-1]
    position = torch.arange(1, ids.shape[1])
    graded = (ids[:, 1:] != PAD) & (position >= torch.tensor(prompt_lengths)[:, None])
    loss = torch.nn.functional.cross_entropy(logits[graded], ids[:, 1:][graded], reduction="sum") / (20 * len(ids))
    return loss + BALANCE * output.aux_loss if routers else loss


def reward_loss(model, ids, labels):
    """Returns the mean squared error to 0 (wrong) and 1 (right): at the last token, plus the average over all tokens.

    The model is used at the last token. The other tokens teach it where a completion went wrong. Without them it does
    not learn to see a miscounted column.
    """
    scores = model.score(model.model(input_ids=ids, use_cache=False).last_hidden_state)[..., 0]  # (rows, tokens)
    errors = (scores - torch.tensor(labels)[:, None]) ** 2
    text = ids != PAD
    last = errors[torch.arange(len(ids)), text.sum(1) - 1]
    return last.mean() + errors[text].mean()


@torch.no_grad()
def complete(model, tokenizer, prompts, sample):
    """Returns one completion per prompt, as text."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    how = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}  # generate defaults to top_k=50
    ids = model.generate(**inputs, max_new_tokens=LONGEST - inputs.input_ids.shape[1], **how)
    return tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


# ---- The recipe: three stages, each made from the seed and the files on disk


def make_prompts(folder, seed):
    rng, problems = random.Random(f"prompts {seed}"), {}
    while len(problems) < TRAIN_PROMPTS + TEST_PROMPTS:
        problems[draw_problem(rng)] = None  # a dict keeps the order and drops repeats
    problems = list(problems)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("test", problems[:TEST_PROMPTS]), ("train", problems[TEST_PROMPTS:])):
        lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a, b in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


class Solutions:
    """Draws (prompt, completion, answer) for problems that are not held out."""

    def __init__(self, folder, seed):
        self.rng = random.Random(seed)
        self.test = [json.loads(line) for line in (folder / "arithmetic" / "test.jsonl").read_text().splitlines()]
        self.held_out = {row["prompt"] for row in self.test}

    def problem(self):
        while f"{(problem := draw_problem(self.rng))[0]}+{problem[1]}=" in self.held_out:
            pass
        return problem

    def in_styles(self, count):
        styles = self.rng.choices(list(STYLES), STYLES.values(), k=count)
        problems = [self.problem() for _ in styles]
        return [
            (f"{a}+{b}=", solve(self.rng, a, b, style), str(a + b))
            for (a, b), style in zip(problems, styles, strict=True)
        ]

    def by_policy(self, policy, tokenizer, rows, sample=True):
        """Returns (prompt, completion, answer) with the policy's completions. rows: (prompt, answer)."""
        completions = complete(policy, tokenizer, [prompt for prompt, _ in rows], sample)
        return [(prompt, text, answer) for (prompt, answer), text in zip(rows, completions, strict=True)]


def make_policy(folder, seed, steps, name="policy"):
    """Makes the model arithmetic-`name`: "policy", or "moe" for a mixture of experts."""
    torch.manual_seed(seed)
    tokenizer, solutions = make_tokenizer(), Solutions(folder, f"policy {seed}")
    if name == "moe":
        config = make_config(Qwen3MoeConfig, **EXPERTS)
        policy = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    else:
        policy = Qwen3ForCausalLM(make_config())
    policy.generation_config.pad_token_id, policy.generation_config.eos_token_id = PAD, EOS
    print(f"{name}: {policy.num_parameters():,} parameters")

    def rows(count):
        return [
            (tokenizer.encode(prompt + completion) + [EOS], len(prompt))
            for prompt, completion, _ in solutions.in_styles(count)
        ]

    fit(policy, rows, policy_loss, steps, 128, 3e-3, solutions.rng, name)
    policy.save_pretrained(folder / "models" / f"arithmetic-{name}")
    tokenizer.save_pretrained(folder / "models" / f"arithmetic-{name}")
    test = [(row["prompt"], row["answer"]) for row in solutions.test]
    sampled = solutions.by_policy(policy, tokenizer, test * 4)
    greedy = solutions.by_policy(policy, tokenizer, test, sample=False)
    figures = {
        "parameters": policy.num_parameters(),
        "accuracy_sampled": sum(is_right(text, answer) for _, text, answer in sampled) / len(sampled),
        "accuracy_greedy": sum(is_right(text, answer) for _, text, answer in greedy) / len(greedy),
    }
    report(folder, **{f"{name}_{key}": value for key, value in figures.items()})


def make_reward_model(folder, seed, steps):
    """Makes the reward model: the policy's body with a new head.

    A quarter of its training data are the recipe's completions, and a quarter are the policy's own. The other half are
    worked ones, with and without a single slip. The policy will be trained to please this model, and would find
    whatever it overlooks.
    """
    torch.manual_seed(seed)
    policy = Qwen3ForCausalLM.from_pretrained(folder / "models" / "arithmetic-policy")
    tokenizer, solutions = make_tokenizer(), Solutions(folder, f"reward {seed}")
    rng = solutions.rng
    pool = []
    for _ in range(8):
        problems = [solutions.problem() for _ in range(2048)]
        pool += solutions.by_policy(policy, tokenizer, [(f"{a}+{b}=", str(a + b)) for a, b in problems])
    reward_model = Qwen3ForSequenceClassification.from_pretrained(folder / "models" / "arithmetic-policy", num_labels=1)
    print(f"reward model: {reward_model.num_parameters():,} parameters")

    def rows(count):
        drawn = solutions.in_styles(count // 4) + rng.choices(pool, k=count // 4)
        for a, b in (solutions.problem() for _ in range(count // 2)):
            text = one_slip(rng, a, b) if rng.random() < 0.5 else solve(rng, a, b, "worked")
            drawn.append((f"{a}+{b}=", text, str(a + b)))
        return [(tokenizer.encode(prompt + text), float(is_right(text, answer))) for prompt, text, answer in drawn]

    fit(reward_model, rows, reward_loss, steps, 128, 1e-3, rng, "reward model")
    reward_model.save_pretrained(folder / "models" / "arithmetic-reward")
    tokenizer.save_pretrained(folder / "models" / "arithmetic-reward")
    test = [(row["prompt"], row["answer"]) for row in solutions.test]
    sampled = solutions.by_policy(policy, tokenizer, test * 4)
    right = torch.tensor([is_right(text, answer) for _, text, answer in sampled])
    encoded = tokenizer([prompt + text for prompt, text, _ in sampled], return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = reward_model(encoded.input_ids, attention_mask=encoded.attention_mask).logits[:, 0]
    report(
        folder,
        reward_model_parameters=reward_model.num_parameters(),
        reward_model_accuracy=((scores > 0.5) == right).double().mean().item(),
        reward_model_score_of_right=scores[right].mean().item(),
        reward_model_score_of_wrong=scores[~right].mean().item(),
    )


def report(folder, **figures):
    """Adds figures to models/accuracy.json, which holds the models' accuracy on the held-out prompts."""
    path = folder / "models" / "accuracy.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {name: round(value, 4) for name, value in figures.items()}
    path.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy-steps", type=int, default=3000, help="of 128 completions each")
    parser.add_argument("--reward-steps", type=int, default=4500, help="of 128 completions each")
    stages = ["prompts", "policy", "reward", "moe"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages, help="which to make")
    parser.add_argument("--output", type=Path, default=HERE, help="folder that gets arithmetic/ and models/")
    arguments = parser.parse_args()
    if "prompts" in arguments.stages:
        make_prompts(arguments.output / "arithmetic", arguments.seed)
    if "policy" in arguments.stages:
        make_policy(arguments.output, arguments.seed, arguments.policy_steps)
    if "reward" in arguments.stages:
        make_reward_model(arguments.output, arguments.seed, arguments.reward_steps)
    if "moe" in arguments.stages:
        make_policy(arguments.output, arguments.seed, arguments.policy_steps, "moe")


if __name__ == "__main__":
    main()
