"""What a person may get wrong, a row each: what is broken, and the words of the one line that says so.

Each row ends the same way: exit code 2, one line on stderr that names what, where and the remedy, and nothing written.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import datasets
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

import configs
import dapo
import grpo
import gspo
import ppo
import vapo
from inputs.prompts import load_prompts

QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # Python does not print them
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "peft")
GOOD = {"prompt": "1+1=", "answer": "2"}
ASSISTANT = [{"role": "assistant", "content": "2 it is"}]
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 48,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a folder with the smallest policy, reward model and prompts. Each row breaks a copy of it."""
    folder = tmp_path_factory.mktemp("made")
    characters = ["<pad>", "<eos>", *"0123456789+="]  # no token for unknown characters: they vanish
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(characters)}, []))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<pad>")
    config = {**SIZES, "vocab_size": len(characters), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    reward = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config, num_labels=1))
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"prompt": f"{a}+{a}=", "answer": str(a + a)}) + "\n" for a in range(4)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


# ---- Ways to break something. Each returns a function (script, folder, made) -> the flags to start with.


def constants(**values):
    """Edits constants in the file."""

    def edit(script, folder, made):
        vars(script).update(values)
        return []

    return edit


def prompts(content, name="prompts.jsonl", flags=()):
    """Makes training prompts of these bytes. content may also be a function that writes them to a path."""

    def write(script, folder, made):
        path = folder / name
        content(path) if callable(content) else path.write_bytes(content)
        return ["--prompts", path, *flags]

    return write


def rows(*values, **options):
    return prompts("".join(json.dumps(value) + "\n" for value in values).encode(), **options)


def parquet(*values):
    return prompts(lambda path: datasets.Dataset.from_list(list(values)).to_parquet(path), "prompts.parquet")


def truncated_parquet(path):
    datasets.Dataset.from_list([GOOD] * 99).to_parquet(path)
    path.write_bytes(path.read_bytes()[:200])


def eval_prompts(content):
    def write(script, folder, made):
        (folder / "held-out.jsonl").write_bytes(content)
        return ["--eval-prompts", folder / "held-out.jsonl"]

    return write


def model(break_it, which="policy", flags=()):
    """Copies the policy or the reward model, and calls break_it(path of the copy)."""

    def copy(script, folder, made):
        path = folder / which
        shutil.copytree(made / which, path)
        break_it(path)
        use = ["--rewards", "reward_model"] if which == "reward" else []
        return [f"--{which}-model", path, *use, *flags]

    return copy


def edited(file, remove=(), **values):
    """Changes or removes keys in a JSON file of a model."""

    def edit(path):
        content = json.loads((path / file).read_text()) | values
        (path / file).write_text(json.dumps({key: content[key] for key in content if key not in remove}))

    return edit


def overwritten(file, content):
    return lambda path: (path / file).write_bytes(content)


def removed(*files):
    return lambda path: [(path / file).unlink() for file in files]


