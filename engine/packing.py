"""Packs sequences one after the other into one row of a transformers model, so that no token is padding.

Packing changes no number that a model computes. check_policy in inputs/models.py compares the packed pass with the
model's own attention.
"""

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.processes import from_all, own_rows, size
from engine.routing import routing_of, watch
from engine.sharding import body_of, is_sharded

NAME = "packed"  # this attention's attn_implementation, for from_pretrained
# To stop early raises an exception, whose traceback would keep a pass until Python's garbage collection.
computed_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, early_stop=False)
SHORT_PROMPT = 32  # tokens; to read a shorter one again takes less time than attention in more calls


@dataclass
class Packing:
    """Several sequences, one after the other, as the N tokens of one row. So the model sees no padding.

    A sequence may go on from another, its prefix, as the completions of a group go on from their prompt. The prefix,
    which may have a prefix itself, stands there once. Its gradient is the sum of those from all that go on from it.

    Every layer but attention works on each token by itself. Attention needs each sequence in a row of its own, behind
    its prefix. So the attention of this module unpacks the sequences, in parts of like shape, and packs its result
    again. The model must have been loaded with it.
    """

    model: torch.nn.Module
    sequences: list  # of ids (tokens,); those with the same prefix stand together
    prefixes: list = None  # for each sequence the number of the one that it goes on from, or None

    def __post_init__(self):
        if self.model.config._attn_implementation != NAME:
            raise ValueError(
                f"a model without this attention would mix sequences; model.set_attn_implementation({NAME!r})"
            )
        lengths = torch.tensor([len(ids) for ids in self.sequences])
        self.first = lengths.cumsum(0) - lengths  # (sequences,) where each one begins
        self.prefixes = self.prefixes or [None] * len(lengths)
        device, groups = self.model.device, []
        for prefix, numbers in itertools.groupby(range(len(lengths)), self.prefixes.__getitem__):
            before = self.tokens_up_to(prefix)
            groups += [(before, some) for some in split_by_length(lengths[list(numbers)], device) if some.any()]
        self.parts = [Part(some, device) for some in joined(groups, device)]
        self.tokens = [len(part.place) for part in self.parts]  # of each part; its tokens stand together
        self.tensors = {
            "input_ids": torch.cat(self.sequences)[None].to(device),  # (1, N)
            "position_ids": torch.cat([part.positions for part in self.parts])[None].to(device),
            # A dummy, because a model without a mask makes one of N x N.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        }

    @property
    def inputs(self):
        """The model's arguments. If this object held them, it would hold itself, and so its memory after the pass."""
        return {**self.tensors, "packing": self}

    def tokens_up_to(self, number):
        """Returns the places of the tokens that a sequence goes on from, and of its own. number: its own, or None."""
        if number is None:
            return torch.arange(0)
        own = self.first[number] + torch.arange(len(self.sequences[number]))
        return torch.cat([self.tokens_up_to(self.prefixes[number]), own])


def states_before_tokens(model, rollouts, after=0, replay=False):
    """Returns the last hidden states at the token before each completion token, which predict it: (tokens, H).

    The tokens are in the order of completion_mask. after = 1: the states at the completion tokens themselves. replay:
    whether a policy that is a mixture takes the experts in rollouts. If there are none, it chooses, and puts its choice
    there.
    """
    pieces, prefixes, of_prompt, of_completion = sequences_of(rollouts, after)
    packing = Packing(model, cut(rollouts.input_ids, pieces), prefixes)
    prompt_end = packing.first[of_prompt] + rollouts.prompt_lengths - len(packing.sequences[0])  # (B,)
    begin = torch.where(of_prompt == of_completion, prompt_end, packing.first[of_completion])  # (B,)
    row, t = rollouts.completion_mask.nonzero(as_tuple=True)  # (tokens,) each
    t = t - 1 + after
    place = torch.where(t < 0, prompt_end[row] - 1, begin[row] + t).to(model.device)
    routing = routing_of(model)
    replay = replay and routing is not None and routing.replays
    given = None
    if replay and rollouts.experts is not None:
        given = torch.cat(cut(rollouts.experts, pieces)).to(model.device)  # (N, layers, k)
    with watch(model, given):
        states = body_of(model)(**packing.inputs, use_cache=False).last_hidden_state[0]  # (N, H)
        if routing:
            routing.logits = [logits.index_select(0, place) for logits, _ in routing.seen]
            experts = routing.take()  # (N, layers, k)
    if replay and given is None:
        experts = experts.cpu()
        chosen = [experts[packing.tokens_up_to(number)] for number in of_completion.tolist()]
        blank = experts.new_zeros(rollouts.input_ids.shape[1] - len(chosen[0]), *experts.shape[1:])
        chosen[0] = torch.cat([chosen[0], blank])  # pads all rows to the width of input_ids
        rollouts.experts = pad_sequence(chosen, batch_first=True)
    return states.index_select(0, place)


def cut(rows, pieces):
    """Returns the part rows[row, start:end] of each of the pieces (row, start, end)."""
    return [rows[row, start:end] for row, start, end in pieces]


def sequences_of(rollouts, after):
    """Returns pieces of rows that are the sequences of a Packing, its prefixes, and which piece is whose.

    A piece is (row, first token, end). Last come the numbers of the pieces that hold each row's prompt, and its
    completion, (B,) each. Piece 0 is what all prompts begin with, and the prompts go on from it. A prompt that several
    completions share is a piece of its own. Any other stands in one piece with its completion. If after is 0, the last
    tokens are left out, because they predict nothing.
    """
    ids, numbers = rollouts.input_ids, prompt_numbers(rollouts)
    prompt, end = rollouts.prompt_lengths.tolist(), (rollouts.lengths - 1 + after).tolist()
    count, of_prompt = Counter(numbers), [number + 1 for number in numbers]
    common = common_start(ids, rollouts.prompt_lengths) if len(count) > 1 else 0
    pieces, prefixes, of_completion = [(0, 0, common)], [None], list(of_prompt)
    for number in range(len(count)):
        row = numbers.index(number)
        pieces.append((row, common, prompt[row] if count[number] > 1 else end[row]))
        prefixes.append(0)
    for row in sorted(range(len(numbers)), key=numbers.__getitem__):
        if count[numbers[row]] > 1:
            of_completion[row] = len(pieces)
            pieces.append((row, prompt[row], end[row]))
            prefixes.append(of_prompt[row])
    return pieces, prefixes, torch.tensor(of_prompt), torch.tensor(of_completion)


def common_start(ids, lengths):
    """Returns with how many tokens all prompts begin, but for the last token of each, or 0 if these are few.

    These can be a system message and solved examples. ids: (prompts, P or more). lengths: (prompts,).
    """
    shortest = int(lengths.min()) - 1
    same = (ids[:, :shortest] == ids[0, :shortest]).all(0)
    common = int(same.cumprod(0).sum())
    return common if common >= SHORT_PROMPT else 0


def prompt_numbers(rollouts):
    """Returns the number of each completion's prompt, from 0 in the order of the rows, as a list.

    Completions with the same prompt have the same number, unless it is short.
    """
    numbers, rows = {}, zip(rollouts.input_ids, rollouts.prompt_lengths.tolist(), strict=True)
    keys = (row if n < SHORT_PROMPT else ids[:n].numpy().tobytes() for row, (ids, n) in enumerate(rows))
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def micro_batches(rollouts, token_budget, model=None):
    """Yields the row numbers of batches of completions, with at most token_budget tokens. rollouts: Rollouts.

    Completions that share a prompt are together, because it counts once in a batch. If there are several processes,
    these are the batches of this one. model: what they go through. If it is sharded, this process then takes part in
    the passes of those that have more batches.
    """
    numbers, prompt_lengths = prompt_numbers(rollouts), rollouts.prompt_lengths.tolist()
    mine = own_rows(rollouts.lengths.tolist(), numbers)
    of_mine = [numbers[row] for row in mine], [prompt_lengths[row] for row in mine]
    rows = torch.tensor(mine, dtype=torch.long)
    batches = [rows[batch] for batch in batches_of(rollouts.lengths[rows], token_budget, *of_mine)]
    most = max(from_all(len(batches), "the number of passes")) if is_sharded(model) else 0
    yield from batches
    for _ in range(most - len(batches)):
        pass_nothing(model)
    if most:
        model.reset_iter_state()  # embeddings and head would stay gathered, and their passes counted


def pass_nothing(model):
    """Passes a token through a sharded model, and zeros back if there are gradients."""
    one = Packing(model, [torch.zeros(1, dtype=torch.long)])
    with watch(model):
        states = body_of(model)(**one.inputs, use_cache=False).last_hidden_state
    if torch.is_grad_enabled():
        (0 * states.sum()).backward()


def batches_of(lengths, token_budget, prompts=None, prompt_lengths=None):
    """Yields the row numbers of batches of at most token_budget tokens. lengths: (B,), on the CPU.

    Rows are taken longest first, so that rows of similar length are together. A row longer than the budget goes alone.
    prompts, prompt_lengths: lists of B numbers. A row whose prompt's number is in the batch counts without the prompt.
    """
    lengths = lengths.tolist()
    prompts = list(range(len(lengths))) if prompts is None else prompts
    longest = {}
    for row, length in enumerate(lengths):
        longest[prompts[row]] = max(length, longest.get(prompts[row], 0))
    batch, room, read = [], token_budget, set()
    for row in sorted(range(len(lengths)), key=lambda row: (-longest[prompts[row]], prompts[row], -lengths[row])):
        tokens = lengths[row] - (prompt_lengths[row] if prompts[row] in read else 0)
        if batch and tokens > room:
            yield torch.tensor(batch)
            batch, room, read, tokens = [], token_budget, set(), lengths[row]
        batch.append(row)
        read.add(prompts[row])
        room -= tokens
    if batch:
        yield torch.tensor(batch)


def in_micro_batches(rollouts, compute, token_budget, model=None):
    """Returns compute(part), (rows, T), of all completions, which go through in parts of at most token_budget tokens.

    rollouts: Rollouts. compute: a function of Rollouts. Experts that it adds to a part are added to all. model: the one
    that compute uses, as in micro_batches.
    """
    results = experts = None
    mine = []
    for rows in micro_batches(rollouts, token_budget, model):
        selected = rollouts.select(rows)
        part = compute(selected)
        results = part.new_zeros(rollouts.completion_mask.shape) if results is None else results
        results[rows.to(part.device)] = part
        mine += rows.tolist()
        if rollouts.experts is None and selected.experts is not None:  # this pass has put them there
            blank = selected.experts.new_zeros(len(rollouts.texts), *selected.experts.shape[1:])
            experts = blank if experts is None else experts
            experts[rows] = selected.experts
    results = torch.zeros(rollouts.completion_mask.shape) if results is None else results
    if size() > 1:
        own = mine, results[mine].cpu(), None if experts is None else experts[mine]
        for rows, part, some in from_all(own, "log-probs"):
            results[rows] = part.to(results.device)
            if some is not None:
                blank = some.new_zeros(len(rollouts.texts), *some.shape[1:])
                experts = blank if experts is None else experts
                experts[rows] = some
    rollouts.experts = rollouts.experts if experts is None else experts
    return results


def places(lengths, width):
    """Returns (N,): the index of each of the N tokens in rows of that width, laid out one after the other."""
    return (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(1)


def split_by_length(lengths, device):
    """Returns lengths (rows,) cut into parts.

    Each part is padded to its own longest sequence, which leaves attention far fewer pairs of tokens.
    """
    before, after = lengths.cummax(0).values, lengths.flip(0).cummax(0).values.flip(0)
    rows = torch.arange(1, len(lengths))
    pairs = rows * before[:-1] ** 2 + rows.flip(0) * after[1:] ** 2  # (rows − 1,) for each place to cut
    uncut = len(lengths) * int(lengths.max()) ** 2
    # A cut pays if it spares a quarter of the pairs, and more of them than a further part costs.
    if len(lengths) == 1 or pairs.min() > min(0.75 * uncut, uncut - pairs_of_a_part(device)):
        return [lengths]
    cut = int(pairs.argmin()) + 1
    return split_by_length(lengths[:cut], device) + split_by_length(lengths[cut:], device)


def joined(groups, device):
    """Returns the groups as lists of neighbours. A list is to be one part, because several would take longer.

    groups: a list of (places of the packed tokens of a prefix, lengths of the sequences that go on from it).
    """
    lists, shape = [], ()
    for group in groups:
        own, together = shape_of([group]), shape_of([group], *shape)
        apart = pairs_of(len(lists[-1]), *shape) + pairs_of(1, *own) + pairs_of_a_part(device) if lists else 0
        if lists and pairs_of(len(lists[-1]) + 1, *together) <= apart:
            lists[-1].append(group)
            shape = together
        else:
            lists.append([group])
            shape = own
    return lists


def shape_of(groups, prefix=0, rows=0, width=0):
    """Returns to what each of the groups is padded: the longest prefix, the most rows, and the longest row.

    prefix, rows, width: the least of each.
    """
    for before, lengths in groups:
        prefix, rows, width = max(prefix, len(before)), max(rows, len(lengths)), max(width, int(lengths.max()))
    return prefix, rows, width


def pairs_of(groups, prefix, rows, width):
    """Returns the pairs of tokens in attention, padding included, if so many groups of a shape are a part."""
    return groups * rows * width * (prefix + width)


def pairs_of_a_part(device):
    """Returns how many pairs of tokens take about as long as the calls for a further part."""
    return 2 ** (14 if device.type == "cpu" else 18)


class Part:
    """Some packed sequences, each in a row of its own, padded to the longest. Groups of rows have a prefix in common.

    groups: as of joined().
    """

    def __init__(self, groups, device):
        (_, self.rows, self.width), self.device = shape_of(groups), device
        self.of_prefix = torch.tensor([len(before) for before, _ in groups])  # (groups,) tokens
        lengths = pad_sequence([lengths for _, lengths in groups], batch_first=True)  # (groups, rows)
        place = places(lengths.flatten(), self.width)
        self.positions = place % self.width + self.of_prefix[place // (self.rows * self.width)]
        self.place = place.to(device)  # (tokens,) of each token in (groups, rows, width)
        self.before = pad_sequence([before for before, _ in groups], batch_first=True).to(device)  # (groups, prefix)
        self.biases = {}  # by window and dtype, because all layers of a pass ask for them

    def unpack(self, states):
        """Turns (tokens, F) into (groups x rows, width, F), with 0 at padding."""
        rows = len(self.before) * self.rows
        blank = states.new_zeros(rows * self.width, states.shape[1])
        return blank.index_copy(0, self.place, states).view(rows, self.width, -1)

    def with_prefix(self, packed, states):
        """Returns states (groups x rows, width, F) behind those of the prefixes, which are among the packed (N, F)."""
        groups, width = self.before.shape
        if width == 0:
            return states
        prefixes = packed.index_select(0, self.before.flatten()).view(groups, 1, width, -1)
        together = prefixes.expand(-1, self.rows, -1, -1), states.unflatten(0, (groups, self.rows))
        return torch.cat(together, 2).flatten(0, 1)

    def pack(self, states):
        """Turns (groups x rows, width, heads, D) into (tokens, heads, D)."""
        return states.flatten(0, 1).index_select(0, self.place)

    def bias(self, window, dtype):
        """Returns what is added to attention's scores, (rows or 1, 1, width, prefix and width): 0, or −inf if unseen.

        Returns None if there is no prefix, and each token sees all before it.
        """
        if self.before.shape[1] == 0 and (window or self.width) >= self.width:
            return None
        if (window, dtype) not in self.biases:
            self.biases[window, dtype] = self.make_bias(window, dtype)
        return self.biases[window, dtype]

    def make_bias(self, window, dtype):
        width, prefix = self.width, self.before.shape[1]
        own, of_prefix = torch.arange(width), self.of_prefix[:, None]
        of_keys = torch.cat([torch.arange(prefix).expand(len(of_prefix), -1), of_prefix + own], 1)  # (groups, keys)
        seen = near(of_prefix + own, of_keys, window)  # (groups, queries, keys)
        seen[:, :, :prefix] &= (torch.arange(prefix) < of_prefix)[:, None]  # and not the padding of shorter prefixes
        if (of_prefix == prefix).all():
            seen = seen[:1]
        seen = pad(seen, (0, -seen.shape[2] % 16))  # GPUs want rows of a mask to be 16 numbers apart, or copy it
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).to(self.device)
        bias = bias.repeat_interleave(self.rows, 0) if len(bias) > 1 else bias
        return bias[:, None, :, : prefix + width]


def near(of_queries, of_keys, window):
    """Returns which keys each query sees, (..., queries, keys): those at its place, and before it in the window."""
    distance = of_queries[..., None] - of_keys[..., None, :]
    return (distance >= 0) & (distance < window) if window else distance >= 0


def attention(module, query, key, value, attention_mask, packing=None, sliding_window=None, **options):
    """Returns scaled dot-product attention of packed sequences, or of rows with a mask (rows, 1, queries, keys)."""
    if packing is None:
        if sliding_window and sliding_window < key.shape[2]:
            of_keys = torch.arange(key.shape[2], device=key.device)
            attention_mask = attention_mask & near(of_keys[-query.shape[2] :], of_keys, sliding_window)
        return attention_of_rows(module, query, key, value, attention_mask, **options), None
    heads = [states.shape[1] for states in (query, key, value)]
    dtype = value.dtype  # under autocast, bfloat16; a rotation leaves query and key in float32
    query, key, value = (states[0].transpose(0, 1).flatten(1).to(dtype) for states in (query, key, value))
    both, outputs = torch.cat([key, value], 1), []  # (N, F); one tensor is moved in fewer calls than two

    def in_rows(part, of_query, of_both, both):
        keys, values = part.with_prefix(both, part.unpack(of_both)).split([key.shape[1], value.shape[1]], 2)
        states = zip((part.unpack(of_query), keys, values), heads, strict=True)
        states = [one.unflatten(2, (number, -1)).transpose(1, 2) for one, number in states]
        return part.pack(attention_of_rows(module, *states, part.bias(sliding_window, dtype), **options))

    for part, *states in zip(packing.parts, query.split(packing.tokens), both.split(packing.tokens), strict=True):
        if part.before.shape[1] > part.width and key.device.type == "cpu":
            # Most keys and values are copies of the prefix, one for each row. They are not kept, and the backward pass
            # makes them again. On a GPU the further calls would take longer.
            outputs.append(computed_again(in_rows, part, *states, both))
        else:
            outputs.append(in_rows(part, *states, both))
    return torch.cat(outputs)[None], None


def attention_of_rows(module, query, key, value, attention_mask, **options):
    """Turns (rows, heads, queries or keys, D) into (rows, queries, heads, D). Without a mask, attention is causal."""
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    # With a mask, transformers repeats keys and values that several heads share. The kernel for CPUs reads them once.
    causal, scale = attention_mask is None and query.shape[2] > 1, options.get("scaling")
    outputs = scaled_dot_product_attention(
        query, key, value, attention_mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return outputs.transpose(1, 2)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
