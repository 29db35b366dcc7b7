"""Properties of speed that need no clock: how often a model is called, for how many tokens, and who waits."""

import gc
import gzip
import itertools
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import keep_weights, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import configs
import gspo
from engine import batch, packing, vocabulary


class Passes:
    """Records (token places, with gradient) of each pass through a model."""

    def __init__(self, model):
        self.seen = []
        model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        self.seen.append((ids.numel(), torch.is_grad_enabled()))

    def tokens(self, with_gradient):
        return sum(places for places, grad in self.seen if grad == with_gradient)


class Waits(TorchDispatchMode):
    """Counts the operations at which a GPU must wait to tell Python a number or a shape."""

    count = 0
    aten = torch.ops.aten
    asking = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero)
    indexing = (aten.index, aten.index_put, aten.index_put_)  # by True and False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        masks = [index for index in args[1] if index is not None] if operation in self.indexing else []
        self.count += operation in self.asking or any(mask.dtype == torch.bool for mask in masks)
        return function(*args, **(kwargs or {}))


def test_a_step_puts_each_token_through_each_model_once_and_no_padding(small_script):
    script = small_script
    script.SAMPLE_GROUPS, script.MICRO_BATCH_TOKENS, script.OVERLONG_FILTER = 0, 150, False
    script.KL_COEF = 0.04
    trainer = trainer_of(script)
    policy, reference, sampled = Passes(trainer.policy), Passes(trainer.reference.model), []
    generate = trainer.generate_responses_with_group_sampling

    def keep(step):
        sampled.append(generate(step))
        policy.seen.clear()  # from here on it is the training
        return sampled[-1]

    trainer.generate_responses_with_group_sampling = keep
    trainer.train_step(1)
    lengths = sampled[0].lengths - 1  # nothing is predicted after the last token
    assert reference.tokens(False) == int(lengths.sum()) and reference.tokens(True) == 0
    assert policy.tokens(True) == int(lengths.sum())  # every completion once, for all mini-batches together
    assert policy.tokens(False) == int(lengths[-script.GROUP_SIZE :].sum())  # the last group, to see the sampler's gap
    least = -(-int(sampled[0].lengths.sum()) // 150)
    assert least <= sum(grad for _, grad in policy.seen) <= least + script.MINI_BATCHES + 2


@pytest.mark.parametrize("whole", [True, False])
def test_whole_groups_stay_in_one_mini_batch_and_read_their_prompt_once(small_script, monkeypatch, whole):
    script = small_script
    script.WHOLE_GROUPS, script.ENTROPY_COEF, script.OVERLONG_FILTER, script.MINI_BATCHES = whole, 0.001, False, 2
    monkeypatch.setattr(packing, "SHORT_PROMPT", 1)
    trainer = trainer_of(script)
    batches, update = [], trainer.update
    trainer.update = lambda batch, *on_policy: (batches.append(batch), update(batch, *on_policy))[1]
    passes = Passes(trainer.policy)
    generate = trainer.generate_responses_with_group_sampling
    trainer.generate_responses_with_group_sampling = lambda step: (generate(step), passes.seen.clear())[0]
    trainer.train_step(1)
    groups = [{tuple(row["prompt_ids"]) for row in batch.prompts} for batch in batches]
    assert len(groups) == 2 and bool(groups[0] & groups[1]) != whole
    once = sum(len(prompt) for some in groups for prompt in some)
    assert passes.tokens(True) == once + sum(int((batch.completion_lengths - 1).sum()) for batch in batches)


def test_between_steps_gradients_take_no_memory(small_script):
    trainer = trainer_of(small_script)
    trainer.train()
    models = [trainer.policy, *(beside.model for beside in trainer.beside.values())]
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def test_attention_on_a_cpu_does_not_repeat_the_keys_that_heads_share():
    """What it keeps for the backward pass is as large as queries, keys, values, output and mask, and no more."""
    group = torch.nn.Module()
    group.num_key_value_groups = 4
    generator, found = torch.Generator().manual_seed(0), []
    states = [torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((8, 6), (2, 40), (2, 40))]
    mask, sizes = torch.arange(40) <= torch.arange(34, 40)[:, None], {}

    def saved(x):
        sizes[x.data_ptr()] = x.numel()
        return x

    for ours in (True, False):
        inputs = [x.clone().requires_grad_() for x in states]
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            if ours:
                output = packing.attention_of_rows(group, *inputs, mask[None, None])
            else:
                output = sdpa_attention_forward(group, *inputs, mask[None, None])[0]
        output.square().sum().backward()
        found.append([output.detach(), *(x.grad for x in inputs), sum(sizes.values())])
    *results, numbers = found[0]
    for one, other in zip(results, found[1], strict=False):
        torch.testing.assert_close(one, other)
    assert numbers < sum(x.numel() for x in states) + 2 * output.numel() + 2 * mask.numel() < found[1][-1]


def test_completions_that_cannot_move_anything_stay_out_of_the_update(small_script):
    script = small_script
    script.KL_COEF, script.ENTROPY_COEF, script.MAX_GRAD_NORM = 0.0, 0.0, 1e9
    trainer = trainer_of(script)
    trainer.all_move = False  # as it is without a critic
    keep_weights(trainer)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    old_logps, advantages = rollouts.sampled_logps + 0.05, torch.zeros(len(rollouts.texts))
    advantages[4:8] = torch.tensor([1.0, -1.0, 0.5, -0.5])  # one of four groups
    passes = Passes(trainer.policy)
    rollouts.old_logps, rollouts.advantages = old_logps, advantages
    stats = trainer.update(rollouts)
    assert passes.tokens(True) == int((rollouts.lengths[4:8] - 1).sum())
    logps, _ = script.completion_logps(trainer.policy, rollouts)  # all of them, dead or not
    loss, _ = script.compute_policy_loss(logps, old_logps, advantages, rollouts.completion_mask)
    torch.testing.assert_close(stats["policy_loss"], loss.detach(), rtol=1e-4, atol=1e-6)
    for one, other in zip(trainer.gradients.values(), torch.autograd.grad(loss, trainer.trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    script.ENTROPY_COEF, trainer.all_move = 1e-9, True  # all completions go through the model
    again = trainer.update(rollouts)
    for name in ("clip_fraction", "ratio_mean", "ratio_min", "ratio_max"):
        torch.testing.assert_close(again[name], stats[name], rtol=1e-4, atol=1e-6)
    dead = ~advantages.bool()
    right = script.compute_policy_loss(
        logps.where(~dead[:, None], old_logps), old_logps, advantages, rollouts.completion_mask
    )[1]
    assert stats["clip_fraction"] == right["clip_fraction"]
    script.ENTROPY_COEF, trainer.all_move = 0.0, False
    rollouts.advantages = advantages * 0
    assert trainer.update(rollouts)["policy_loss"] == 0


@pytest.mark.parametrize("every", [1, 16])
def test_the_sampler_waits_only_when_it_checks_for_finished_rows(small, monkeypatch, every):
    trainer = small.GSPOTrainer()
    rows, shape = trainer.train_rows[:4], (16, small.MAX_COMPLETION_TOKENS)
    uniform = torch.rand(shape, dtype=torch.float64, generator=gspo.generator_of("test"))
    expected = trainer.sampler.sample_in_turn(rows, 4, uniform, 1.0, 1.0, small.MAX_COMPLETION_TOKENS, 16)
    shapes = []
    trainer.policy.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    monkeypatch.setattr(batch, "tokens_between_checks", lambda device: every)
    with Waits() as waits:
        rollouts = trainer.sampler.sample_in_turn(rows, 4, uniform, 1.0, 1.0, small.MAX_COMPLETION_TOKENS, 16)
    assert rollouts.texts == expected.texts and torch.equal(rollouts.completion_mask, expected.completion_mask)
    assert shapes[0] == (4, max(len(row["prompt_ids"]) for row in rows))  # prompts once, not once per completion
    rows_left = [shape.numel() for shape in shapes[1:]]
    drops = sum(fewer < more for more, fewer in itertools.pairwise([16, *rows_left]))
    before_and_after = 3 + len(rollouts.texts)  # of prompts and completions: widths, a common start, and each length
    checks = (len(shapes) - 1) // every  # but for the last token, after which all have the most
    assert drops > 0 and waits.count == before_and_after + checks + drops  # a drop asks which rows stay


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("at_once", [2**26, 1000, 300, 1])  # all blocks kept; some of them; none; a token per block
def test_log_probs_by_blocks_of_the_vocabulary_are_those_of_log_softmax(at_once, with_entropy, with_bias, monkeypatch):
    torch.manual_seed(0)
    tokens, size, alive, most = 7, 130, [], 0
    head = torch.nn.Linear(5, size, bias=with_bias).double()
    hidden, targets = torch.randn(tokens, 5).double().requires_grad_(), torch.randint(0, size, (tokens,))
    hidden.data[0] *= 1e4  # makes probabilities 0 and 1
    leaves, weights = [hidden, *head.parameters()], torch.randn(2, tokens).double()

    def linear(*arguments):
        nonlocal most
        logits = torch.nn.functional.linear(*arguments)
        alive.append(weakref.ref(logits))
        most = max(most, sum(one().numel() for one in alive if one() is not None))
        return logits

    monkeypatch.setattr(vocabulary, "linear", linear)
    log_probs = head(hidden).log_softmax(-1)
    naive = log_probs.gather(1, targets[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(-1) * with_entropy
    expected = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, naive, strict=True)), leaves)
    found = vocabulary.token_logps(hidden, targets, head, with_entropy, at_once)
    gradient = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, found, strict=True)), leaves)
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(gradient, expected)
    assert most <= max(at_once, tokens)
    assert len(alive) > 1 or at_once == 2**26


