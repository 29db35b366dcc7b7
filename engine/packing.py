"""Packs sequences one after the other into one row of a transformers model, so that no token is padding.

Packing changes no number that a model computes. check_policy in inputs/models.py compares the packed pass with the
model's own attention.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"  # this attention's attn_implementation, for from_pretrained


@dataclass
class Packing:
    """Several sequences, one after the other, as the N tokens of one row. So the model sees no padding.

    Every layer but attention works on each token by itself. Attention needs each sequence in a row of its own. So the
    attention of this module unpacks the sequences, long ones apart from short ones, and packs its result again. The
    model must have been loaded with it.
    """

    model: torch.nn.Module
    lengths: torch.Tensor  # (rows,) tokens of each sequence

    def __post_init__(self):
        if self.model.config._attn_implementation != NAME:
            raise ValueError(
                f"a model without this attention would mix sequences; model.set_attn_implementation({NAME!r})"
            )
        self.device = self.model.device
        self.width = int(self.lengths.max())
        self.first = self.lengths.cumsum(0) - self.lengths  # (rows,) where each sequence begins
        self.place = places(self.lengths, self.width, self.device)  # (N,)
        self.position = self.place % self.width
        self.parts, begin = [], 0
        for lengths in split_by_length(self.lengths):
            tokens, width = int(lengths.sum()), int(lengths.max())
            place = self.place if len(lengths) == len(self.lengths) else places(lengths, width, self.device)
            self.parts.append((slice(begin, begin + tokens), PaddedRows(len(lengths), width, place)))
            begin += tokens

    def inputs(self, input_ids):
        """Returns the model's arguments for these sequences. input_ids: (rows, at least width), padded on the right."""
        return {
            "input_ids": input_ids[:, : self.width].to(self.device).flatten()[self.place][None],  # (1, N)
            "position_ids": self.position[None],
            # A dummy, because a model without a mask makes one of N x N.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),
            "packing": self,
        }


def states_before_tokens(model, rollouts, after=0):
    """Returns the last hidden states at the token before each completion token, which predict it: (tokens, H).

    The tokens are in the order of completion_mask. after = 1: the states at the completion tokens themselves.
    """
    packing = Packing(model, rollouts.lengths - 1 + after)  # without the last token, which predicts nothing
    row, t = rollouts.completion_mask.nonzero(as_tuple=True)  # (tokens,) each
    place = packing.first[row] + rollouts.prompt_lengths[row] + t - 1 + after
    states = model.base_model(**packing.inputs(rollouts.input_ids), use_cache=False).last_hidden_state[0]  # (N, H)
    return states.index_select(0, place.to(model.device))


def micro_batches(lengths, token_budget):
    """Yields the row numbers of batches of at most token_budget tokens. lengths: (B,), on the CPU.

    Rows are taken longest first, so that rows of similar length are together. A row longer than the budget goes alone.
    """
    batch, room = [], token_budget
    for row in lengths.argsort(descending=True, stable=True):
        if batch and lengths[row] > room:
            yield torch.stack(batch)
            batch, room = [], token_budget
        batch.append(row)
        room -= int(lengths[row])
    if batch:
        yield torch.stack(batch)


def in_micro_batches(rollouts, compute, token_budget):
    """Returns compute(part), (rows, T), of all completions, which go through in parts of at most token_budget tokens.

    rollouts: Rollouts. compute: a function of Rollouts.
    """
    results = None
    for rows in micro_batches(rollouts.lengths, token_budget):
        part = compute(rollouts.select(rows))
        results = part.new_zeros(rollouts.completion_mask.shape) if results is None else results
        results[rows.to(part.device)] = part
    return torch.zeros(rollouts.completion_mask.shape) if results is None else results


def places(lengths, width, device):
    """Returns (N,): the index of each of the N tokens in rows of that width, laid out one after the other."""
    return (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(1).to(device)


def split_by_length(lengths):
    """Returns lengths (rows,) cut into parts.

    Each part is padded to its own longest sequence, which leaves attention far fewer pairs of tokens.
    """
    before, after = lengths.cummax(0).values, lengths.flip(0).cummax(0).values.flip(0)
    rows = torch.arange(1, len(lengths))
    pairs = rows * before[:-1] ** 2 + rows.flip(0) * after[1:] ** 2  # (rows − 1,) for each place to cut
    uncut = len(lengths) * int(lengths.max()) ** 2
    if len(lengths) == 1 or pairs.min() > min(0.75 * uncut, uncut - 2**14):
        return [lengths]
    cut = int(pairs.argmin()) + 1
    return split_by_length(lengths[:cut]) + split_by_length(lengths[cut:])


@dataclass
class PaddedRows:
    """Some packed sequences, each in a row of its own, padded to the longest."""

    rows: int
    width: int  # length of the longest
    place: torch.Tensor  # (tokens,) index of each token in the rows laid out one after the other

    def unpack(self, states):
        """Turns (1, heads, tokens, D) into (rows, heads, width, D), with 0 at padding."""
        _, heads, _, size = states.shape
        blank = states.new_zeros(self.rows * self.width, heads, size)
        return (
            blank.index_copy(0, self.place, states[0].transpose(0, 1))
            .view(self.rows, self.width, heads, size)
            .transpose(1, 2)
        )

    def pack(self, states):
        """Turns (rows, width, heads, D) into (1, tokens, heads, D)."""
        return states.flatten(0, 1).index_select(0, self.place)[None]


def attention(module, query, key, value, attention_mask, packing=None, **options):
    """Returns scaled dot-product attention of packed sequences, or of rows with a mask (rows, 1, queries, keys)."""
    if packing is None:
        return attention_of_rows(module, query, key, value, attention_mask, **options), None
    outputs = []
    for tokens, rows in packing.parts:  # causal attention: no token sees the padding after its sequence
        states = (rows.unpack(states[:, :, tokens]) for states in (query, key, value))
        outputs.append(rows.pack(attention_of_rows(module, *states, None, **options)))
    return torch.cat(outputs, 1), None


def attention_of_rows(module, query, key, value, attention_mask, sliding_window=None, **options):
    """Turns (rows, heads, queries or keys, D) into (rows, queries, heads, D)."""
    if sliding_window is not None and key.shape[2] > sliding_window:
        queries, keys = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
        distance = (queries[:, None] + len(keys) - len(queries)) - keys  # (queries, keys)
        near = (distance >= 0) & (distance < sliding_window)
        attention_mask = near[None, None] if attention_mask is None else attention_mask & near
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
