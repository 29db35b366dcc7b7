"""Properties for any input: pure functions return no NaN, and the flag parser raises nothing but InputError.

Values may overflow to inf, as the exp of a large log-ratio does. But no value is ever NaN.
"""

import math

import pytest
import torch
import transformers
from conftest import SCRIPTS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from variants import VARIANTS

import cispo
import configs
import dapo
import grpo
import gspo
from bookkeeping.run import Run
from engine import packing
from scoring import rule_processes, rules

settings.register_profile(
    "scripts",
    deadline=None,
    derandomize=True,  # the same examples in each run, so that a build does not fail by chance
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("scripts")

over_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
GROUPED = [script for script in SCRIPTS if hasattr(script, "compute_relative_advantages")]
over_grouped = pytest.mark.parametrize("script", GROUPED, ids=lambda script: script.__name__)
MODEL = transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1)
)
MODEL.set_attn_implementation(packing.NAME)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PADDING = (0.0, -1e4, math.nan, math.inf, -math.inf)
LOSSES = [
    *VARIANTS,
    (gspo, {"RATIO_LEVEL": "sequence_token", "LENGTH_NORMALIZED_RATIO": False}),
    (grpo, {"DUAL_CLIP": 3.0, "LOSS_AGGREGATION": "token_mean"}),
]
over_losses = pytest.mark.parametrize(
    ("script", "constants"),
    LOSSES,
    ids=["-".join([script.__name__, *map(str, constants.values())]) for script, constants in LOSSES],
)


@st.composite
def batches(draw, lowest=-1e4, padding=PADDING):
    """Draws logps, old_logps, advantages and mask, of any dtype, lengths and values. Padding may hold anything.

    Log-probs are those of sampled tokens, finite and in [lowest, 0]. At -1e4 a ratio overflows in every dtype.
    """
    dtype = draw(st.sampled_from(DTYPES))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    width = max(lengths) + draw(st.integers(0, 1))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    logp = st.one_of(
        st.floats(-3.0, 0.0), st.sampled_from([0.0, -1e-4, -10.0, -12.0, -88.0, -90.0, -710.0, -1e3, -1e4])
    )

    def tensor():
        values = torch.tensor(draw(st.lists(logp, min_size=mask.numel(), max_size=mask.numel())), dtype=torch.float64)
        values = values.view(mask.shape).clamp(min=lowest)
        return values.masked_fill(~mask, draw(st.sampled_from(padding))).to(dtype)

    logps = tensor()
    old_logps = logps.clone() if draw(st.booleans()) else tensor()
    advantage = st.one_of(st.floats(-3.0, 3.0), st.sampled_from([0.0, -0.0, 1e-7, -1e-7, 1e3, -1e3]))
    advantages = torch.tensor(draw(st.lists(advantage, min_size=len(lengths), max_size=len(lengths)))).to(dtype)
    return logps, old_logps, advantages, mask


def no_nan(*tensors):
    return not any(tensor.isnan().any() for tensor in tensors)


def value_and_gradient(function, logps, *rest):
    """Returns the value of a loss function, and its gradient with respect to logps."""
    logps = logps.detach().clone().requires_grad_()
    value = function(logps, *rest)
    loss = value[0] if isinstance(value, tuple) else value
    loss.backward()
    return value, logps.grad


def small_batch(logp, old_logp, advantage, *, dtype=torch.float32, padding=None):
    """Returns one completion of one token, with a place of padding after it if asked for."""
    rest = [] if padding is None else [padding]
    logps, old_logps = (torch.tensor([[value, *rest]], dtype=dtype) for value in (logp, old_logp))
    return logps, old_logps, torch.tensor([advantage], dtype=dtype), torch.tensor([[True] + [False] * len(rest)])


def assert_sound(script, batch):
    logps, old_logps, advantages, mask = batch
    (loss, stats), grad = value_and_gradient(script.compute_policy_loss, *batch)
    assert no_nan(loss, grad, *stats.values())
    assert loss.dtype == logps.dtype and loss.dim() == 0
    assert (grad[~mask] == 0).all()
    assert 0 <= stats["clip_fraction"] <= 1
    assert stats["ratio_min"] <= stats["ratio_max"]