def test_benchmarks_count_the_operations_that_a_naive_pass_does(small, monkeypatch):
    """torch's own counter counts a forward pass, one sequence at a time, with attention as plain products."""
    monkeypatch.syspath_prepend(configs.HERE / "benchmarks")
    import workloads

    model = small.GSPOTrainer().policy
    model.set_attn_implementation("eager")

    def naive(tokens, predicting):
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(1, tokens, dtype=torch.long), logits_to_keep=predicting)
        found = counter.get_flop_counts()["Global"]
        pairs_of_tokens = found.pop(torch.ops.aten.bmm)  # all of them; causal attention sees half of them
        return sum(found.values()) + pairs_of_tokens / 2

    sizes = [(0, 2, 5, 3), (0, 2, 5, 1), (1, 2, 3, 7), (1, 2, 3, 4)]  # two groups of two completions
    whole = sum(naive(p + t - 1, t) for *_, p, t in sizes)  # after the last token nothing is predicted
    head = 2 * model.config.vocab_size * model.config.hidden_size
    again = sum(naive(p, 1) - head for *_, p, _ in sizes[::2])  # a group's second completion shares its prompt
    again += naive(2, 1) - head  # the second prompt shares its first two tokens
    counted = workloads.flops(model, sizes, sizes[2:], with_reference=True)
    assert counted["rollout"] == pytest.approx(whole - again, rel=1e-3)  # angles of positions are products, too
    of_second_group = naive(9, 7) + naive(6, 4) - (naive(3, 1) - head)
    assert counted["update"] == pytest.approx(3 * of_second_group, rel=1e-3)
    assert counted["step"] == 2 * counted["rollout"] + counted["update"]
    without = workloads.flops(model, sizes, sizes[2:], with_reference=False)
    assert without["step"] == counted["rollout"] + counted["update"]
    assert workloads.useful_tokens(sizes) == 2 + 3 + 2 + 0 + 1 + 6 + 3 and workloads.useful_tokens([]) == 0