def weights(change):
    """Changes the tensors of a model, in place, by a function of their dictionary."""

    def edit(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return edit


def cut_short(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickled(path):
    torch.save(safetensors.torch.load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def sharded(path):
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer(path):
    """Removes the tokenizer. For Qwen2 and Qwen3, transformers makes an empty one without any files."""
    edited("config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])(path)
    removed("tokenizer.json", "tokenizer_config.json")(path)


def more_tokens(path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["more", "than", "the", "model"])
    tokenizer.save_pretrained(path)


def template(text):
    return overwritten("chat_template.jinja", text.encode())


def saved(model_class, config):
    """Saves a model of another architecture in place of the one there, beside the same tokenizer."""

    def save(path):
        (path / "model.safetensors").unlink()
        model_class(config).save_pretrained(path)

    return save


def two_logits(path):
    config = transformers.LlamaConfig.from_pretrained(path, num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)


def token_classifier(path):
    config = transformers.LlamaConfig.from_pretrained(path)
    transformers.LlamaForTokenClassification(config).save_pretrained(path)


def causal_reward(script, folder, made):
    return ["--rewards", "reward_model", "--reward-model", made / "policy"]


def critic(break_it):
    """Copies the reward model, calls break_it(path of the copy), and gives it as critic."""

    def copy(script, folder, made):
        shutil.copytree(made / "reward", folder / "critic")
        break_it(folder / "critic")
        return ["--critic-model", folder / "critic"]

    return copy


def classifier_policy(script, folder, made):
    return ["--policy-model", made / "reward"]


def owners_folder(script, folder, made):
    (folder / "Qwen").mkdir()
    return ["--policy-model", "Qwen/Qwen3-0.6B"]


def adapter_alone(path):
    removed("config.json", "model.safetensors")(path)
    (path / "adapter_config.json").write_text("{}")


def output_is_a_file(script, folder, made):
    (folder / "outputs").write_text("")
    return []


def read_only(script, folder, made):
    (folder / "outputs").mkdir(mode=0o500)
    return []


def not_allowed(path):
    path.write_text(json.dumps(GOOD) + "\n")
    path.chmod(0)


def permitted_everything():
    """Returns whether this process may read files that it has no permission for.

    Root may, unless it runs under setpriv --bounding-set=-dac_override,-dac_read_search.
    """
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0)
        return os.access(file.name, os.R_OK)


as_root = pytest.mark.skipif(permitted_everything(), reason="root may read and write everything")
no_wandb = pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")


@dataclass
class Row:
    """A mistake of a person.

    name: the mistake, as a person would say it. broken: flags, or a function of (script, folder, made).
    """

    name: str
    script: object
    broken: object
    words: tuple
    marks: tuple = ()


def row(name, script, broken, *words, marks=()):
    return Row(name, script, broken, words, marks)


LONG = "1+" * 60 + "1="

FLAGS = [
    row("a flag that does not exist", gspo, ["--group-sise", 4], "--group-sise", "did you mean --group-size?"),
    row("a flag like no other", grpo, ["--xyzzy"], "unknown flag --xyzzy", "--help"),
    row("a flag in capitals, with underscores", dapo, ["--GROUP_SIZE", 4], "did you mean --group-size?"),
    row("a flag of another script", grpo, ["--ratio-level", "token"], "--ratio-level", "it belongs to gspo.py"),
    row("a flag with a long dash, from a web page", gspo, ["–group-size", 4], "did you mean --group-size?"),
    row("a word that belongs to no flag", gspo, ["stray"], "'stray' belongs to no flag", "--flag value"),
    row("a word after a switch", grpo, ["--adaptive-kl", "false"], "'false' belongs to no flag", "--no-name"),
    row("a value for a switch", dapo, ["--adaptive-kl=false"], "--adaptive-kl", "--no-adaptive-kl", "no value"),
    row("a switch both ways", gspo, ["--adaptive-kl", "--no-adaptive-kl"], "--adaptive-kl", "twice"),
    row("a flag twice", dapo, ["--group-size", 4, "--group-size", 8], "--group-size", "twice", "4", "8", "leave out"),
    row("words for a whole number", gspo, ["--group-size", "eight"], "--group-size", "a whole number", "'eight'"),
    row("a fraction for a whole number", grpo, ["--batch-size", "2.5"], "--batch-size", "a whole number"),
    row("a number that is not finite", dapo, ["--learning-rate", "nan"], "--learning-rate", "finite"),
    row("a value missing at the end", gspo, ["--max-steps"], "--max-steps", "--max-steps=N"),
    row(
        "a value missing before a flag",
        grpo,
        ["--policy-model", "--selftest"],
        "--policy-model=TEXT",
    ),
    row("an empty value", dapo, ["--policy-model", ""], "POLICY_MODEL = ''", "not empty"),
    row("a group of one", gspo, ["--group-size", 1], "GROUP_SIZE = 1", "at least 2", "--group-size"),
    row("a negative seed", grpo, ["--seed", -1], "SEED = -1", "--seed"),
    row("a number too large for anything", dapo, ["--batch-size", 10**20], "BATCH_SIZE", "too large", "--batch-size"),
    row(
        "a group that no machine holds", gspo, ["--group-size", 10**12], "GROUP_SIZE = 10", "too large", "--group-size"
    ),
    row("evaluation that no machine holds", grpo, ["--eval-samples", 10**9], "EVAL_SAMPLES = 10", "--eval-samples"),
    row("adapters that no machine holds", dapo, ["--lora-rank", 10**12], "LORA_RANK = 10", "at most", "--lora-rank"),
    row("a temperature of zero", gspo, ["--temperature", 0], "TEMPERATURE = 0.0", "greedily"),
    row("a choice that is none", gspo, ["--ratio-level", "word"], "'word'", "'sequence'", "--ratio-level"),
    row("more mini-batches than completions", grpo, ["--mini-batches", 999], "MINI_BATCHES", "--mini-batches"),
    row(
        "an aggregation that needs a divisor",
        dapo,
        ["--loss-aggregation", "constant"],
        "must be one of 'token_mean', 'sequence_mean'",
    ),
    row(
        "a critic's warm-up without end",
        ppo,
        ["--critic-warmup-steps", 3, "--max-steps", 3],
        "CRITIC_WARMUP_STEPS = 3 leaves the policy no step",
    ),
    row(
        "value pre-training beyond the last step",
        vapo,
        ["--value-pretrain-steps", 90],
        "VALUE_PRETRAIN_STEPS = 90 leaves the policy no step of MAX_STEPS",
        "--value-pretrain-steps",
    ),
    row("a length that makes each λ zero", vapo, ["--alpha", 0.01], "ALPHA = 0.01 makes λ zero", "--alpha"),
    row("a discount above one", ppo, ["--gamma", 1.5], "GAMMA = 1.5", "in [0, 1]", "--gamma"),
    row(
        "a device of the critic that does not exist",
        ppo,
        ["--critic-device", "cuda:7"],
        "CRITIC_DEVICE",
        "no such device",
    ),
    row("a preset that does not exist", dapo, ["--preset", "huge"], "--preset huge", "smoke"),
]

CONSTANTS = [
    row("a constant set to None", gspo, constants(LEARNING_RATE=None), "LEARNING_RATE = None", "a number"),
    row("a constant set to NaN", grpo, constants(CLIP_LOW=float("nan")), "CLIP_LOW = nan", "[0, 1)"),
    row("a constant set to infinity", dapo, constants(TEMPERATURE=float("inf")), "TEMPERATURE = inf", "positive"),
    row("a number in quotes", gspo, constants(GROUP_SIZE="8"), "GROUP_SIZE = '8'", "a whole number", "edit it"),
    row("True for a number", grpo, constants(SEED=True), "SEED = True", "a whole number"),
    row("a word for True or False", dapo, constants(ADAPTIVE_KL="no"), "ADAPTIVE_KL = 'no'", "True or False"),
    row("a list of rewards", gspo, constants(REWARDS=["math"]), "REWARDS = ['math']", "text in quotes"),
    row("a list for a choice", grpo, constants(LOSS_AGGREGATION=["token_mean"]), "LOSS_AGGREGATION", "text in quotes"),
    row("a preset set to None", dapo, constants(PRESET=None), "--preset None", "no such preset", "smoke"),
    row("a list of presets", gspo, constants(PRESET=["smoke"]), "--preset ['smoke']", "no such preset"),
    row("template variables not in JSON", dapo, constants(CHAT_TEMPLATE_KWARGS="a=b"), "CHAT_TEMPLATE_KWARGS", "JSON"),
    row("a device set to a number", grpo, constants(POLICY_DEVICE=0), "POLICY_DEVICE = 0", "text in quotes"),
    row("a name in place of a number", dapo, constants(OVERLONG_CACHE=max), "OVERLONG_CACHE", "a whole number"),
]

DATA = [
    row("an empty file of prompts", gspo, prompts(b""), "prompts.jsonl", "no prompts", "at least one"),
    row("a file of empty lines", grpo, prompts(b"\n \n\r\n"), "prompts.jsonl", "no prompts"),
    row("a truncated line", dapo, prompts(b'{"prompt": "1+1=", "answer": "2"}\n{"prom'), "line 2", "not JSON"),
    row("a list in place of an object", gspo, prompts(b"[1, 2]\n"), "line 1", "JSON object", "list"),
    row(
        "an array over several lines",
        grpo,
        prompts(b'[\n{"prompt": "1=", "answer": "1"}\n]'),
        "line 1",
        "a JSON array belongs in",
    ),
    row("NaN in place of an object", grpo, prompts(b"NaN\n"), "line 1", "JSON object"),
    row("brackets without end", dapo, prompts(b"[" * 200_000), "line 1", "not JSON"),
    row("a number of 5000 digits", gspo, prompts(b'{"prompt": ' + b"1" * 5000 + b"}"), "line 1", "not JSON"),
    row("UTF-16 with its mark", gspo, prompts(json.dumps(GOOD).encode("utf-16")), "line 1", "UTF-8"),
    row("UTF-16 without its mark", grpo, prompts(json.dumps(GOOD).encode("utf-16-le")), "line 1", "NUL", "UTF-8"),
    row("Latin-1", dapo, prompts(b'{"prompt": "1=", "answer": "1"}\n{"prompt": "\xe9"}'), "line 2", "UTF-8"),
    row("NUL bytes in a line", gspo, prompts(b'{"prompt": "1+\x001", "answer": "2"}\n'), "line 1", "NUL"),
    row(
        "a compressed file",
        grpo,
        prompts(b"\x1f\x8b\x08\x00\xff\xfe\x00", "prompts.jsonl.gz"),
        "prompts.jsonl.gz, line 1",
        "UTF-8",
    ),
    row(
        "a folder in place of a file",
        dapo,
        prompts(lambda path: path.mkdir()),
        "prompts.jsonl",
        "is a folder",
        "file itself",
    ),
    row("a folder named as Parquet", gspo, prompts(lambda path: path.mkdir(), "a.parquet"), "a.parquet", "is a folder"),
    row("a CSV file", grpo, prompts(b"prompt,answer\n1+1=,2\n", "a.csv"), "a CSV file", "convert it", "to_json"),
    row("messages of an assistant alone", dapo, rows({"prompt": ASSISTANT, "answer": "2"}), "line 1", "begin it with"),
    row("answers that no rule can read", gspo, rows(*[{**GOOD, "answer": "#1#2"}] * 3), "REWARDS", "own answer of 3"),
    row("a file that may not be read", gspo, prompts(not_allowed), "cannot read", marks=(as_root,)),
    row("a file that is not there", grpo, ["--prompts", "data/none.jsonl"], "'data/none.jsonl'", "--prompts"),
    row("a folder that is not there", dapo, ["--prompts", "mine/none.jsonl"], "'mine/none.jsonl'", "no such file"),
    row("the prompts themselves", gspo, ["--prompts", "What is 1+1? " * 40], "PROMPTS", "no such file"),
    row("a home of nobody", grpo, ["--prompts", "~nobody-here/a.jsonl"], "~nobody-here", "home directory"),
    row("a name too long for any file", dapo, ["--prompts", "a" * 300 + "/b"], "no such file", "--prompts"),
    row("no column of that name", gspo, ["--prompt-column", "question"], "line 1", "'question'", "PROMPT_COLUMN"),
    row("an answer left out", grpo, rows(GOOD, {"prompt": "1="}), "line 2", "no field 'answer'", "ANSWER_COLUMN"),
    row("an answer that is null", dapo, rows({**GOOD, "answer": None}), "line 1", "'answer' is null"),
    row("an answer that is NaN", gspo, rows(GOOD, {**GOOD, "answer": float("nan")}), "line 2", "'answer' is nan"),
    row("an answer that is infinite", grpo, rows({**GOOD, "answer": float("inf")}), "line 1", "'answer' is inf"),
    row("an answer that is a list", dapo, rows({**GOOD, "answer": [1, 2]}), "line 1", "'answer' is [1, 2]", "a text"),
    row("an answer that is an object", gspo, rows({**GOOD, "answer": {"a": 1}}), "line 1", "'answer' is {'a': 1}"),
    row("Parquet with two answers", grpo, parquet({**GOOD, "answer": ["2", "3"]}), "row 1", "'answer' is ['2', '3']"),
    row("Parquet with NaN for an answer", dapo, parquet({**GOOD, "answer": float("nan")}), "row 1", "'answer' is nan"),
    row("an answer that is empty", dapo, rows({**GOOD, "answer": " "}), "line 1", "'answer' is empty"),
    row("a prompt that is null", gspo, rows({**GOOD, "prompt": None}), "line 1", "'prompt' must be a text"),
    row("a prompt that is empty", grpo, rows(GOOD, {**GOOD, "prompt": " \n"}), "line 2", "not empty"),
    row("a prompt that is a number", dapo, rows({**GOOD, "prompt": 5}), "line 1", "'prompt' must be a text"),
    row("half a character", gspo, rows({**GOOD, "prompt": "1=\ud83d"}), "line 1", "surrogate"),
    row("no messages", gspo, rows({**GOOD, "prompt": []}), "line 1", "messages with role and content"),
    row("a message without role", grpo, rows({**GOOD, "prompt": [{"content": "1="}]}), "line 1", "role"),
    row("a role that is a number", dapo, rows({**GOOD, "prompt": [{"role": 1, "content": "1="}]}), "line 1", "role"),
    row("a message that is a text", dapo, rows({**GOOD, "prompt": ["1="]}), "line 1", "role and content"),
    row("a message that is not in a list", gspo, rows({**GOOD, "prompt": {"role": "user", "content": "1="}}), "line 1"),
    row("content in parts", grpo, rows({**GOOD, "prompt": [{"role": "user", "content": [{"text": "1="}]}]}), "line 1"),
    row("a nested prompt", dapo, rows({**GOOD, "prompt": [[{"role": "user", "content": "1="}]]}), "line 1", "role"),
    row(
        "JSON that is cut short",
        gspo,
        prompts(b'[{"prompt": "1+', "a.json"),
        "a.json, line 1",
        "not JSON (Unterminated",
    ),
    row("an empty JSON file", grpo, prompts(b"", "a.json"), "a.json", "no prompts"),
    row("a JSON file of blanks", dapo, prompts(b" \n ", "a.json"), "a.json", "no prompts"),
    row("a JSON list of nothing", dapo, prompts(b"[]", "a.json"), "a.json", "no prompts"),
    row("JSON texts, not objects", gspo, prompts(b'["1+1=", "2+2="]', "a.json"), "a.json, row 1", "JSON object"),
    row("JSON prompts of two types", grpo, prompts(b'[{"prompt": "1="}, {"prompt": 5}]', "a.json"), "a.json"),
    row("JSON with the rows below a key", grpo, prompts(json.dumps({"data": [GOOD]}).encode(), "a.json"), "'prompt'"),
    row("JSON in UTF-16", dapo, prompts(json.dumps([GOOD]).encode("utf-16"), "a.json"), "a.json, line 1", "UTF-8"),
    row("a truncated Parquet file", gspo, prompts(truncated_parquet, "a.parquet"), "a.parquet", "write the file anew"),
    row("an empty Parquet file", grpo, prompts(b"", "a.parquet"), "a.parquet", "no prompts"),
    row("text named as Parquet", dapo, prompts(json.dumps(GOOD).encode(), "a.parquet"), "a.parquet", "cannot be read"),
    row(
        "Parquet named as JSONL", gspo, prompts(b"PAR1\x15\x04\x15\xff\xfePAR1"), "prompts.jsonl", "or JSON or Parquet"
    ),
    row("Parquet with numbers for prompts", grpo, parquet({**GOOD, "prompt": 5}), "row 1", "'prompt' must be a text"),
    row("Parquet with bytes for prompts", dapo, parquet({**GOOD, "prompt": b"1="}), "row 1", "'prompt' must be a text"),
    row("Parquet without the column", gspo, parquet({"question": "1=", "answer": "1"}), "row 1", "it has question"),
    row("Parquet with a null among answers", grpo, parquet(GOOD, {**GOOD, "answer": None}), "row 2", "null"),
    row("prompts longer than the context", gspo, rows({**GOOD, "prompt": LONG}), "longer than the 40", "shorten"),
    row("prompts longer than asked for", dapo, ["--max-prompt-tokens", 2], "longer than the 2 ", "--max-prompt-tokens"),
    row("prompts of unknown letters", grpo, rows({**GOOD, "prompt": "zwei"}), "no prompt has a token", "letters"),
    row("no room for a prompt", dapo, ["--max-completion-tokens", 48], "leaves no room", "--max-completion-tokens"),
    row("held-out prompts broken", dapo, eval_prompts(b'{"prompt": '), "held-out.jsonl, line 1", "not JSON"),
    row("held-out prompts too long", gspo, eval_prompts(json.dumps({**GOOD, "prompt": LONG}).encode()), "held-out"),
    row("held-out prompts missing", grpo, ["--eval-prompts", "none.jsonl"], "EVAL_PROMPTS = 'none.jsonl'"),
    row("nothing left to hold out", dapo, rows(GOOD, flags=["--eval-prompts", ""]), "too few", "--eval-prompts"),
    row(
        "a Hub dataset while offline", gspo, ["--prompts", "nobody/nothing"], "'nobody/nothing'", "unset HF_HUB_OFFLINE"
    ),
    row("a preset of the Hub while offline", grpo, ["--preset", "gsm8k"], "'openai/gsm8k'", "unset HF_HUB_OFFLINE"),
]

T5 = transformers.T5Config(vocab_size=14, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
BLOOM = transformers.BloomConfig(vocab_size=14, hidden_size=8, n_layer=1, n_head=2)
GRANITE = transformers.GraniteConfig(**SIZES, vocab_size=14, logits_scaling=9.0)
QUANTIZED = {"quant_method": "gptq", "bits": 4}
UNKNOWN = b'{"version": "1.0", "added_tokens": [], "model": {"type": "Unheard"}}'
REMOTE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}

MODELS = [
    row("a policy that is not there", gspo, ["--policy-model", "no-such"], "'no-such'", "--policy-model", "owner/name"),
    row(
        "a policy of the Hub while offline", grpo, ["--policy-model", "nobody/x"], "'nobody/x'", "unset HF_HUB_OFFLINE"
    ),
    row("a policy of the Hub beside its owner's folder", gspo, owners_folder, "in the folder 'Qwen' that is here"),
    row("a policy that is a file", dapo, ["--policy-model", __file__], "POLICY_MODEL", "no config.json"),
    row("a policy without config.json", gspo, model(removed("config.json")), "no config.json", "save_pretrained"),
    row("an adapter alone", grpo, model(adapter_alone), "POLICY_MODEL", "adapter", "--merge-lora"),
    row("a config.json that is not JSON", dapo, model(overwritten("config.json", b"{")), "POLICY_MODEL", "config.json"),
    row(
        "a generation_config.json that is not JSON",
        gspo,
        model(overwritten("generation_config.json", b"{")),
        "POLICY_MODEL",
        "generation_config.json",
        "save",
    ),
    row("a config.json that is a list", gspo, model(overwritten("config.json", b"[]")), "POLICY_MODEL", "again"),
    row("a config.json that says nothing", grpo, model(overwritten("config.json", b"{}")), "`model_type`"),
    row("an unknown architecture", dapo, model(edited("config.json", model_type="brain")), "`brain`", "transformers"),
    row("a size that is a word", gspo, model(edited("config.json", hidden_size="big")), "POLICY_MODEL", "hidden_size"),
    row("a model that is no language model", grpo, model(saved(transformers.T5Model, T5)), "POLICY_MODEL", "T5Config"),
    row("another kind of attention", dapo, model(saved(transformers.BloomForCausalLM, BLOOM)), "Bloom", "like Qwen3"),
    row("scaled logits", gspo, model(saved(transformers.GraniteForCausalLM, GRANITE)), "changes its logits", "give a"),
    row("quantized weights", grpo, model(edited("config.json", quantization_config=QUANTIZED)), "GPTQ", "install"),
    row("code that may not run", gspo, model(edited("config.json", auto_map=REMOTE, model_type="x")), "--trust-remote"),
    row("no weights", gspo, model(removed("model.safetensors")), "POLICY_MODEL", "again, with safetensors"),
    row("pickled weights alone", grpo, model(pickled), "POLICY_MODEL", "again, with safetensors"),
    row("a shard of the weights missing", dapo, model(sharded), "model-00001-of-00002.safetensors"),
    row("truncated weights", gspo, model(cut_short), "POLICY_MODEL", "cannot be loaded", "again"),
    row("empty weights", grpo, model(overwritten("model.safetensors", b"")), "POLICY_MODEL", "cannot be loaded"),
    row(
        "a tensor of another shape",
        dapo,
        model(weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(9)}))),
        "do not fit its config",
        "model.norm.weight",
    ),
    row(
        "a tensor missing",
        gspo,
        model(weights(lambda tensors: tensors.pop("model.norm.weight"))),
        "missing keys",
        "model.norm.weight",
    ),
    row(
        "a tensor too many",
        grpo,
        model(weights(lambda tensors: tensors.update({"model.extra": torch.ones(2)}))),
        "unexpected keys",
        "model.extra",
    ),
    row(
        "weights that are not numbers",
        dapo,
        model(weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))),
        "POLICY_MODEL",
        "not finite",
    ),
    row("LoRA on layers that are not there", gspo, ["--lora-rank", 2, "--lora-targets", "x"], "LORA_TARGETS = 'x'"),
    row("a reward model with two logits", grpo, model(two_logits, "reward"), "2 logits", "--reward-model"),
    row("a critic that is not there", ppo, ["--critic-model", "mine/a/critic"], "CRITIC_MODEL", "no such file"),
    row("a critic with two logits", ppo, critic(two_logits), "CRITIC_MODEL", "2 logits", "a single logit"),
    row("a critic with another vocabulary", ppo, critic(more_tokens), "CRITIC_MODEL", "the policy's vocabulary"),
    row("a reward model that is a causal model", dapo, causal_reward, "REWARD_MODEL", "missing keys ['score.weight']"),
    row(
        "a token classifier where a sequence is to be scored",
        gspo,
        model(token_classifier, "reward"),
        "unexpected keys ['score.bias']",
        "for a token classifier --no-use-sequence-level-reward",
    ),
    row(
        "a sequence classifier where tokens are to be scored",
        grpo,
        model(lambda path: None, "reward", ["--no-use-sequence-level-reward"]),
        "missing keys ['score.bias']",
        "for a sequence classifier --use-sequence-level-reward",
    ),
    row("a policy that is a classifier", gspo, classifier_policy, "POLICY_MODEL", "unexpected keys ['score.weight']"),
    row(
        "a reward model that is not numbers",
        grpo,
        model(weights(lambda tensors: tensors["score.weight"].fill_(float("inf"))), "reward"),
        "REWARD_MODEL",
        "for the first prompt",
    ),
    row("a reward tokenizer too large", dapo, model(more_tokens, "reward"), "REWARD_MODEL", "18 tokens"),
    row("a reward template that raises", gspo, model(template("{{ 1 / 0 }}"), "reward"), "REWARD_MODEL", "refuses"),
    row("a reward model without weights", gspo, model(removed("model.safetensors"), "reward"), "REWARD_MODEL"),
]