@over_losses
@settings(max_examples=25)
@given(batch=batches(lowest=-10.0))
def test_the_policy_loss_has_no_nan(script, constants, batch):
    vars(script).update(constants)
    if batch[0].dtype == torch.float16 and not getattr(script, "LENGTH_NORMALIZED_RATIO", True):
        batch = (batch[0] / 8, batch[1] / 8, *batch[2:])  # the ratio of a whole text may leave float16
    assert_sound(script, batch)


@over_losses
@settings(max_examples=25)
@given(batch=batches())
@example(batch=small_batch(0.0, -100.0, 0.0))  # a dead group: inf x 0 in the loss
@example(batch=small_batch(0.0, -100.0, 1.0))  # the clip holds the loss, and inf x 0 is in the gradient
@example(batch=small_batch(0.0, -12.0, 1.0, dtype=torch.float16))
def test_the_policy_loss_has_no_nan_if_the_ratio_overflows(script, constants, batch):
    vars(script).update(constants)
    assert_sound(script, batch)


@over_scripts
@settings(max_examples=25)
@given(batch=batches())
def test_the_kl_has_no_nan_and_is_not_negative(script, batch):
    logps, ref_logps, _, mask = batch
    kl = script.compute_kl(logps, ref_logps)[mask]
    assert no_nan(kl)
    assert (kl >= -4 * torch.finfo(kl.dtype).eps * (1 + (ref_logps - logps)[mask].abs())).all()


KL_LOSSES = [
    (gspo, {}),
    *[(grpo, {"KL_ESTIMATOR": kind}) for kind in ("k1", "k2", "k3", "ratio_k3")],
    *[(grpo, {"KL_ESTIMATOR": "k3", "LOSS_AGGREGATION": how}) for how in ("token_mean", "constant")],
    *[(script, {"LOSS_AGGREGATION": how}) for script in (dapo, cispo) for how in ("token_mean", "sequence_mean")],
]


over_kl_losses = pytest.mark.parametrize(
    ("script", "constants"),
    KL_LOSSES,
    ids=["-".join([script.__name__, *constants.values()]) for script, constants in KL_LOSSES],
)


def assert_kl_loss_is_sound(script, batch, ref_logps):
    logps, old_logps, _, mask = batch
    loss, grad = value_and_gradient(script.compute_kl_loss, logps, old_logps, ref_logps, mask)
    assert no_nan(loss, grad)
    assert (grad[~mask] == 0).all()


def other_logps(draw_from):
    """Draws how the reference model's log-probs differ from the batch's: not at all, upwards or downwards."""
    return st.sampled_from([lambda x: x, lambda x: x - 0.5, lambda x: x * 0.5, torch.zeros_like]).map(
        lambda change: change(draw_from)
    )


@over_kl_losses
@settings(max_examples=25)
@given(batch=batches(lowest=-5.0, padding=(0.0,)), data=st.data())
def test_the_kl_loss_has_no_nan(script, constants, batch, data):
    vars(script).update(constants)
    assert_kl_loss_is_sound(script, batch, data.draw(other_logps(batch[1])))


@over_kl_losses
@settings(max_examples=25)
@given(batch=batches(padding=(0.0,)), ref_is_sure=st.booleans())
@example(batch=small_batch(-200.0, 0.0, 0.0), ref_is_sure=True)
def test_the_kl_loss_has_no_nan_if_it_overflows(script, constants, batch, ref_is_sure):
    vars(script).update(constants)
    assert_kl_loss_is_sound(script, batch, torch.zeros_like(batch[0]) if ref_is_sure else batch[1])


@over_kl_losses
@settings(max_examples=25)
@given(batch=batches(lowest=-5.0))
@example(batch=small_batch(-1.0, -1.0, 0.0, padding=math.nan))
def test_padding_cannot_matter_to_the_kl_loss(script, constants, batch):
    vars(script).update(constants)
    assert_kl_loss_is_sound(script, batch, batch[1])


@over_losses
@settings(max_examples=25)
@given(batch=batches(lowest=-1e3))
def test_aggregation_is_a_mean_whatever_the_padding(script, constants, batch):
    vars(script).update(constants)
    values, _, _, mask = batch
    values = values.detach() / 8
    mean = script.aggregate(values, mask)
    assert mean.dtype == values.dtype and mean.isfinite()
    assert torch.equal(mean, script.aggregate(values.masked_fill(~mask, math.nan), mask))
    assert script.aggregate(torch.full_like(values, math.nan).masked_fill(mask, 0.0), mask) == 0