def test_packed_sequences_are_cut_if_rows_would_be_mostly_padding():
    pairs = {}
    for lengths in (
        [200, 190, 12, 11, 10],
        [200, 190, 180, 170],
        [5, 4, 3, 1],
        [30, 300, 20, 10],
        [7],
        [300] + 300 * [3],
    ):
        parts = [part.tolist() for part in packing.split_by_length(torch.tensor(lengths), torch.device("cpu"))]
        assert [n for part in parts for n in part] == lengths
        pairs[tuple(lengths)] = sum(len(part) * max(part) ** 2 for part in parts) / (len(lengths) * max(lengths) ** 2)
    assert [round(share, 2) for share in pairs.values()] == [0.4, 1, 1, 0.25, 1, 0.0]


def test_groups_of_like_shape_are_one_part_of_attention():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def parts(device, *groups):
        return [
            len(some) for some in packing.joined([(torch.arange(n), torch.tensor(rows)) for n, *rows in groups], device)
        ]

    like = (100, 20, 18, 5), (98, 19, 21), (103, 22)  # tokens of the prefix, and of each row behind it
    for device in (cpu, gpu):
        assert parts(device, *like) == [3]
        assert parts(device, (0, 1000), *like) == [1, 3]
    assert parts(cpu, (0, 100), *like) == [1, 3] and parts(gpu, (0, 100), *like) == [4]  # on a GPU a call costs more