TOKENIZERS = [
    row("no tokenizer", gspo, model(removed("tokenizer.json", "tokenizer_config.json")), "tokenizer"),
    row("no tokenizer that is known", grpo, model(without_tokenizer), "no tokenizer files there", "save the tokenizer"),
    row("a tokenizer.json that is not JSON", grpo, model(overwritten("tokenizer.json", b"{")), "the tokenizer"),
    row("a tokenizer.json of something else", dapo, model(overwritten("tokenizer.json", b"{}")), "the tokenizer"),
    row("a tokenizer.json of no model", gspo, model(overwritten("tokenizer.json", UNKNOWN)), "the tokenizer cannot"),
    row(
        "a tokenizer without padding and end",
        gspo,
        model(edited("tokenizer_config.json", remove=("pad_token", "eos_token"))),
        "no pad and no end-of-sequence token",
        "eos_token",
    ),
    row("a tokenizer larger than the model", grpo, model(more_tokens), "18 tokens, the model only 14", "fits"),
    row("a template that raises", dapo, model(template("{{ raise_exception('no system') }}")), "refuses", "no system"),
    row("a template with a mistake", gspo, model(template("{% for m in messages %}")), "template", "endfor"),
    row("a template that says nothing", grpo, model(template("{# nothing #}")), "no prompt has a token"),
    row("a template in UTF-16", dapo, model(overwritten("chat_template.jinja", b"\xff\xfe\x00")), "the tokenizer"),
    row(
        "an end of sequence in words",
        grpo,
        model(edited("generation_config.json", eos_token_id="end")),
        "'end'",
        "generation_config",
    ),
]

