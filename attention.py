"""How the scripts run a transformers model without wasted tokens: packed sequences, and a cache with room to grow.

Nothing here changes what a model computes: check_policy in loading.py compares it with the model's own attention.
"""

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
    takes, so that no sequence sees another.
    """

    model: torch.nn.Module  # that they are for; it is given this attention if it has another
    lengths: torch.Tensor  # (rows,) of the sequences

    def __post_init__(self):
        self.device = self.model.device
        if self.model.config._attn_implementation != NAME:
            self.model.set_attn_implementation(NAME)
        self.rows, self.width = len(self.lengths), int(self.lengths.max())
        inside = torch.arange(self.width) < self.lengths[:, None]  # (rows, width)
        self.place = inside.flatten().nonzero().squeeze(1).to(self.device)  # (N,) of each token in the rows laid out
        self.first = self.lengths.cumsum(0) - self.lengths  # (rows,) the token that each sequence begins with

    def inputs(self, input_ids):
        """The arguments of a model for some rows of ids, (rows, at least width), padded on the right."""
        return {
            "input_ids": input_ids[:, : self.width].to(self.device).flatten()[self.place][None],  # (1, N)
            "position_ids": (self.place % self.width)[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device),  # else a model makes N x N
            "packing": self,
        }

    def laid_out(self, states):
        """(1, heads, N, D) -> (rows, heads, width, D), 0 where there is no token."""
        _, heads, _, size = states.shape
        blank = states.new_zeros(self.rows * self.width, heads, size)
        return (
            blank.index_copy(0, self.place, states[0].transpose(0, 1))
            .view(self.rows, self.width, heads, size)
            .transpose(1, 2)
        )

    def packed(self, states):
        """(rows, heads, width, D) -> (1, N, heads, D)"""
        return states.transpose(1, 2).flatten(0, 1).index_select(0, self.place)[None]


def attention(module, query, key, value, attention_mask, packing=None, sliding_window=None, **options):
    """Scaled dot-product attention of packed sequences, or of rows with a mask (rows, 1, queries, keys)."""
    if packing is not None:
        query, key, value = (packing.laid_out(states) for states in (query, key, value))
        attention_mask = None  # rows begin where sequences begin, and what follows an end no token before it can see
    if sliding_window is not None and key.shape[2] > sliding_window:
        queries, keys = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
        distance = (queries[:, None] + len(keys) - len(queries)) - keys  # (queries, keys)
        near = (distance >= 0) & (distance < sliding_window)
        attention_mask = near[None, None] if attention_mask is None else attention_mask & near
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )  # (rows, queries, heads, D)
    return output if packing is None else packing.packed(output.transpose(1, 2)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class GrowingCache:
    """Keys and values of all layers, (rows, heads, tokens, D) each: what a model asks of a cache, and no more.

    Each step writes its token into room that is there already; a new half is added when it is full. Rows can leave.
    """

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
        start = self.lengths[layer]
        end = self.lengths[layer] = start + key.shape[2]
        if end > self.layers[layer][0].shape[2]:
            room = min(max(end, self.most), end + max(32, end // 2))
            self.layers[layer] = tuple(self._with_room(states, room, start) for states in self.layers[layer])
        for states, new in zip(self.layers[layer], (key, value), strict=True):
            states[:, :, start:end] = new
        return tuple(states[:, :, :end] for states in self.layers[layer])

    def select(self, rows):
        """Keeps some rows, in that order; repeats those that are named several times."""
        self.layers = [tuple(states[rows] for states in layer) for layer in self.layers]

    @staticmethod
    def _with_room(states, room, used):
        larger = states.new_empty(*states.shape[:2], room, states.shape[3])
        larger[:, :, :used] = states[:, :, :used]
        return larger
