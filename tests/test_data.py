"""The shipped tasks: the recipes make the shipped files, which are right, disjoint, and as they say."""

import json
import random
import re
import sys

import pytest
import transformers

import configs

sys.path.insert(0, str(configs.HERE / "data"))
import make_arithmetic
import make_words


def read(name, task="arithmetic"):
    return (configs.HERE / "data" / task / name).read_text()


def test_the_recipe_makes_the_shipped_prompts(tmp_path):
    make_arithmetic.make_prompts(tmp_path, seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_text() == read(name)


def test_shipped_prompts_are_right_and_disjoint():
    rows = [json.loads(line) for name in ("train.jsonl", "test.jsonl") for line in read(name).splitlines()]
    for row in rows:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["answer"] == str(a + b)
    assert len({row["prompt"] for row in rows}) == len(rows) == 4096 + 512


def test_the_recipe_makes_the_shipped_word_problems(tmp_path):
    make_words.make_words(tmp_path, seed=0)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_text() == read(name, "words")


def test_word_problems_are_right_and_share_no_sum_with_the_test():
    numbers, problems, shares = {}, {}, {}
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in read(name, "words").splitlines()]
        roles = [[message["role"] for message in row["prompt"]] for row in rows]
        assert roles == [["system", "user", "assistant", "user", "assistant", "user"]] * len(rows)
        stories = [row["prompt"][-1]["content"] for row in rows]
        numbers[name] = set()
        for story, row in zip(stories, rows, strict=True):
            start, change = map(int, re.findall(r"\d+", story))
            more, answer = bool(re.search("now|together|evening", story)), int(row["answer"])
            assert more == bool(re.search("more|together|evening", story)) != bool(re.search("left|still", story))
            assert answer == (start + change if more else start - change)
            assert more or start % 10 >= change % 10  # no borrowing
            numbers[name].add(tuple(sorted((start, change, answer))))  # a < b < a + b, whatever is asked
        problems[name] = set(stories)
        shares[name] = sum("left" in story or "still" in story for story in stories) / len(rows)
        assert len(problems[name]) == len(rows)
    assert not numbers["train.jsonl"] & numbers["test.jsonl"]
    assert {name: len(some) for name, some in problems.items()} == {"train.jsonl": 1024, "test.jsonl": 256}
    assert all(0.2 < share < 0.3 for share in shares.values())


@pytest.mark.parametrize("style", ["direct", "slip", "worked", "ramble", "one slip"])
def test_a_style_is_right_when_the_recipe_says(style):
    rng, right, problems = random.Random(0), 0, 500
    for _ in range(problems):
        a, b = make_arithmetic.draw_problem(rng)
        carries = a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9
        text = make_arithmetic.one_slip(rng, a, b) if style == "one slip" else make_arithmetic.solve(rng, a, b, style)
        ok = make_arithmetic.is_right(text, str(a + b))
        right += ok
        assert style != "direct" or ok == (not carries)
        assert set(text) <= set(make_arithmetic.CHARACTERS) and len(f"{a}+{b}={text}") < 60
    low, high = {"direct": (0.2, 0.35), "slip": (0, 0), "worked": (1, 1), "ramble": (0.4, 0.6), "one slip": (0, 0.2)}[
        style
    ]
    assert low <= right / problems <= high


def test_shipped_models_are_small_and_one_token_is_one_character():
    folder = configs.HERE / "data" / "models"
    assert sum(path.stat().st_size for path in folder.rglob("arithmetic-*/*")) <= 8e6
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "arithmetic-policy")
    assert tokenizer.is_fast
    text = "47+85=7+5=12,4+8+1=13?#132"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and len(tokenizer(text)["input_ids"]) == len(text)
    message = [{"role": "user", "content": text}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == text
    accuracy = json.loads((folder / "accuracy.json").read_text())
    assert 0.2 <= accuracy["policy_accuracy_sampled"] <= 0.4 and 0.2 <= accuracy["policy_accuracy_greedy"] <= 0.4
    assert accuracy["reward_model_accuracy"] > 0.95
