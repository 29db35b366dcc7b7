"""Tests that the ratio is 1 where nothing was learned: what it has besides is the noise of the arithmetic."""

from unittest import mock

import pytest
import torch
from test_run import timeless

from engine import vocabulary


@pytest.fixture
def bfloat16(small_script):
    """The arithmetic of a GPU on the CPU, for the sampler and for all passes of the policy."""
    small_script.COMPUTE_DTYPE = "bfloat16"


def resting(script, **constants):
    """Returns the metrics of three training steps whose updates leave the weights as they are."""
    vars(script).update({"LOGITS_AT_ONCE": 2**12, "EVAL_EVERY": 0, **constants})
    vars(script).update(dict.fromkeys({"VALUE_PRETRAIN_STEPS", "CRITIC_WARMUP_STEPS"} & set(vars(script)), 0))
    trainer = trainer_class(script)()
    trainer.optimizer.step = lambda: None
    return [trainer.train_step(step) for step in (1, 2, 3)]


def trainer_class(script):
    return getattr(script, f"{script.__name__.upper()}Trainer")


def epochs(script):
    return next(name for name in vars(script) if name.endswith("_EPOCHS"))


SPLITS = [
    {"MICRO_BATCH_TOKENS": 100, "MINI_BATCHES": 2},
    {"MICRO_BATCH_TOKENS": 4096, "MINI_BATCHES": 4, "WHOLE_GROUPS": True, "LORA_RANK": 4},
    {"MICRO_BATCH_TOKENS": 300, "MINI_BATCHES": 1, "ENTROPY_COEF": 0.0, "KL_COEF": 0.0, "GRADIENT_CHECKPOINTING": True},
]


@pytest.mark.parametrize("constants", SPLITS, ids=["small", "lora", "one_update"])
def test_without_learning_every_ratio_is_one_in_float32(small_script, constants):
    for row in resting(small_script, **constants):
        assert row["updates"] and row["sampler_gap_max"] < 2e-5
        assert 1 - 2e-5 < row["ratio_min"] <= row["ratio_max"] < 1 + 2e-5 and row["clip_fraction"] == 0


@pytest.mark.parametrize("constants", SPLITS, ids=["small", "lora", "one_update"])
def test_without_learning_every_ratio_is_exactly_one_in_bfloat16(small_script, bfloat16, constants):
    """Though the sampler's log-probs are off by more than ten times GSPO's clip."""
    rows = resting(small_script, **constants)
    assert max(row["sampler_gap_max"] for row in rows) > 4e-3
    for row in rows:
        assert row["updates"]
        assert row["first_ratio_min"] == row["first_ratio_max"] == row["ratio_min"] == row["ratio_max"] == 1


def test_a_second_epoch_splits_otherwise_and_has_the_noise_of_other_batches(small_script, bfloat16):
    rows = resting(small_script, MICRO_BATCH_TOKENS=100, MINI_BATCHES=4, **{epochs(small_script): 2})
    assert all(row["first_ratio_min"] == row["first_ratio_max"] == 1 for row in rows)
    least, greatest = min(row["ratio_min"] for row in rows), max(row["ratio_max"] for row in rows)
    assert 0.8 < least <= 1 <= greatest < 1.2 and least < greatest


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_first_update_takes_its_own_log_probs_as_old_to_the_bit(small_script, bfloat16, kl, monkeypatch):
    """Against a pass before each update. With PPO's KL, which is in the rewards, the pass must come before."""
    name, trainer_of = small_script.__name__, trainer_class(small_script)
    constants = {"MICRO_BATCH_TOKENS": 300, "MINI_BATCHES": 4, epochs(small_script): 2, "KL_COEF": kl}
    vars(small_script).update(constants | ({"VALUE_PRETRAIN_STEPS": 0} if name == "vapo" else {}))
    steps, passes = {}, {}
    for with_pass in (False, True):
        if with_pass:
            monkeypatch.setattr(trainer_of, "on_policy", property(lambda _: False, lambda *_: None), raising=False)
        trainer = trainer_of()
        with mock.patch.object(trainer, "compute_log_probs", wraps=trainer.compute_log_probs) as compute:
            steps[with_pass] = timeless([trainer.train_step(step) for step in (1, 2, 3)])
        passes[with_pass] = sum(call.args[2:] == ("updates",) for call in compute.call_args_list)
    assert steps[True] == steps[False] and all(row["updates"] == 8 for row in steps[True])
    spared = passes[True] - passes[False]
    assert spared == (0 if name in ("ppo", "vapo") and kl else 3) or (name == "dapo" and spared > 0)


@pytest.mark.parametrize("replay", ["", "r2", "r3"])
def test_a_mixtures_first_ratio_is_one_in_bfloat16_whatever_it_replays(small_script, bfloat16, replay):
    constants = {"POLICY_MODEL": "data/models/arithmetic-moe", "BATCH_SIZE": 2, "MAX_COMPLETION_TOKENS": 16}
    for row in resting(small_script, ROUTING_REPLAY=replay, MICRO_BATCH_TOKENS=100, **constants):
        assert row["first_ratio_min"] == row["first_ratio_max"] == row["ratio_min"] == row["ratio_max"] == 1
        assert row["routing_changed"] < 0.1


def test_logits_of_bfloat16_factors_are_summed_and_kept_in_float32():
    torch.manual_seed(0)
    head = torch.nn.Linear(512, 50)
    hidden = 4 * torch.randn(7, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = vocabulary.head_of(mock.Mock(get_output_embeddings=lambda: head))(hidden)
        logps, _ = vocabulary.token_logps(hidden, torch.arange(7), head, False, 2**20)
        rounded = head(hidden)
    exact = hidden.bfloat16().double() @ head.weight.bfloat16().double().T + head.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps.double(), exact.log_softmax(-1)[range(7), range(7)], rtol=1e-5, atol=1e-5)
    assert (rounded.double() - exact).abs().max() > 1e-2
