"""Rows of data files: answers as text, held-out prompts, messages by their roles."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers

import configs
from engine.sampling import assemble
from inputs import errors, models
from inputs.chat import encode_prompts
from inputs.models import load_tokenizer
from inputs.prompts import hold_out, load_prompts

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ effort }}"
)
USER = {"role": "user", "content": "6+7="}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_tokenizer(template=CHAT):
    tokenizer = load_tokenizer("data/models/arithmetic-policy", "POLICY_MODEL")
    tokenizer.chat_template = template
    return tokenizer


def prompt_of(tmp_path, messages, template=CHAT, answer="13", **options):
    path = jsonl(tmp_path / "rows.jsonl", {"prompt": messages, "answer": answer})
    rows = load_prompts(path, "PROMPTS", "prompt", "answer")
    return encode_prompts(rows, chat_tokenizer(template), 400, "rows", **options)[0]["prompt_text"]


def test_an_answer_is_the_same_text_from_every_kind_of_file(tmp_path):
    rows = [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate((3, 2.5, 4.0))]
    jsonl(tmp_path / "a.jsonl", *rows)
    jsonl(tmp_path / "lines.json", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    table = {
        "prompt": [row["prompt"] for row in rows],
        "answer": [3.0, 2.5, 4.0],
        "due": [datetime.date(2026, 1, 2)] * 3,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "a.json", "a.parquet"):
        read = load_prompts(str(tmp_path / name), "PROMPTS", "prompt", "answer")
        assert [row["answer"] for row in read] == ["3", "2.5", "4"], name
    assert read[0]["due"] == datetime.date(2026, 1, 2)


def test_columns_may_lie_in_others_and_answers_in_lists_of_one(tmp_path):
    row = {"prompt": [USER], "reward_model": {"ground_truth": ["13"]}, "a.b": "whole"}
    path = jsonl(tmp_path / "rows.jsonl", row)
    (read,) = load_prompts(path, "PROMPTS", "prompt", "reward_model.ground_truth")
    assert (read["prompt"], read["answer"]) == ("6+7=", "13")
    assert load_prompts(path, "PROMPTS", "prompt", "a.b")[0]["answer"] == "whole"
    with pytest.raises(configs.InputError, match="line 1: no field 'reward_model.truth', it has prompt, reward_model"):
        load_prompts(path, "PROMPTS", "prompt", "reward_model.truth")


# ---- Held out


def test_prompts_are_held_out_whole_and_once_each(capsys):
    rows = [{"prompt": f"{i}", "begun": "", "answer": str(copy)} for i in range(40) for copy in range(3)]
    held_out, others = hold_out(rows, 0.1, "rows", torch.Generator().manual_seed(0))
    assert len(held_out) == 4 and len(others) == 36 * 3
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in others}
    assert "80 of 120 rows repeat the prompt of another" in capsys.readouterr().out
    again, _ = hold_out(rows, 0.1, "rows", torch.Generator().manual_seed(1))
    assert {row["prompt"] for row in again} != {row["prompt"] for row in held_out}


def test_overlap_is_warned_about_and_a_sorted_file_is_sampled_by_seed(small, tmp_path, capsys):
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "level": b} for b in (1, 7) for a in range(40, 80)]
    small.EVAL_PROMPTS = jsonl(tmp_path / "sorted.jsonl", *rows)
    small.PROMPTS = jsonl(tmp_path / "train.jsonl", *rows[:5], {"prompt": "1+1=", "answer": "2"})
    small.EVAL_SIZE, small.REWARDS, small.KL_COEF = 20, "exact_match", 0.0
    chosen = []
    for small.SEED in (0, 0, 1):
        chosen.append([row["prompt"] for row in small.GSPOTrainer().eval_rows])
    assert "5 of 80 prompts of EVAL_PROMPTS are also in PROMPTS" in capsys.readouterr().out
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 20
    places = [[row["prompt"] for row in rows].index(prompt) for prompt in chosen[0]]
    assert places == sorted(places) and places[0] < 40 <= places[-1]


# ---- Chat


def test_a_begun_answer_is_continued_and_counts_to_the_completion(tmp_path):
    begun = {"role": "assistant", "content": "<think>Let me"}
    assert prompt_of(tmp_path, [USER, begun]) == "<user>6+7=</user><assistant><think>Let me"
    rows = [{"prompt_ids": [5], "begun": "<think>Let me"}]
    tokenizer = chat_tokenizer()
    ids = tokenizer("7+6=#13")["input_ids"]
    parts = torch.tensor([ids]), torch.tensor([len(ids)]), torch.zeros(1, len(ids)), torch.tensor([True])
    assert assemble(tokenizer, rows, 1, *parts).texts == ["<think>Let me7+6=#13"]


@pytest.mark.parametrize("text", ["Let me compute 13 + ", "Of 13 pens", "It is 131."])
def test_a_begun_answer_may_hold_the_rows_answer(tmp_path, text):
    shown = prompt_of(tmp_path, [USER, {"role": "assistant", "content": text}])
    assert shown == f"<user>6+7=</user><assistant>{text}"


@pytest.mark.parametrize("text", ["It is 13.", "It is 13", "13 pens.\nDone!", "#### 12", "So \\boxed{x}"])
def test_a_whole_answer_is_not_shown_to_the_policy(tmp_path, capsys, text):
    shown = prompt_of(tmp_path, [USER, {"role": "assistant", "content": text}])
    assert shown == "<user>6+7=</user><assistant>"
    assert "1 of 1 prompts end with an assistant's whole answer, which was left out" in capsys.readouterr().out


def test_there_is_one_system_turn(tmp_path, capsys):
    own = [{"role": "system", "content": "Own."}, USER]
    assert prompt_of(tmp_path, own, system_prompt="Flag.") == "<system>Own.</system><user>6+7=</user><assistant>"
    assert "1 prompts have a system message of their own" in capsys.readouterr().out
    assert prompt_of(tmp_path, [USER], system_prompt="Flag.").startswith("<system>Flag.</system><user>")
    for other in ([USER, {"role": "system", "content": "Late."}], [{"role": "developer", "content": "Own."}, USER]):
        assert "Flag." not in prompt_of(tmp_path, other, system_prompt="Flag.")
    plain = prompt_of(tmp_path, own, None, system_prompt="Flag.")
    assert plain == "Own.\n6+7=" and prompt_of(tmp_path, [USER], None, system_prompt="Flag.") == "Flag.\n6+7="


def test_a_template_gets_its_variables_and_one_that_refuses_a_system_message_is_named(tmp_path):
    assert prompt_of(tmp_path, [USER], variables={"effort": "low"}).endswith("<assistant>low")
    for name in ("messages", "tokenize", "add_generation_prompt", "chat_template"):
        with pytest.raises(configs.InputError, match=f"CHAT_TEMPLATE_KWARGS sets {name}, .*leave it out"):
            prompt_of(tmp_path, [USER], variables={name: False})
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
    with pytest.raises(configs.InputError, match="it takes no system message, so give --system-prompt"):
        prompt_of(tmp_path, [USER], no_system, system_prompt="Flag.")


def test_an_end_of_sequence_that_the_tokenizer_adds_is_removed_from_prompts(tmp_path):
    tokenizer = chat_tokenizer(None)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert tokenizer("6+7=")["input_ids"][-1] == end[1]
    rows = load_prompts(
        jsonl(tmp_path / "rows.jsonl", {"prompt": "6+7=", "answer": "13"}), "PROMPTS", "prompt", "answer"
    )
    (row,) = encode_prompts(rows, tokenizer, 400, "rows")
    assert tokenizer.decode(row["prompt_ids"]) == "6+7="


def test_rules_read_special_tokens_but_no_end_of_sequence():
    tokenizer = chat_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    ids = tokenizer("<answer>7</answer>")["input_ids"] + [tokenizer.eos_token_id]
    for ended in (True, False):
        taken = ids if ended else ids[:-1]
        parts = torch.tensor([taken]), torch.tensor([len(taken)]), torch.zeros(1, len(taken)), torch.tensor([not ended])
        assert assemble(tokenizer, [{"prompt_ids": [5]}], 1, *parts).texts == ["<answer>7</answer>"]


# ---- Remedies by their cause


def test_an_unusable_cache_is_named_and_other_errors_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(errors.huggingface_hub.constants, "HF_HOME", str(tmp_path))
    refused = PermissionError(13, "Permission denied", str(tmp_path / "datasets"))
    wrapped = RuntimeError("failed")
    wrapped.__cause__ = refused
    for error in (refused, wrapped):
        assert f"the cache {tmp_path} cannot be used: set HF_HOME" in errors.hub_remedy("id", "a file", error)
    assert "HF_HOME" not in errors.hub_remedy("id", "a file", FileNotFoundError(2, "none", "/elsewhere"))


def test_a_rotation_that_depends_on_the_longest_sequence_is_refused_if_it_can_change():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    config = transformers.Phi3Config(
        **sizes,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=32,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    models.check_rotation(model, 32)
    with pytest.raises(configs.InputError, match="longrope.* longer than 32 tokens.* --max-completion-tokens"):
        models.check_rotation(model, 33)
