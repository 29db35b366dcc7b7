"""Sampling and log-probs against naive computations of one sequence at a time: a random model, ragged prompts."""

import pytest
import torch
import transformers
from torch.fx.experimental.proxy_tensor import make_fx

import gspo
from engine import batch, decoding, packing, products, sampling, steps, vocabulary
from engine.cache import GrowingCache, with_cache
from engine.memory import FitToMemory
from engine.rollouts import Rollouts
from engine.sampling import Sampler

EOS, OTHER_EOS, PAD, VOCABULARY = 1, 2, 0, 20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation(packing.NAME)
    return model


class Tokenizer:
    """Has the two attributes that sampling reads of a tokenizer."""

    pad_token_id = PAD

    def batch_decode(self, completions, skip_special_tokens):
        return [" ".join(map(str, ids)) for ids in completions]


PROMPTS = [{"prompt_ids": ids} for ids in ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 0, 4])]  # a pad id inside, too


START = 40 * [17]  # a common start of prompts, long enough to go through once
STARTED = [{"prompt_ids": START + row["prompt_ids"]} for row in PROMPTS]


def sample(model, rows=PROMPTS, group_size=4, eos_ids=(EOS,), greedy=False, tokens=24, compute_dtype="auto", at_once=0):
    shape, generator = (len(rows) * group_size, tokens), gspo.generator_of("test")
    uniform = None if greedy else torch.rand(shape, dtype=torch.float64, generator=generator)
    sampler = Sampler(
        model, Tokenizer(), list(eos_ids), at_once or len(rows) * group_size, compute_dtype, FitToMemory()
    )
    limits = {"temperature": gspo.TEMPERATURE, "top_p": gspo.TOP_P, "max_tokens": tokens}
    return sampler(rows, group_size, uniform, **limits)


@torch.no_grad()
def naive_logps(model, prompt_ids, completion_ids):
    """Returns log-probs of a completion, and the entropy at each of its tokens.

    One sequence goes through the model, without padding and without a cache.
    """
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    log_probs = (logits / gspo.TEMPERATURE).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=log_probs).entropy()
    return log_probs[range(len(completion_ids)), completion_ids], entropy


