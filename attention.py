"""How the scripts run a transformers model without wasted tokens: packed sequences, and a cache with room to grow.

Nothing here changes what a model computes: check_policy in loading.py compares it with the model's own attention.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"  # of this attention, for from_pretrained's attn_implementation


@dataclass
class Packing:
    """Several sequences one after the other as the N tokens of one row, so that no token that a model sees is padding.

    Every layer of a model but attention works on tokens one by one. Attention lays them out as rows for as long as it
    takes, so that no sequence sees another, long ones apart from short ones.
    """

    model: torch.nn.Module  # that they are for; it is given this attention if it has another
    lengths: torch.Tensor  # (rows,) of the sequences

    def __post_init__(self):
        self.device = self.model.device
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)
        self.width = int(self.lengths.max())
        self.first = self.lengths.cumsum(0) - self.lengths  # (rows,) the token that each sequence begins with
        self.place = places(self.lengths, self.width, self.device)  # (N,)
        self.position = self.place % self.width
        self.parts, begin = [], 0
        for lengths in alike(self.lengths):
            tokens, width = int(lengths.sum()), int(lengths.max())
            place = self.place if len(lengths) == len(self.lengths) else places(lengths, width, self.device)
            self.parts.append((slice(begin, begin + tokens), Rows(len(lengths), width, place)))
            begin += tokens

    def inputs(self, input_ids):
        """The arguments of a model for some rows of ids, (rows, at least width), padded on the right."""
        return {
            "input_ids": input_ids[:, : self.width].to(self.device).flatten()[self.place][None],  # (1, N)
            "position_ids": self.position[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),  # else a model makes N x N
            "packing": self,
        }


def micro_batches(lengths, token_budget):
    """Splits rows into batches of at most token_budget tokens; longest first, for rows of like length go well together.

    lengths (B,) on the CPU -> row indices per batch. A row longer than the budget goes alone.
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


def places(lengths, width, device):
    """Where each of the N tokens of sequences stands in rows of that width one after the other, (N,)."""
    return (torch.arange(width) < lengths[:, None]).flatten().nonzero().squeeze(1).to(device)


def alike(lengths):
    """Cuts lengths (rows,) into parts, where rows as wide as the longest of a part have far fewer pairs of tokens."""
    before, after = lengths.cummax(0).values, lengths.flip(0).cummax(0).values.flip(0)
    rows = torch.arange(1, len(lengths))
    pairs = rows * before[:-1] ** 2 + rows.flip(0) * after[1:] ** 2  # (rows − 1,) if cut there
    together = len(lengths) * int(lengths.max()) ** 2
    if len(lengths) == 1 or pairs.min() > min(0.75 * together, together - 2**14):
        return [lengths]
    cut = int(pairs.argmin()) + 1
    return alike(lengths[:cut]) + alike(lengths[cut:])


@dataclass
class Rows:
    """Some packed sequences as rows."""

    rows: int
    width: int  # of the longest
    place: torch.Tensor  # (tokens,) of each token in the rows one after the other

    def laid_out(self, states):
        """(1, heads, tokens, D) -> (rows, heads, width, D), 0 where there is no token."""
        _, heads, _, size = states.shape
        blank = states.new_zeros(self.rows * self.width, heads, size)
        return (
            blank.index_copy(0, self.place, states[0].transpose(0, 1))
            .view(self.rows, self.width, heads, size)
            .transpose(1, 2)
        )

    def packed(self, states):
        """(rows, width, heads, D) -> (1, tokens, heads, D)"""
        return states.flatten(0, 1).index_select(0, self.place)[None]


def attention(module, query, key, value, attention_mask, packing=None, **options):
    """Scaled dot-product attention of packed sequences, or of rows with a mask (rows, 1, queries, keys)."""
    if packing is None:
        return attention_of_rows(module, query, key, value, attention_mask, **options), None
    outputs = []
    for tokens, rows in packing.parts:  # they begin where sequences begin; no token sees what follows an end
        states = (rows.laid_out(states[:, :, tokens]) for states in (query, key, value))
        outputs.append(rows.packed(attention_of_rows(module, *states, None, **options)))
    return torch.cat(outputs, 1), None


def attention_of_rows(module, query, key, value, attention_mask, sliding_window=None, **options):
    """(rows, heads, queries or keys, D) -> (rows, queries, heads, D)"""
    if sliding_window is not None and key.shape[2] > sliding_window:
        queries, keys = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
        distance = (queries[:, None] + len(keys) - len(queries)) - keys  # (queries, keys)
        near = (distance >= 0) & (distance < sliding_window)
        attention_mask = near[None, None] if attention_mask is None else attention_mask & near
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]


torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape, and most of ours come once
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def with_cache(model, cache):
    """The arguments that give a model a cache, whose name is `cache` in transformers 5.24 and later."""
    takes = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}


class GrowingCache:
    """Keys and values of all layers, (rows, heads, tokens, D) each: what a model asks of a cache, and no more.

    Each step writes its token into room that is there already; a new half is added when it is full. Rows can leave.
    """

    slot = None  # (1,) where the next token goes: set while a step is recorded, which attends to the whole room

    def __init__(self, most):
        self.most, self.layers, self.lengths = most, [], []  # tokens it will ever hold; (keys, values); tokens so far

    def get_seq_length(self, layer=0):
        return self.lengths[layer] if layer < len(self.lengths) else 0

    def update(self, key, value, layer, *_, **__):
        """Adds a layer's new keys and values and returns all of them.

        Under autocast keys come in float32, for a norm or rotation is the last that they went through, and would be
        cast for each product with a query again; they are kept in the dtype of the values.
        """
        key = key.to(value.dtype)
        if layer == len(self.layers):
            self.layers.append((key[:, :, :0], value[:, :, :0]))
            self.lengths.append(0)
        if self.slot is not None:
            return tuple(
                states.index_copy_(2, self.slot, new)
                for states, new in zip(self.layers[layer], (key, value), strict=True)
            )
        start = self.lengths[layer]
        end = start + key.shape[2]
        self.make_room(layer, end)
        self.lengths[layer] = end
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            states[:, :, start:end] = new
        return tuple(states[:, :, :end] for states in self.layers[layer])

    def make_room(self, layer, end):
        """Has a layer hold end tokens; what is new is 0, for a weight of 0 would not hide what is no number."""
        states, used = self.layers[layer], self.lengths[layer]
        if end > states[0].shape[2]:
            more = min(max(end, self.most), end + max(32, end // 2)) - used
            self.layers[layer] = tuple(torch.nn.functional.pad(x[:, :, :used], (0, 0, 0, more)) for x in states)

    def select(self, rows):
        """Keeps some rows, in that order; repeats those that are named several times."""
        for i, layer in enumerate(self.layers):  # one after the other, for each is there twice as long as it takes
            self.layers[i] = tuple(states[rows] for states in layer)