def test_a_pass_makes_its_masks_once_for_all_layers(small, monkeypatch):
    monkeypatch.setattr(packing, "SHORT_PROMPT", 1)
    trainer, made, called = trainer_of(small), [], []
    rollouts = trainer.generate_responses_with_group_sampling(1)
    near, attention = packing.near, packing.attention_of_rows
    monkeypatch.setattr(packing, "near", lambda *given: made.append(1) or near(*given))
    monkeypatch.setattr(
        packing, "attention_of_rows", lambda *given, **more: called.append(1) or attention(*given, **more)
    )
    small.completion_logps(trainer.policy, rollouts)
    layers = trainer.policy.config.num_hidden_layers
    assert 0 < len(made) and layers * len(made) <= len(called) <= 3 * layers  # prompts, completions, or both


def test_the_parts_of_a_pass_are_freed_with_it(small):
    trainer = trainer_of(small)
    rollouts = trainer.generate_responses_with_group_sampling(1)
    gc.collect()
    gc.disable()  # on a GPU memory must not wait for it
    try:
        logps, _ = small.completion_logps(trainer.policy, rollouts)
        logps.sum().backward()
        del logps
        assert not [one for one in gc.get_objects() if type(one) is packing.Part]
    finally:
        gc.enable()


def test_a_profile_holds_the_operations_of_some_steps_and_the_summary_names_the_largest(small, capsys):
    small.PROFILE, small.TENSORBOARD, small.MAX_COMPLETION_TOKENS = True, False, 6
    trainer = small.GSPOTrainer()
    trainer.train()
    path = trainer.run.folder / "profile.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Profile: "))
    assert str(path) in line and "aten::mm" in line and 8 == line.count("%")


def test_importing_a_script_and_making_a_trainer_change_nothing_outside():
    program = """
import os, logging, torch, transformers
def outside():
    flags = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_num_threads(), torch.is_grad_enabled()
    levels = [logging.getLogger(name).level for name in ("transformers", "huggingface_hub", "datasets")]
    return flags, levels, transformers.logging.is_progress_bar_enabled(), dict(os.environ)
before = outside()
import gspo, grpo, dapo
print(before == outside())
gspo.GSPOTrainer()
print(before == outside())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=configs.HERE, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line in ("True", "False")] == ["True"] * 2, done.stderr


@pytest.mark.parametrize("name", [path.name for path in configs.scripts()])
def test_threads_are_told_not_to_spin_before_torch_starts_them(name):
    program = f"""
import os, sys
class Watch:
    def find_spec(self, module, path=None, target=None):
        if module == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
import runpy
runpy.run_path({name!r}, run_name=sys.argv[1])
"""
    for asked, expected in ((None, "1000"), ("7", "7")):
        environ = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        environ |= {"GOMP_SPINCOUNT": asked} if asked else {}
        done = subprocess.run([sys.executable, "-c", program, "__main__"], env=environ, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done.stderr
    imported = subprocess.run(
        [sys.executable, "-c", program, name], env=environ | {"GOMP_SPINCOUNT": ""}, capture_output=True
    )
    assert imported.stdout.split() == []  # an import changes nothing outside