def completion(rollouts, i):
    return rollouts.input_ids[i, rollouts.prompt_lengths[i] : rollouts.lengths[i]].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_and_recomputed_log_probs_equal_the_naive_ones(model, temperature):
    gspo.TEMPERATURE = temperature
    rollouts = sample(model)
    with torch.no_grad():
        recomputed, entropy = gspo.completion_logps(model, rollouts, with_entropy=True)
    assert len(set(rollouts.completion_lengths.tolist())) > 3  # ragged, so that rows did leave the batch early
    for i in range(len(rollouts.texts)):
        expected, expected_entropy = naive_logps(model, PROMPTS[i // 4]["prompt_ids"], completion(rollouts, i))
        n = len(expected)
        torch.testing.assert_close(rollouts.sampled_logps[i, :n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(recomputed[i, :n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropy[i, :n], expected_entropy, rtol=1e-4, atol=1e-5)
        assert (recomputed[i, n:] == 0).all() and (rollouts.sampled_logps[i, n:] == 0).all()


def test_packing_long_sequences_with_short_ones_changes_no_log_prob(model):
    lengths = torch.tensor([120, 9, 100, 3, 5, 7, 4, 30])
    ids = torch.randint(0, VOCABULARY, (8, 120), generator=torch.Generator().manual_seed(0))
    packed = packing.Packing(model, [row[:n] for row, n in zip(ids, lengths, strict=True)])
    assert len(packed.parts) > 1
    with torch.no_grad():
        together = model.base_model(**packed.inputs, use_cache=False).last_hidden_state[0]
        model.set_attn_implementation("eager")
        alone = [model.base_model(row[None, :n]).last_hidden_state[0] for row, n in zip(ids, lengths, strict=True)]
        model.set_attn_implementation(packing.NAME)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def places_through(model, work):
    """Returns work(), and how many token places went through the layers meanwhile."""
    counted = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, __, given: counted.append(given["input_ids"].numel()), with_kwargs=True
    )
    result = work()
    hook.remove()
    return result, sum(counted)


@pytest.mark.parametrize("of_a_part", [0, 2**14])  # each group a part, or all of them one
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_a_prompt_that_completions_share_goes_through_once_with_the_same_gradient(
    sliding_window, of_a_part, monkeypatch
):
    monkeypatch.setattr(packing, "pairs_of_a_part", lambda device: of_a_part)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3}
    window = {"sliding_window": sliding_window, "layer_types": ["sliding_attention"] * 2} if sliding_window else {}
    window |= {"use_sliding_window": True, "max_window_layers": 0} if sliding_window else {}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads, **window)).double().eval()
    model.set_attn_implementation(packing.NAME)
    rollouts = sample(model, tokens=12)
    rollouts.completion_lengths[0] = 1  # its last token predicts nothing, so nothing of it goes through
    rollouts.completion_mask[0, 1:] = False
    mixed = rollouts.select(torch.tensor([8, 0, 5, 9, 1, 10, 13, 4, 2]))  # a group in several places, a row alone
    found = {}
    for short in (1, 100):
        monkeypatch.setattr(packing, "SHORT_PROMPT", short)
        model.zero_grad()
        (logps, _), before = places_through(model, lambda: gspo.completion_logps(model, mixed))
        weights = torch.rand(logps.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (logps * weights).sum().backward()
        states, after = places_through(model, lambda: packing.states_before_tokens(model, mixed, after=1).detach())
        found[short] = logps.detach(), states, *(p.grad.clone() for p in model.parameters()), before + after
    *once, fewer = found[1]
    *each, places = found[100]
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)  # norms compute in float32
    assert places == int((2 * mixed.lengths - 1).sum())  # of both passes
    # Rows 0, 1, 2 share 3 tokens; 4, 5 a single one; 8, 9, 10 share 6; 13 stands alone.
    assert places - fewer == 2 * (2 * 3 + 1 + 2 * 6)
    for i in range(len(mixed.texts)):
        prompt = mixed.input_ids[i, : mixed.prompt_lengths[i]].tolist()
        expected, _ = naive_logps(model, prompt, completion(mixed, i))
        torch.testing.assert_close(once[0][i, : len(expected)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of_a_part", [0, 2**14, 2**18])
@pytest.mark.parametrize("after", [0, 1])
def test_the_common_start_of_prompts_goes_through_once_with_the_same_gradient(model, after, of_a_part, monkeypatch):
    monkeypatch.setattr(packing, "pairs_of_a_part", lambda device: of_a_part)
    rollouts, found = sample(model, STARTED, group_size=3), {}
    mixed = rollouts.select(torch.tensor([3, 9, 0, 7, 4, 2]))  # two groups, and two rows alone
    for short in (packing.SHORT_PROMPT, 1000):
        monkeypatch.setattr(packing, "SHORT_PROMPT", short)
        model.zero_grad()
        states, places = places_through(model, lambda: packing.states_before_tokens(model, mixed, after))
        (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradients = [p.grad.clone() for p in model.base_model.parameters()]
        found[short] = [states.detach(), *gradients], places
    (once, fewer), (each, places) = found.values()
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert places == int((mixed.lengths - 1 + after).sum())
    assert places - fewer == 5 * len(START) + len(PROMPTS[1]["prompt_ids"]) + len(PROMPTS[0]["prompt_ids"])


def test_no_copies_of_a_long_prefix_are_kept_for_the_backward_pass(model):
    rollouts, kept = sample(model, STARTED, group_size=8, tokens=3), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor.detach()  # a tensor would hold its graph, which holds it

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packing.states_before_tokens(model, rollouts)
    config = model.config
    copies = len(rollouts.texts) * len(START) * config.num_key_value_heads * config.head_dim
    assert 0 < max(kept) < copies


def test_the_common_start_of_prompts_is_sampled_from_once(model):
    _, places = places_through(model, lambda: sample(model, STARTED, group_size=2, tokens=1))
    assert places == len(START) + len(STARTED) * 6  # each prompt's own tokens, padded to the longest


@pytest.mark.parametrize("rows", [PROMPTS, STARTED])
def test_a_row_is_the_same_alone_and_in_a_left_padded_batch(model, rows):
    together = sample(model, rows, group_size=1, greedy=True)
    for i, row in enumerate(rows):
        alone = sample(model, [row], group_size=1, greedy=True)
        assert completion(alone, 0) == completion(together, i)
        n = int(alone.completion_lengths[0])
        torch.testing.assert_close(together.sampled_logps[i, :n], alone.sampled_logps[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("large", [0, products.LARGE])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Llama", "Qwen3Moe"])
def test_the_decoder_takes_the_same_step_as_the_model(name, large, monkeypatch):
    """With large = 0 all products are oneDNN's."""
    monkeypatch.setattr(products, "LARGE", large)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "initializer_range": 0.3}
    other = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes)).eval()
    for weight in other.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # of norms and biases, which are 1 and 0 at first
    assert isinstance(decoding.decoder_of(other), decoding.Decoder) == (name != "Qwen3Moe")
    ids, visible = torch.randint(0, 50, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    visible[0, :4] = False  # padding on the left
    positions, cache = (visible.cumsum(1) - 1).clamp(min=0), GrowingCache(40)
    with torch.no_grad():
        mask = (visible[:, None, None, :8] | torch.eye(8, dtype=torch.bool)).tril()
        inputs = {"position_ids": positions[:, :8]} | with_cache(other.base_model, cache)
        other.base_model(input_ids=ids[:, :8], attention_mask=mask, **inputs)
        decode = decoding.decoder_of(other)
        found = [decode(ids[:, t], positions[:, t], cache, visible[:, : t + 1]) for t in range(8, 12)]
        whole = other.base_model(input_ids=ids, attention_mask=visible.long(), position_ids=positions).last_hidden_state
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_weights_laid_out_is_that_of_the_weights(rows, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 160, generator=generator).to(dtype) for n in (products.LARGE // 160 + 1, rows))
    added = torch.randn(len(weight), generator=generator).to(dtype) if bias else None
    with torch.inference_mode():
        found = products.linear_of(weight, added)(states)
    expected = states.double() @ weight.double().T + (0 if added is None else added.double())
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.3}[dtype]  # sums of 160 products
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("large", [0, products.LARGE])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_sampler_and_the_trainer_have_the_same_head(model, monkeypatch, autocast, large):
    monkeypatch.setattr(products, "LARGE", large)
    hidden, head = torch.randn(7, model.config.hidden_size), model.get_output_embeddings()
    targets = torch.arange(7) % model.config.vocab_size
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        of_sampler = vocabulary.head_of(model)(hidden).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        of_trainer, _ = vocabulary.token_logps(hidden, targets, head, False, 2**26)
    assert of_sampler.dtype == torch.float32
    torch.testing.assert_close(of_sampler, of_trainer, rtol=0, atol=1e-5)


class RecordedOnCPU(decoding.Replayed):
    """Records what a CUDA graph records: operations on memory, and no Python."""

    def record(self, work):
        self.recordings = getattr(self, "recordings", 0) + 1
        return make_fx(work)()


@pytest.mark.parametrize("eos_ids", [(EOS,), (VOCABULARY,)])  # rows leave, or none ever does
def test_a_recorded_step_is_replayed_until_rows_leave_or_room_ends(model, monkeypatch, eos_ids):
    expected, recorded, steps = sample(model, eos_ids=eos_ids, tokens=90), RecordedOnCPU(decoding.Decoder(model)), []
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "decoder_of", lambda model: recorded)
        step = decoding.Decoder.__call__
        patch.setattr(decoding.Decoder, "__call__", lambda *inputs: steps.append(1) or step(*inputs))
        found = sample(model, eos_ids=eos_ids, tokens=90)
    assert found.texts == expected.texts
    torch.testing.assert_close(found.sampled_logps, expected.sampled_logps)
    assert 3 <= recorded.recordings < int(expected.completion_lengths.max()) / 3
    assert len(steps) == 2 * recorded.recordings  # once without a graph, and once to record it; all others are replays


def test_steps_run_without_a_graph_if_it_fails_or_gives_other_numbers(model, monkeypatch):
    def refuse(self, work):
        raise RuntimeError("no graphs here")

    def do_something_else(self, work):
        return lambda: 2 * work()

    expected = sample(model)
    for record, reason in ((refuse, "no graphs here"), (do_something_else, "a replay differs by")):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "decoder_of", lambda model: decoding.Replayed(decoding.Decoder(model)))
            patch.setattr(decoding.Replayed, "record", record)
            patch.setattr(decoding.Replayed, "works", True)  # and True again after it
            with pytest.warns(UserWarning, match=reason) as warned:
                found = sample(model)
        assert found.texts == expected.texts and len(warned) == 1
        torch.testing.assert_close(found.sampled_logps, expected.sampled_logps)


def test_greedy_completions_are_those_of_generate(model):
    rollouts = sample(model, group_size=2, greedy=True)
    for i, row in enumerate(PROMPTS):
        ids = model.generate(
            torch.tensor([row["prompt_ids"]]),
            attention_mask=torch.ones(1, len(row["prompt_ids"]), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[0, len(row["prompt_ids"]) :].tolist()
        assert completion(rollouts, 2 * i) == completion(rollouts, 2 * i + 1) == ids


def test_the_mask_ends_with_the_first_end_of_sequence_whichever_it_is(model):
    rollouts = sample(model, group_size=16, eos_ids=(EOS, OTHER_EOS))
    endings = set()
    for i in range(len(rollouts.texts)):
        ids = completion(rollouts, i)
        assert rollouts.completion_mask[i].sum() == len(ids) == rollouts.completion_lengths[i]
        assert rollouts.completion_mask[i, : len(ids)].all()
        assert not {EOS, OTHER_EOS} & set(ids[:-1])
        assert bool(rollouts.truncated[i]) == (ids[-1] not in (EOS, OTHER_EOS))
        assert not rollouts.truncated[i] or len(ids) == 24
        assert (rollouts.input_ids[i, rollouts.lengths[i] :] == PAD).all()
        endings.add("truncated" if rollouts.truncated[i] else ids[-1])
    assert endings == {EOS, OTHER_EOS, "truncated"}


def test_each_prompt_is_prefilled_once_and_finished_rows_leave(model):
    shapes = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    rollouts = sample(model, group_size=8)
    hook.remove()
    assert shapes[0] == (4, 6)  # four prompts, not thirty-two
    assert all(len(shape) == 1 for shape in shapes[1:])  # one token of each row
    assert shapes[1][0] == 32 and shapes[-1][0] < 16
    assert len(shapes) == rollouts.completion_lengths.max()
    assert sum(rows for (rows,) in shapes[1:]) < 1.4 * int(rollouts.completion_lengths.sum())


def test_what_an_algorithm_adds_goes_through_select_join_and_to(model):
    rollouts = sample(model)
    rollouts.values, rollouts.notes = (
        torch.arange(16.0)[:, None] * rollouts.completion_mask,
        [f"row {i}" for i in range(16)],
    )
    rows = torch.tensor([5, 0, 11])
    part = rollouts.select(rows)
    assert part.notes == ["row 5", "row 0", "row 11"] and torch.equal(part.values, rollouts.values[rows])
    assert part.advantages is None and part.texts == [rollouts.texts[i] for i in rows]
    whole = Rollouts.join([part, rollouts.select(torch.tensor([2]))])
    assert whole.notes == [*part.notes, "row 2"] and whole.values[3].sum() == 2 * rollouts.completion_lengths[2]
    moved = part.to(torch.device("meta"))
    assert moved.values.device.type == "meta" and moved.lengths.device.type == "meta" and moved.notes == part.notes


def test_sampling_repeats_with_its_seed_and_differs_without(model):
    first, again = sample(model), sample(model)
    assert first.texts == again.texts and torch.equal(first.sampled_logps, again.sampled_logps)
    gspo.SEED = 1
    assert sample(model).texts != first.texts


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.3, -1.0, float("-inf"), 2.0, 0.0])
    gspo.TEMPERATURE = 0.8
    probs = (logits / 0.8).softmax(0)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    tokens, logps = sampling.sample_tokens(logits.expand(len(grid), -1), grid, 0.8, 1.0)
    share = torch.bincount(tokens, minlength=5) / len(grid)
    assert (share - probs).abs().max() <= 2e-4
    assert share[2] == 0
    torch.testing.assert_close(logps, probs.log()[tokens])
    edges = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sampling.sample_tokens(logits.expand(2, -1), edges, 0.8, 1.0)[0].tolist() == [0, 4]
    assert sampling.sample_tokens(logits[None], None, 0.8, 1.0)[0].item() == 3


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probs = torch.tensor([0.1, 0.5, 0.05, 0.35])
    gspo.TOP_P = 0.6  # 0.5 does not reach it, 0.5 + 0.35 does
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens, logps = sampling.sample_tokens(probs.log().expand(1000, -1), grid, 1.0, 0.6)
    share = torch.bincount(tokens, minlength=4) / 1000
    torch.testing.assert_close(share, torch.tensor([0, 0.5, 0, 0.35]) / 0.85, atol=2e-3, rtol=0)
    torch.testing.assert_close(logps, probs.log()[tokens])  # of the full distribution


def test_a_shared_prompt_counts_once_in_a_micro_batch(model, monkeypatch):
    rollouts = sample(model)  # prompts of 3, 1, 6 and 3 tokens, four completions each
    monkeypatch.setattr(packing, "SHORT_PROMPT", 1)
    for budget in (1, 20, 40, 1000):
        batches = list(packing.micro_batches(rollouts, budget))
        assert sorted(torch.cat(batches).tolist()) == list(range(16))
        for rows in batches:
            read = {int(row) // 4: int(rollouts.prompt_lengths[row]) for row in rows}
            assert len(rows) == 1 or sum(read.values()) + int(rollouts.completion_lengths[rows].sum()) <= budget
    (everything,) = packing.micro_batches(rollouts, 1000)
    groups = [int(row) // 4 for row in everything]
    assert len([1 for a, b in zip(groups, groups[1:], strict=False) if a != b]) == 3  # each group in one piece


@pytest.mark.parametrize("together", [1, 4])
def test_mini_batches_are_a_random_split_that_can_keep_groups_whole(together):
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])  # 5 is not in the loss
    seen = set()
    for seed in range(20):
        parts = steps.split_at_random(rows, 2, together, torch.Generator().manual_seed(seed))
        assert len(parts) == 2 and sorted(torch.cat(parts).tolist()) == rows.tolist()
        groups = [{row // 4 for row in part.tolist()} for part in parts]
        assert together == 1 or not groups[0] & groups[1]
        seen.add(tuple(sorted(parts[0].tolist())))
    assert len(seen) == (3 if together == 4 else 20)  # any two of the three groups
    assert len(steps.split_at_random(rows, 5, 4, torch.Generator())) == 3


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = torch.tensor([3, 50, 7, 7, 20, 1, 100, 7])
    batches = list(packing.batches_of(lengths, 60))
    assert sorted(torch.cat(batches).tolist()) == list(range(8))
    for rows in batches:
        assert len(rows) == 1 or int(lengths[rows].sum()) <= 60
    assert [sorted(lengths[rows].tolist()) for rows in batches] == [[100], [50], [1, 3, 7, 7, 7, 20]]


def test_prompts_of_steps_pass_over_the_data_in_a_new_order_each_time():
    rows = [{"number": i} for i in range(10)]
    gspo.BATCH_SIZE = 4
    seen = [
        row["number"]
        for step in range(1, 6)
        for row in gspo.prompts_of_step(rows, step, gspo.BATCH_SIZE, gspo.generator_of)
    ]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] and seen[:10] != list(range(10))
    assert [row["number"] for row in gspo.prompts_of_step(rows, 3, gspo.BATCH_SIZE, gspo.generator_of)] == seen[
        8:12
    ]  # a function of the step alone
    gspo.BATCH_SIZE = 25
    assert len(gspo.prompts_of_step(rows, 1, gspo.BATCH_SIZE, gspo.generator_of)) == 25


@pytest.mark.parametrize("every", [1, 16])
@pytest.mark.parametrize("rows", [PROMPTS, STARTED], ids=["prompts", "common start"])
@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 7, 11, 15])
def test_a_completion_that_waits_takes_the_room_of_one_that_ended_and_stays_the_same(
    model, monkeypatch, rows, at_once, every
):
    expected, widths, in_work = sample(model, rows), [], []
    go_on = batch.Batch.go_on

    def watched(self, *arguments):
        go_on(self, *arguments)
        widths.append(self.cache.get_seq_length())
        in_work.append(len(self.place))
        assert (self.cache.get_seq_length() - self.start <= self.longest).all()

    monkeypatch.setattr(batch.Batch, "go_on", watched)
    monkeypatch.setattr(batch, "tokens_between_checks", lambda device: every)
    found = sample(model, rows, at_once=at_once)
    assert found.texts == expected.texts and found.prompts == expected.prompts
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.truncated, expected.truncated)
    torch.testing.assert_close(found.sampled_logps, expected.sampled_logps, rtol=1e-4, atol=1e-5)
    most = at_once if at_once < 4 else at_once - at_once % 4  # groups of four enter as a whole
    assert most <= max(in_work) <= at_once and max(widths) <= max(len(row["prompt_ids"]) for row in rows) + 24
    parts = expected.completion_lengths.split(most)
    if every == 1 and 2 < at_once < 15:
        assert len(in_work) < sum(int(some.max()) for some in parts)  # steps if a part waited for the one before


def test_sampling_and_training_agree_to_the_precision_of_bfloat16(model, monkeypatch):
    """The arithmetic of a GPU: autocast with float32 weights, for the sampler's own step and for the packed pass."""
    expected = sample(model)
    monkeypatch.setattr(gspo, "COMPUTE_DTYPE", "bfloat16")
    monkeypatch.setattr(batch, "tokens_between_checks", lambda device: 16)
    rollouts = sample(model, compute_dtype="bfloat16")
    with torch.no_grad():
        recomputed, _ = gspo.completion_logps(model, rollouts)
    gap = (recomputed - rollouts.sampled_logps)[rollouts.completion_mask].abs()
    assert 1e-6 < gap.mean() < 0.02 and gap.max() < 0.2
    assert rollouts.sampled_logps.dtype == torch.float32
    assert (
        sum(a == b for a, b in zip(rollouts.texts, expected.texts, strict=True)) > 4
    )  # the same until a number is close to the edge between two tokens