REWARDS = [
    row("an unknown reward", gspo, ["--rewards", "exact_macht"], "'exact_macht'", "exact_match"),
    row("a weight that is no number", grpo, ["--rewards", "math much"], "'math much'", "name weight"),
    row("a weight before its name", dapo, ["--rewards", "1.0 math"], "'1.0 math'", "name weight"),
    row("a comma forgotten", gspo, ["--rewards", "math 1.0 format 0.2"], "REWARDS", "name weight, name weight"),
    row("a comma too many", grpo, ["--rewards", "math 1,"], "REWARDS", "name weight"),
    row("a weight that is infinite", dapo, ["--rewards", "math inf"], "math", "finite"),
    row("a reward twice", gspo, ["--rewards", "math 1, math 2"], "REWARDS", "math is there twice"),
    row("a reward under both its names", grpo, ["--rewards", "math_reward, math"], "REWARDS", "math is there twice"),
    row("weights that are all zero", grpo, ["--rewards", "math 0, format 0"], "REWARDS", "all weights are zero"),
    row("a helper as reward", dapo, ["--rewards", "find_answer"], "'find_answer'", "(text); a rule must take (prompt,"),
    row(
        "a model to evaluate with",
        gspo,
        ["--eval-reward", "reward_model"],
        "EVAL_REWARD",
        "no rule 'reward_model'",
        "exact_match",
    ),
    row("a rule that is no accuracy to evaluate with", grpo, ["--eval-reward", "length"], "EVAL_REWARD", "1 for what"),
]

