"""Real models and data, made on the spot: a chat tokenizer, several architectures, LoRA, Parquet, GSM8K's format."""

import json
import shutil
import warnings

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import SCRIPTS, keep_weights, let_the_policy_train, trainer_of
from torch.utils.flop_counter import FlopCounterMode

import configs
import dapo
import grpo
import gspo
from engine import packing
from engine.sampling import assemble
from inputs import load
from inputs.chat import encode_prompts
from inputs.prompts import load_prompts
from scoring.reward_models import RewardModel

datasets.disable_progress_bars()  # stderr is for messages to a person
ARITHMETIC = configs.HERE / "data/models/arithmetic-policy"
GSM8K = configs.HERE.parent / "shared" / "gsm8k" / "train.jsonl"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if add_generation_prompt and not enable_thinking %}<think></think>{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
ARCHITECTURES = {
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"attention_dropout": 0.2}),  # a model that drops in training mode
    "llama": (transformers.LlamaConfig, {}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    ),
}


def gsm8k_rows(count):
    """Returns rows in the form of GSM8K's. They are the same on every machine."""
    return [
        {
            "question": f"Ann has {i} pens and buys {i + 2} more. How many has she?",
            "answer": f"{i}+{i + 2}\n#### {2 * i + 2}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tokenizer():
    """Returns a BPE tokenizer with a chat template and two ends of sequence. The second one is also the padding."""
    lines = [row["question"] + " " + row["answer"] for row in gsm8k_rows(300)]
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    bpe.train_from_iterator(lines, vocab_size=600, special_tokens=special, show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special,
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """Returns a function that makes a chat model of an architecture, with random weights, and returns its folder."""
    made = {}

    def make(name):
        if name not in made:
            config_class, extra = ARCHITECTURES[name]
            torch.manual_seed(0)
            config = config_class(**SIZES, **extra, vocab_size=len(tokenizer))
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.generation_config.eos_token_id = [1, 2]
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = folder
        return str(made[name])

    return make


@pytest.fixture
def gsm8k_files(tmp_path):
    rows = gsm8k_rows(24)
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def set_up(script, model, files, **constants):
    vars(script).update(
        POLICY_MODEL=model,
        PROMPTS=str(files / "rows.parquet"),
        EVAL_PROMPTS=str(files / "rows.jsonl"),
        PROMPT_COLUMN="question",
        REWARDS="math 1.0, format 0.2, length 0.5",
        EVAL_REWARD="math",
        SYSTEM_PROMPT="Be brief.",
        MAX_STEPS=2,
        BATCH_SIZE=2,
        GROUP_SIZE=4,
        MINI_BATCHES=2,
        EVAL_SIZE=3,
        EVAL_SAMPLES=1,
        WARMUP_STEPS=0,
        MAX_COMPLETION_TOKENS=12,
        KL_COEF=0.04,
        SAVE_EVERY=1,
        OUTPUT_DIR=str(files / "outputs"),
    )
    let_the_policy_train(script)
    vars(script).update(constants)
    return trainer_of(script)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("script", "architecture"),
    [*((gspo, architecture) for architecture in ARCHITECTURES), (grpo, "qwen3"), (dapo, "qwen3")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_two_steps_on_gsm8k_rows_then_reload_and_generate(model_folder, gsm8k_files, tokenizer, script, architecture):
    script.OVERLONG_FILTER = False  # of dapo.py: a random model seldom ends
    trainer = set_up(script, model_folder(architecture), gsm8k_files)
    assert trainer.eos_ids == [1, 2] and trainer.tokenizer.pad_token_id == 2
    before, history = weights(trainer.policy), trainer.train()
    unmoved = [name for name, value in trainer.policy.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name in unmoved if "experts" not in name], unmoved  # an expert may get no token
    assert history[1]["sampler_gap"] < 1e-4 and {"reward_math", "reward_format", "reward_length"} <= set(history[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(trainer.run.folder / "final")
    reloaded = transformers.AutoTokenizer.from_pretrained(trainer.run.folder / "final")
    assert reloaded.chat_template == tokenizer.chat_template
    for name, value in trainer.policy.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], value)
    assert generates(model, trainer)


@pytest.mark.parametrize(
    ("script", "name"),
    [*[(script, "qwen3") for script in SCRIPTS], (gspo, "qwen3_moe")],  # of the last, peft adapts the experts, too
    ids=lambda value: getattr(value, "__name__", value),
)
def test_lora_trains_the_adapter_alone_and_final_holds_it_merged(model_folder, gsm8k_files, script, name):
    trainer = set_up(script, model_folder(name), gsm8k_files, LORA_RANK=4, LEARNING_RATE=0.05)
    script.OVERLONG_FILTER = False  # of dapo.py: a random model seldom ends
    rollouts = trainer.generate_responses_with_group_sampling(1)
    assert trainer.reference is None or trainer.reference.is_policy
    first = trainer.compute_log_probs(trainer.policy, rollouts)
    before = weights(trainer.policy)
    history = trainer.train()
    moved = {name for name, value in trainer.policy.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert {name.rpartition(".lora_")[0] for name in moved} == {
        name.rpartition(".lora_")[0] for name in before if ".lora_" in name
    }
    assert history[1]["kl_divergence"] is not None and history[2]["kl_divergence"] > 0
    with trainer.adapter.disable_adapter():  # the reference is the policy as it was before training
        torch.testing.assert_close(trainer.compute_log_probs(trainer.policy, rollouts), first)
    now = trainer.compute_log_probs(trainer.policy, rollouts)
    assert (now - first).abs().max() > 1e-3
    folder = trainer.run.folder
    assert (folder / "checkpoints/step-1/adapter_config.json").is_file()
    assert (folder / "checkpoints/step-1/adapter_model.safetensors").stat().st_size < 50_000
    assert not list(folder.rglob("README.md"))  # peft's empty model card
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(info.values())
    model.set_attn_implementation(packing.NAME)
    torch.testing.assert_close(trainer.compute_log_probs(model.eval(), rollouts), now, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(trainer.compute_log_probs(trainer.policy, rollouts), now, rtol=1e-4, atol=1e-5)
    assert generates(model, trainer) and not (folder / "final/adapter_config.json").exists()


def generates(model, trainer):
    """Returns a model's completion of the first held-out prompt, by its own generate()."""
    ids = torch.tensor([trainer.eval_rows[0]["prompt_ids"]])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)[0, ids.shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers to peft
def test_without_merging_final_is_the_adapter_alone(model_folder, gsm8k_files):
    constants = {"LORA_RANK": 4, "LEARNING_RATE": 0.05, "MERGE_LORA": False}
    trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, **constants)
    trainer.train()
    final = trainer.run.folder / "final"
    assert (final / "adapter_config.json").is_file() and not (final / "model.safetensors").exists()
    assert not (final / "README.md").exists()
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    model = peft.PeftModel.from_pretrained(base, final).eval()
    rollouts = trainer.generate_responses_with_group_sampling(3)
    expected = trainer.compute_log_probs(trainer.policy, rollouts)
    model.base_model.model.set_attn_implementation(packing.NAME)
    torch.testing.assert_close(trainer.compute_log_probs(model.base_model.model, rollouts), expected)
    model.base_model.model.set_attn_implementation("sdpa")
    assert generates(model, trainer)


def test_revision_and_trust_reach_transformers(model_folder, gsm8k_files, monkeypatch):
    asked = []
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        kind = getattr(transformers, name)

        def from_pretrained(place, *, name=name, load=kind.from_pretrained, **options):
            asked.append((name, place, options["revision"], options["trust_remote_code"]))
            return load(place, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    constants = {"POLICY_REVISION": "v1", "REWARD_REVISION": "v2", "REWARDS": "reward_model", "KL_COEF": 0.1}
    policy = model_folder("qwen3")
    reward = gspo.REWARD_MODEL = str(configs.HERE / gspo.REWARD_MODEL)
    for trust in (False, True):
        set_up(gspo, policy, gsm8k_files, **constants, TRUST_REMOTE_CODE=trust)
        assert sorted(asked) == sorted(
            [
                ("AutoModelForCausalLM", policy, "v1", trust),
                ("AutoModelForCausalLM", policy, "v1", trust),  # the reference
                ("AutoModelForSequenceClassification", reward, "v2", trust),
                ("AutoTokenizer", policy, "v1", trust),
                ("AutoTokenizer", reward, "v2", trust),
            ]
        )
        asked.clear()


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_two_steps_on_rows_of_gsm8k_itself(model_folder, tmp_path, script):
    (tmp_path / "rows.jsonl").write_text("".join(GSM8K.read_text().splitlines(keepends=True)[:40]))
    script.OVERLONG_FILTER = False  # of dapo.py: a random model seldom ends
    prompts = {"PROMPTS": str(tmp_path / "rows.jsonl"), "EVAL_PROMPTS": ""}
    trainer = set_up(script, model_folder("qwen3"), tmp_path, **prompts)
    assert len(trainer.train_rows) == 38 and trainer.train_rows[0]["answer"].count("#### ") == 1
    assert trainer.rewards(trainer.train_rows, [row["answer"] for row in trainer.train_rows]) == pytest.approx(
        [1.2 - 0.5 * len(row["answer"]) / 1000 for row in trainer.train_rows]  # each answer is right by its own rule
    )
    assert trainer.train()[2]["reward_failures"] == 0


def gradient_of_an_update(trainer):
    keep_weights(trainer)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rollouts.old_logps = rollouts.sampled_logps.clone()
    rollouts.ref_logps = rollouts.old_logps - 0.1
    rollouts.advantages = torch.randn(len(rollouts.texts), generator=torch.Generator().manual_seed(0))
    trainer.update(rollouts)
    return torch.cat([gradient.flatten() for gradient in trainer.gradients.values()])


@pytest.mark.parametrize("constants", [{"GRADIENT_CHECKPOINTING": True}, {"LOGITS_AT_ONCE": 4000}])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_saving_memory_changes_no_gradient(model_folder, gsm8k_files, architecture, constants):
    gspo.MAX_GRAD_NORM, gspo.ENTROPY_COEF = 1e9, 0.1
    expected = gradient_of_an_update(set_up(gspo, model_folder(architecture), gsm8k_files))
    trainer = set_up(gspo, model_folder(architecture), gsm8k_files, **constants)
    torch.testing.assert_close(gradient_of_an_update(trainer), expected, rtol=1e-4, atol=1e-6)


def test_prompts_go_through_the_chat_template_with_system_prompt_and_thinking(model_folder, gsm8k_files):
    for thinking, opening in ((False, "<|im_start|>assistant\n<think></think>"), (True, "<|im_start|>assistant\n")):
        trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, THINKING=thinking)
        question = trainer.eval_rows[0]["question"]
        text = f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n{opening}"
        assert trainer.eval_rows[0]["prompt_text"] == text
        assert trainer.tokenizer.decode(trainer.eval_rows[0]["prompt_ids"]) == text


def test_prompts_may_be_lists_of_messages_and_base_models_get_the_plain_text(tokenizer, tmp_path):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2+3"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": chat, "answer": 5}) + "\n")
    rows = load_prompts(str(path), "PROMPTS", "prompt", "answer")
    assert rows[0]["messages"] == chat and rows[0]["answer"] == "5"
    (row,) = encode_prompts(rows, tokenizer, 99, "here")
    assert row["prompt_text"].count("<|im_start|>") == 4 and "assistant\nYes?<|im_end|>" in row["prompt_text"]
    plain = transformers.AutoTokenizer.from_pretrained(configs.HERE / "data/models/arithmetic-policy")
    plain.chat_template = None
    assert encode_prompts(rows, plain, 99, "here")[0]["prompt_text"] == "Hi\nYes?\n2+3"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(gsm8k_files, kind):
    rows = load_prompts(str(gsm8k_files / f"rows.{kind}"), "PROMPTS", "question", "answer")
    expected = gsm8k_rows(24)
    assert [(row["prompt"], row["answer"]) for row in rows] == [(row["question"], row["answer"]) for row in expected]


def test_a_hub_dataset_is_read_by_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(gsm8k_rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_prompts("openai/gsm8k", "PROMPTS", "question", "answer", "main", "test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})] and len(rows) == 3


def test_a_split_that_is_not_there_is_one_line(capsys, tmp_path, monkeypatch):
    def load_dataset(*_, split):
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    err = refused(capsys, tmp_path, "--prompts", "nobody/nothing", "--prompts-split", "tomorrow")
    assert "'nobody/nothing', split 'tomorrow', cannot be loaded: Unknown split" in err and "['train', 'test']" in err
    assert "check id, configuration, split" in err


def test_prompts_are_held_out_by_share_and_long_ones_left_out_and_counted(model_folder, gsm8k_files, capsys):
    trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, EVAL_PROMPTS="", EVAL_SHARE=0.25, EVAL_SIZE=99)
    train, held_out = ({row["prompt"] for row in rows} for rows in (trainer.train_rows, trainer.eval_rows))
    assert len(train) == 18 and len(held_out) == 6 and not train & held_out
    again = set_up(gspo, model_folder("qwen3"), gsm8k_files, EVAL_PROMPTS="", EVAL_SHARE=0.25, EVAL_SIZE=99)
    assert [row["prompt"] for row in again.eval_rows] == [row["prompt"] for row in trainer.eval_rows]
    lengths = sorted(len(row["prompt_ids"]) for row in trainer.train_rows)
    capsys.readouterr()
    fewer = set_up(
        gspo, model_folder("qwen3"), gsm8k_files, EVAL_PROMPTS="", EVAL_SHARE=0.25, MAX_PROMPT_TOKENS=lengths[9]
    )
    assert all(len(row["prompt_ids"]) <= lengths[9] for row in fewer.train_rows)
    left_out = 18 - len(fewer.train_rows)
    assert left_out == sum(n > lengths[9] for n in lengths) > 0
    assert f"left out {left_out} of 18 prompts" in capsys.readouterr().out


def test_another_task_is_not_evaluated_on_the_embedded_one(model_folder, gsm8k_files, capsys):
    shipped = [(script.PROMPTS, script.EVAL_PROMPTS) for script in SCRIPTS]
    assert shipped == [load.EMBEDDED] * len(SCRIPTS)
    trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, EVAL_PROMPTS=load.EMBEDDED[1], EVAL_SIZE=99)
    questions = {row["question"] for row in gsm8k_rows(24)}
    assert {row["prompt"] for row in trainer.train_rows + trainer.eval_rows} == questions
    assert len(trainer.eval_rows) == 1 and len(trainer.train_rows) == 23
    out = capsys.readouterr().out
    assert out.count("holding out 5% of PROMPTS") == 1
    vars(gspo).update(PROMPTS=load.EMBEDDED[0], PROMPT_COLUMN="prompt")
    assert len(trainer_of(gspo).train_rows) == 4096 and "holding out" not in capsys.readouterr().out


def test_gradient_checkpointing_works_by_its_old_and_new_name(model_folder, gsm8k_files, monkeypatch):
    """transformers has renamed the method, and warns of the old name.

    requirements.txt allows versions with either name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        set_up(gspo, model_folder("qwen3"), gsm8k_files, GRADIENT_CHECKPOINTING=True)
        set_up(gspo, model_folder("qwen3"), gsm8k_files, GRADIENT_CHECKPOINTING=True, LORA_RANK=2)
    called = []
    monkeypatch.setattr(
        transformers.PreTrainedModel, "gradient_checkpointing_enable", lambda *a: called.append(a[1:]), raising=False
    )
    monkeypatch.delattr(transformers.PreTrainedModel, "activation_checkpointing_enable", raising=False)
    set_up(gspo, model_folder("qwen3"), gsm8k_files, GRADIENT_CHECKPOINTING=True)
    assert called == [({"use_reentrant": False},)]


def test_a_reward_model_sees_its_own_template_and_a_cut_is_counted(tokenizer, model_folder):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SIZES | {"max_position_embeddings": 48}, vocab_size=len(tokenizer), num_labels=1
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    reward = RewardModel(model, tokenizer, "made here", lambda lengths: packing.batches_of(lengths, 30))
    rows = [{"prompt": "2+3", "messages": [{"role": "user", "content": "2+3"}]}] * 3
    texts = ["5", "6 and more words to make it long" * 8, "5"]
    scores = reward(rows, texts, None)
    alone = tokenizer("<|im_start|>user\n2+3<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n", return_tensors="pt")
    with torch.no_grad():
        assert scores[0] == scores[2] == pytest.approx(model(alone.input_ids).logits.item(), abs=1e-5)
    assert reward.report() == {"reward_cut": 1 / 3} and reward.report() == {"reward_cut": 0.0}
    assert scores[1] != scores[0]


# ---- Rewards per token


@pytest.fixture
def token_scorer(tokenizer, tmp_path):
    torch.manual_seed(1)
    config = transformers.Qwen3Config(**SIZES, vocab_size=len(tokenizer), num_labels=1)
    transformers.AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    return {"USE_SEQUENCE_LEVEL_REWARD": False, "REWARD_MODEL": str(tmp_path / "scorer"), "KL_COEF": 0.0}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_token_classifier_rewards_each_sampled_token(model_folder, gsm8k_files, token_scorer, script):
    script.OVERLONG_FILTER, script.OVERLONG_CACHE = False, 0  # of dapo.py
    script.RATIO_LEVEL = "sequence_token"  # of gspo.py
    constants = {**token_scorer, "REWARDS": "reward_model 0.5, length 2", "SAVE_EVERY": 0}
    trainer = set_up(script, model_folder("qwen3"), gsm8k_files, **constants)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    rewards = trainer.compute_rewards(rollouts)
    for i, text in enumerate(rollouts.texts):  # one sequence at a time, no padding
        start, end = int(rollouts.prompt_lengths[i]), int(rollouts.lengths[i])
        with torch.no_grad():
            expected = (
                0.5 * trainer.rewards.reward_model.model(rollouts.input_ids[i : i + 1, :end]).logits[0, start:, 0]
            )
        expected[-1] += 2 * -len(text) / 1000
        torch.testing.assert_close(rewards[i, : end - start], expected, rtol=1e-4, atol=1e-5)
        assert (rewards[i, end - start :] == 0).all()
    before, history = weights(trainer.policy), trainer.train()
    assert all(not torch.equal(value, before[name]) for name, value in trainer.policy.named_parameters())
    assert history[1]["reward_model"] and history[1]["reward_cut"] == 0 and history[1]["dead_groups"] < 1
    samples = [json.loads(line) for line in (trainer.run.folder / "samples.jsonl").read_text().splitlines()]
    assert len({round(row["reward"], 6) for row in samples}) > 1


def test_the_loss_moves_each_token_by_its_own_advantage(model_folder, gsm8k_files, token_scorer):
    """At ratio 1 the gradient of GSPO-token is that of −mean_i mean_t A_it log π_it."""
    constants = {**token_scorer, "REWARDS": "reward_model", "ENTROPY_COEF": 0.0, "MAX_GRAD_NORM": 1e9}
    trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, RATIO_LEVEL="sequence_token", **constants)
    keep_weights(trainer)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    mask = rollouts.completion_mask
    advantages = gspo.compute_token_advantages(trainer.compute_rewards(rollouts), mask, 4)
    rollouts.old_logps, rollouts.advantages = rollouts.sampled_logps.clone(), advantages
    trainer.update(rollouts)
    logps, _ = gspo.completion_logps(trainer.policy, rollouts)
    naive = -sum((advantages[i] * logps[i])[mask[i]].mean() for i in range(len(mask))) / len(mask)
    for one, other in zip(trainer.gradients.values(), torch.autograd.grad(naive, trainer.trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_only_the_tokens_that_end_a_step_are_scored(model_folder, gsm8k_files, token_scorer, tokenizer):
    constants = {**token_scorer, "REWARDS": "reward_model", "STEP_SEPARATOR": "\n\n", "RATIO_LEVEL": "token"}
    trainer = set_up(gspo, model_folder("qwen3"), gsm8k_files, **constants)
    completions = [tokenizer(text)["input_ids"] for text in ("2+2\n\n4+4\n\n#### 8", "none", "a\n\n")]
    lengths, rows = torch.tensor([len(ids) for ids in completions]), trainer.train_rows[:3]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in completions], batch_first=True)
    rollouts = assemble(tokenizer, rows, 1, padded, lengths, torch.zeros(padded.shape), lengths > 0)
    scored = trainer.compute_rewards(rollouts) != 0
    for i, ids in enumerate(completions):
        counts = [tokenizer.decode(ids[: t + 1]).count("\n\n") for t in range(len(ids))]
        ends = [count > (counts[t - 1] if t else 0) or t == len(ids) - 1 for t, count in enumerate(counts)]
        assert scored[i, : len(ids)].tolist() == ends
    assert scored.sum(1).tolist()[:2] == [3, 1]


def test_rewards_per_token_that_cannot_be(capsys, tmp_path, model_folder, token_scorer):
    flags = ("--policy-model", model_folder("qwen3"), "--no-use-sequence-level-reward")
    assert "--ratio-level sequence_token" in refused(capsys, tmp_path, *flags)
    gspo.RATIO_LEVEL = "sequence_token"
    assert "--rewards reward_model" in refused(capsys, tmp_path, *flags, "--rewards", "format")
    gspo.REWARDS = "reward_model"
    err = refused(capsys, tmp_path, "--reward-model", token_scorer["REWARD_MODEL"], "--policy-model", ARITHMETIC)
    assert "does not have the policy's vocabulary" in err


# ---- What cannot be used: one line, exit code 2, nothing written


def refused(capsys, tmp_path, *argv):
    with pytest.raises(SystemExit) as exit_:
        gspo.main(["--output-dir", str(tmp_path / "outputs"), *map(str, argv)])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "outputs").exists()
    return err


def parquet(tmp_path, rows):
    path = tmp_path / "bad.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_bad_data(capsys, tmp_path):
    good = {"question": "1+1=", "answer": "2"}
    path = parquet(tmp_path, [good])
    assert "no field 'prompt', it has question, answer" in refused(capsys, tmp_path, "--prompts", path)
    path = parquet(tmp_path, [good, {"question": "1+1=", "answer": None}])
    err = refused(capsys, tmp_path, "--prompts", path, "--prompt-column", "question")
    assert "row 2" in err and "'answer' is null" in err
    path = parquet(tmp_path, [{"question": 5, "answer": "2"}])
    assert "row 1" in refused(capsys, tmp_path, "--prompts", path, "--prompt-column", "question")
    path.write_bytes(b"PAR1 and then nothing")
    assert "cannot be read" in refused(capsys, tmp_path, "--prompts", path)
    (tmp_path / "bad.json").write_text('[\n{"prompt": [')
    assert "bad.json, line 2: not JSON" in refused(capsys, tmp_path, "--prompts", tmp_path / "bad.json")


def test_bad_models(capsys, tmp_path, model_folder):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    flags = ("--policy-model", folder)
    assert "LORA_TARGETS = 'nothing'" in refused(
        capsys, tmp_path, *flags, "--lora-rank", 4, "--lora-targets", "nothing"
    )
    assert "names the output head" in refused(capsys, tmp_path, *flags, "--lora-rank", 4, "--lora-targets", "lm_head")
    gspo.LORA_RANK = 0
    assert "leaves no room" in refused(capsys, tmp_path, *flags, "--max-completion-tokens", 512)
    gspo.MAX_COMPLETION_TOKENS = 12
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["more", "than", "the", "model"])
    tokenizer.save_pretrained(folder)
    assert "the tokenizer has 604 tokens, the model only 600" in refused(capsys, tmp_path, *flags)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder("qwen3"))
    tokenizer.chat_template = "{{ raise_exception('system is not supported') }}"
    tokenizer.save_pretrained(folder)
    assert "the chat template refuses" in refused(capsys, tmp_path, *flags)


def test_presets_change_constants_and_say_so(capsys):
    before = configs.constant_values(vars(gspo))
    configs.apply_overrides(vars(gspo), ["--preset", "gsm8k"])
    before["PRESET"] = gspo.PRESET
    out = capsys.readouterr().out
    assert gspo.POLICY_MODEL == "Qwen/Qwen3-0.6B" and gspo.CLIP_LOW == 3e-3 and gspo.EVAL_REWARD == "math"
    preset = configs.PRESETS["gsm8k"] | gspo.presets["gsm8k"]
    for name, value in configs.constant_values(vars(gspo)).items():
        expected = preset.get(name, before[name])
        assert value == expected, name
        assert (f"preset gsm8k: {name} = {expected!r}  (was {before[name]!r})" in out) == (expected != before[name])
    assert "preset gsm8k: CLIP_HIGH = 0.004  (was 0.04)" in out and "LOSS_DIVISOR" not in out


def test_a_link_to_a_script_has_the_scripts_preset(tmp_path):
    (tmp_path / "train.py").symlink_to(configs.HERE / "gspo.py")
    namespace = vars(gspo) | {"__file__": str(tmp_path / "train.py")}
    configs.apply_overrides(namespace, ["--preset", "gsm8k"])
    assert namespace["CLIP_LOW"] == 3e-3


@pytest.mark.parametrize(
    ("script", "preset"),
    [(script, preset) for script in SCRIPTS for preset in sorted({*configs.PRESETS, *script.presets})],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_preset_holds_constants_of_the_scripts_that_keep_the_rules(script, preset):
    own = script.presets.get(preset, {})
    assert {*configs.PRESETS.get(preset, {}), *own} <= {*configs.constant_values(vars(script))}
    configs.apply_overrides(vars(script), ["--preset", preset])


@pytest.mark.parametrize(
    "script, preset",
    [*((script, "smollm2") for script in SCRIPTS), (gspo, "smollm2-lora")],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_the_preset_of_a_chat_model_trains_with_any_script(script, preset, model_folder, tmp_path, capsys):
    """The model is a random one. What the preset says of sizes is made smaller, and nothing else."""
    small = ["--batch-size", "2", "--group-size", "4", "--eval-size", "2", "--max-completion-tokens", "4"]
    run = ["--max-steps", "2", "--save-every", "0", "--eval-every", "0", "--output-dir", str(tmp_path)]
    own = {"vapo": ["--value-pretrain-steps", "1"], "dapo": ["--no-dynamic-sampling"]}  # it is never right
    flags = [*small, *run, *own.get(script.__name__, [])]
    script.main(["--preset", preset, "--policy-model", model_folder("qwen3"), *flags])
    printed = capsys.readouterr().out
    assert "left out" not in printed and "far too high" not in printed and "Held-out accuracy" in printed
    assert script.WHOLE_GROUPS and script.LORA_RANK == (16 if preset == "smollm2-lora" else 0)


def test_against_trl_counts_what_an_update_of_a_chat_needs(model_folder, monkeypatch):
    """Torch's own counter sees the products of an update, forward and backward. One group of three is dead."""
    monkeypatch.syspath_prepend(configs.HERE / "benchmarks")
    import against_trl
    import workloads

    flags = ["--policy-model", model_folder("qwen3"), "--batch-size", "3", "--group-size", "4", "--mini-batches", "1"]
    workloads.set_constants("smollm2", "", 2, flags=["--kl-coef", "0", *flags])
    monkeypatch.setattr(against_trl, "accuracy", lambda *_: {})
    monkeypatch.setattr(grpo.GRPOTrainer, "compute_rewards", lambda *_: torch.tensor([1.0, 0, 0, 0] * 2 + 4 * [1.0]))
    gradient, products = grpo.GRPOTrainer.compute_gradient, []

    def counted_gradient(*arguments, **on_policy):
        with FlopCounterMode(display=False) as counter:
            done = gradient(*arguments, **on_policy)
        products.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
        return done

    monkeypatch.setattr(grpo.GRPOTrainer, "compute_gradient", counted_gradient)
    model, rows, *_ = against_trl.run_ours("smollm2", 2)
    for row, found in zip(rows, products, strict=True):
        assert row["moving"] == 8 * [True] + 4 * [False]
        sizes = row["sizes"][:8]
        tokens = workloads.useful_tokens(sizes)
        assert row["places"] == tokens and sizes[0][1] > 50  # the two solved stories that all chats begin with
        head = model.config.vocab_size * model.config.hidden_size * sum(t for *_, t in sizes)
        assert found == pytest.approx(3 * 2 * (workloads.parameters_of_layers(model) * tokens + head), rel=0.01)
