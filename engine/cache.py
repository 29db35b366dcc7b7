"""The cache of a model's keys and values while it samples. It has room to grow."""

import inspect

import torch


def with_cache(model, cache):
    """Returns the arguments that give a model a cache. It is called `cache` in transformers 5.24 and later."""
    takes = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}


class GrowingCache:
    """Keys and values of all layers, (rows, heads, tokens, D) each. It has only the methods that a model calls.

    Each step writes its token into room that is already allocated. If the room is full, it grows by half. Rows can be
    removed.
    """

    # (1,) the place of the next token. It is set while a step is recorded, because a recorded step attends to the whole
    # room.
    slot = None

    def __init__(self, most):
        self.most = most  # tokens that it will ever hold
        self.layers = []  # (keys, values) of each layer
        self.lengths = []  # tokens so far, of each layer

    def get_seq_length(self, layer=0):
        return self.lengths[layer] if layer < len(self.lengths) else 0

    def update(self, key, value, layer, *_, **__):
        """Adds a layer's new keys and values, and returns all of them.

        Under autocast, keys come in float32, because their last operation was a norm or a rotation. They are kept in
        the dtype of the values. Otherwise each product with a query would cast them again.
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
        """Gives a layer room for `end` tokens.

        New entries are zeroed: attention gives them weight 0, but 0 × NaN from uninitialised memory would still be NaN.
        """
        states, used = self.layers[layer], self.lengths[layer]
        if end > states[0].shape[2]:
            more = min(max(end, self.most), end + max(32, end // 2)) - used
            self.layers[layer] = tuple(torch.nn.functional.pad(x[:, :, :used], (0, 0, 0, more)) for x in states)

    def spread(self, places):
        """Makes rows of the only one. Each has the tokens at its places. places: (rows, all tokens so far)."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = tuple(states[0][:, places].transpose(0, 1) for states in layer)

    def drop(self, columns):
        """Forgets the first columns, which no row sees."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = tuple(states[:, :, columns : self.lengths[i]] for states in layer)
            self.lengths[i] -= columns

    def join(self, other):
        """Adds the rows of another cache. The shorter one gets empty columns on the left."""
        for i, (mine, new) in enumerate(zip(self.layers, other.layers, strict=True)):
            end = max(self.lengths[i], other.lengths[i])
            both = ((mine, self.lengths[i]), (new, other.lengths[i]))
            both = [[torch.nn.functional.pad(x[:, :, :n], (0, 0, end - n, 0)) for x in states] for states, n in both]
            self.layers[i] = tuple(torch.cat(states) for states in zip(*both, strict=True))
            self.lengths[i] = end

    def select(self, rows):
        """Keeps some rows, in the given order. A row that is named several times is repeated."""
        for i, layer in enumerate(self.layers):  # one by one, because a copy needs the memory of a layer twice
            self.layers[i] = tuple(states[rows] for states in layer)