PLACES = [
    row("a device that does not exist", gspo, ["--policy-device", "cuda:7"], "'cuda:7'", "--policy-device cpu"),
    row("a device of no kind", grpo, ["--reward-device", "gpu"], "REWARD_DEVICE = 'gpu'", "--reward-device cpu"),
    row("a device without storage", dapo, ["--ref-device", "meta"], "REF_DEVICE = 'meta'", "no such device"),
    row("an output folder that is a file", gspo, output_is_a_file, "OUTPUT_DIR", "cannot write there", "give another"),
    row("an output folder of nobody", dapo, ["--output-dir", "~nobody-here/x"], "OUTPUT_DIR", "home", "--output-dir"),
    row("an output folder without a disk", grpo, constants(OUTPUT_DIR="/proc/none"), "OUTPUT_DIR = '/proc/none'"),
    row("an output folder to read only", dapo, read_only, "OUTPUT_DIR", "cannot write there", marks=(as_root,)),
    row("a logger not installed", dapo, ["--wandb-project", "x"], "WANDB_PROJECT", "pip install", marks=(no_wandb,)),
]

KINDS = {
    "flags": FLAGS,
    "constants": CONSTANTS,
    "prompts": DATA,
    "models": MODELS,
    "tokenizers and templates": TOKENIZERS,
    "rewards": REWARDS,
    "devices and folders": PLACES,
}
ROWS = [row for rows in KINDS.values() for row in rows]