@over_grouped
@pytest.mark.parametrize("kind", ["relative", "normalized"])
@settings(max_examples=40)
@given(data=st.data())
@example(data=None)
def test_advantages_have_no_nan_and_dead_groups_none(script, kind, data):
    script.ADVANTAGE_TYPE = kind
    if data is None:  # all that float16 can hold
        rewards, group_size = torch.tensor([65504, 65504, -65504, 6e-8], dtype=torch.float16), 2
    else:
        dtype, group_size = data.draw(st.sampled_from([*DTYPES, torch.int64])), data.draw(st.integers(2, 5))
        largest = 1e4 if dtype in (torch.float16, torch.int64) else 1e30  # a reward may be as large as this
        reward = st.one_of(st.sampled_from([0.0, 1.0, 1 / 3, 1e-7, -largest, largest]), st.floats(-largest, largest))
        count = group_size * data.draw(st.integers(1, 3))
        rewards = torch.tensor(data.draw(st.lists(reward, min_size=count, max_size=count)), dtype=torch.float64)
        rewards = rewards.to(dtype)
    advantages = script.compute_relative_advantages(rewards, group_size)
    assert advantages.shape == rewards.shape and advantages.is_floating_point() and no_nan(advantages)
    grouped = rewards.view(-1, group_size)
    dead = (grouped == grouped[:, :1]).all(1)
    assert (advantages.view(-1, group_size)[dead] == 0).all()
    if kind == "normalized":
        assert (advantages.double().abs() <= math.sqrt(group_size) + 0.1).all()
    if script is dapo:
        assert torch.equal(dapo.is_dead(rewards, group_size), dead)


@over_grouped
@pytest.mark.parametrize("kind", ["relative", "normalized"])
@settings(max_examples=40)
@given(data=st.data())
def test_token_advantages_have_no_nan_and_do_not_see_padding(script, kind, data):
    script.ADVANTAGE_TYPE = kind
    dtype, group_size = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(2, 4))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=group_size, max_size=group_size)))
    mask = torch.arange(5) < lengths[:, None]
    reward = st.sampled_from([0.0, 1.0, 1 / 3, -1e4, 1e4])
    values = data.draw(st.lists(reward, min_size=mask.numel(), max_size=mask.numel()))
    rewards = torch.tensor(values).to(dtype).view(mask.shape)
    padded = rewards.masked_fill(~mask, data.draw(st.sampled_from(PADDING)))
    advantages = script.compute_token_advantages(padded, mask, group_size)
    assert advantages.dtype == dtype and no_nan(advantages) and (advantages[~mask] == 0).all()
    assert torch.equal(advantages, script.compute_token_advantages(rewards, mask, group_size))


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), budget=st.integers(1, 100))
def test_every_token_goes_through_once_whatever_the_lengths_and_the_budget(lengths, budget):
    lengths = torch.tensor(lengths)
    batches = list(packing.batches_of(lengths, budget))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(lengths)))
    assert all(len(rows) == 1 or lengths[rows].sum() <= budget for rows in batches)
    for rows in batches:
        ids = torch.arange(int(lengths.max())) + 100 * (1 + rows[:, None])  # of row and place
        expected = [ids[i, : lengths[row]] for i, row in enumerate(rows)]  # one after the other
        packed = packing.Packing(MODEL, expected)
        inputs = packed.inputs
        assert torch.equal(inputs["input_ids"][0], torch.cat(expected))
        assert torch.equal(inputs["position_ids"][0], torch.cat(expected) % 100)
        for part, ids in zip(packed.parts, inputs["input_ids"].view(-1, 1).split(packed.tokens), strict=True):
            padded = part.unpack(ids)  # (rows, width, 1): in the rows of attention each sequence is alone
            assert torch.equal(part.pack(padded[:, :, None]).view(-1, 1), ids)  # and comes back as it was
            for row in padded[:, :, 0]:
                assert len({value // 100 for value in row.tolist() if value}) == 1


@over_scripts
@settings(max_examples=100)
@given(
    coef=st.floats(0.0, 1e15),
    mean_kl=st.floats(allow_nan=True, allow_infinity=True),
    target=st.floats(1e-9, 1e15),
)
def test_the_kl_coefficient_stays_in_its_bounds(script, coef, mean_kl, target):
    script.TARGET_KL = target
    assert 0.01 <= script.next_kl_coef(coef, mean_kl) <= 1.0


@given(truncated=st.lists(st.booleans(), min_size=1, max_size=8), filtered=st.booleans())
def test_completions_in_the_loss_are_all_or_those_that_ended(truncated, filtered):
    dapo.OVERLONG_FILTER, truncated = filtered, torch.tensor(truncated)
    expected = ~truncated if filtered else torch.ones_like(truncated)
    chosen = dapo.completions_in_loss(truncated)
    assert chosen.dtype == torch.bool and torch.equal(chosen, expected)


@pytest.mark.parametrize("script", [dapo, cispo], ids=["dapo", "cispo"])
@given(cache=st.integers(0, 2**40), limit=st.integers(1, 2**30), data=st.data())
def test_the_overlong_penalty_falls_from_zero_to_minus_one(script, cache, limit, data):
    script.OVERLONG_CACHE, script.MAX_COMPLETION_TOKENS = cache, limit
    lengths = torch.tensor(sorted(data.draw(st.lists(st.integers(1, limit), min_size=1, max_size=6))))
    penalty = script.overlong_penalty(lengths)
    assert penalty.shape == lengths.shape and no_nan(penalty)
    assert ((-1 <= penalty) & (penalty <= 0)).all() and (penalty.diff() <= 0).all()
    assert script.overlong_penalty(torch.tensor([limit])) == (-1 if cache else 0)


@given(value=st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=4), st.just(10**400)))
def test_a_score_fits_in_float32_or_counts_as_zero_and_says_why(value):
    score, problem = rule_processes.checked(value)
    if value is None:  # the rule does not concern the row
        assert score is problem is None
        return
    weighed = torch.tensor(score * rules.LARGEST_WEIGHT)
    assert weighed.dtype == torch.float32 and weighed.isfinite()
    assert problem is None or score == 0.0 and "not a finite number" in problem