def set_up(row, folder, made):
    """Sets the script's constants for a small run on what was made, and then breaks what the row says.

    Returns the flags to start with.
    """
    vars(row.script).update(
        POLICY_MODEL=str(made / "policy"),
        REWARD_MODEL=str(made / "reward"),
        PROMPTS=str(made / "rows.jsonl"),
        EVAL_PROMPTS=str(made / "rows.jsonl"),
        REWARDS="exact_match",
        MAX_COMPLETION_TOKENS=8,
        MAX_STEPS=1,
        EVAL_SIZE=2,
        OUTPUT_DIR=str(folder / "outputs"),
    )
    broken = row.broken if isinstance(row.broken, list) else row.broken(row.script, folder, made)
    return [str(word) for word in broken]


def contents(folder):
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name, marks=row.marks) for row in ROWS])
def test_a_mistake_ends_in_one_line(row, made, tmp_path, capsys, monkeypatch):
    argv = set_up(row, tmp_path, made)
    monkeypatch.chdir(tmp_path)
    before, _ = contents(tmp_path), capsys.readouterr()
    for handler in [handler for name in LIBRARIES for handler in logging.getLogger(name).handlers]:
        if type(handler) is logging.StreamHandler:  # not one of pytest; it holds the stderr from before capsys
            monkeypatch.setattr(handler, "stream", sys.stderr)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(SystemExit) as exit_:
        warnings.simplefilter("default")
        row.script.main(argv)
    err = capsys.readouterr().err
    assert not [str(warning) for warning in warned if not issubclass(warning.category, QUIET)]
    assert exit_.value.code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert len(err) < 800, err
    for word in row.words:
        assert word in err, err
    assert contents(tmp_path) == before


def test_ctrl_c_before_a_run_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gspo, "GSPOTrainer", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit_:
        gspo.main([])
    err = capsys.readouterr().err
    assert exit_.value.code == 130 and err.count("\n") == 1 and "before a run began" in err


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_mistake(tmp_path, file):
    (tmp_path / file).write_bytes(json.dumps(GOOD).encode("utf-8-sig"))
    (row,) = load_prompts(str(tmp_path / file), "PROMPTS", "prompt", "answer")
    assert (row["prompt"], row["answer"]) == ("1+1=", "2")


def test_docs_list_what_the_table_holds():
    page = (configs.HERE / "docs" / "bad-input.md").read_text()
    _, *parts = page.split("\n## ")
    lists = {title.split(":")[0]: body for title, _, body in (part.partition("\n") for part in parts)}
    assert list(lists) == [kind.capitalize() for kind in KINDS]
    for kind, rows in KINDS.items():
        listed = "".join(f"- {row.name}\n" for row in rows)
        assert lists[kind.capitalize()].strip() == listed.strip(), f"docs/bad-input.md, {kind}:\n{listed}"