# ---- Flags


def flags_of(script):
    names = ["--" + name.lower().replace("_", "-") for name in configs.constant_values(vars(script))]
    return names + ["--no-adaptive-kl", "--no-selftest"]


def words(script):
    """Draws words of a command line.

    Flags are right, misspelt or with a value. Values are of every kind, and of none.
    """
    value = st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.text(max_size=8),
        st.sampled_from(["", "-1", "1e999", "smoke", "true", "cpu", "cuda:0", "cuda:-1", "token", "-", "--", "=", "٣"]),
    )
    flag = st.one_of(st.sampled_from(flags_of(script)), st.text(max_size=8).map("--{}".format))
    return st.one_of(flag, value, st.builds("{}={}".format, flag, value))


@over_scripts
@settings(max_examples=40)
@given(data=st.data())
def test_a_command_line_is_taken_or_is_an_input_error(script, data):
    argv = data.draw(st.lists(words(script), max_size=4))
    before = configs.constant_values(vars(script))
    try:
        configs.apply_overrides(vars(script), argv, Run.constants_to_resume)
        configs.snapshot(vars(script))  # accepted values keep the rules
    except configs.InputError as error:
        assert str(error).strip()
    except SystemExit as exit_:
        assert exit_.code == 0 and {"-h", "--help"} & set(argv)
    finally:
        vars(script).update(before)


@over_scripts
@settings(max_examples=40)
@given(data=st.data())
def test_a_flag_sets_its_constant_to_a_value_of_its_type_or_is_refused(script, data):
    before = configs.constant_values(vars(script))
    name = data.draw(st.sampled_from(sorted(before)))
    value = data.draw(st.one_of(st.integers(-2, 10**20), st.floats(), st.text(max_size=6)).map(str))
    try:
        configs.apply_overrides(vars(script), [f"--{name.lower().replace('_', '-')}={value}"])
        after = vars(script)[name]
        assert type(after) is type(before[name])
        assert after == value if isinstance(after, str) else math.isfinite(after)
    except configs.InputError as error:
        assert name in str(error) or name.lower().replace("_", "-") in str(error) or "MINI_BATCHES" in str(error)
    finally:
        vars(script).update(before)
