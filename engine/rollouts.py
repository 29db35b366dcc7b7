"""The record that flows through a training step: sampled completions, and what each step adds to them."""

from dataclasses import dataclass

import torch


@dataclass
class Rollouts:
    """Sampled completions; those of a group are contiguous. The ids that were sampled are the ids that are trained on.

    The fields of sampling are on the CPU. The fields that an algorithm's steps add are on the policy's device. An
    algorithm may add attributes with B rows each: select, join and to carry every attribute.
    """

    prompts: list  # B rows of the data
    texts: list  # B completions as text, after the answer that the prompt has begun, without the end of sequence
    input_ids: torch.Tensor  # (B, P + T) prompt, completion, padding
    prompt_lengths: torch.Tensor  # (B,) tokens
    completion_lengths: torch.Tensor  # (B,) tokens, end of sequence included
    completion_mask: torch.Tensor  # (B, T) True up to and including the end of sequence
    sampled_logps: torch.Tensor  # (B, T) nats, as the sampler computed them
    truncated: torch.Tensor  # (B,) True if the token limit came before the end of sequence
    experts: torch.Tensor = None  # (B, P + T, layers, k) experts of each token that went through a mixture, else None
    rewards: torch.Tensor = None  # (B,), or (B, T) if each token has its own
    old_logps: torch.Tensor = None  # (B, T) log π_old
    ref_logps: torch.Tensor = None  # (B, T) log π_ref, None without a KL term
    advantages: torch.Tensor = None  # (B,), or (B, T)
    correct: torch.Tensor = None  # (B,) True if EVAL_REWARD calls it right, on the CPU; None if nothing asks for it

    @property
    def lengths(self):
        return self.prompt_lengths + self.completion_lengths

    @property
    def completion_ids(self):
        """The ids of all completions' tokens, one after the other, (tokens,)."""
        row, t = self.completion_mask.nonzero(as_tuple=True)
        return self.input_ids[row, self.prompt_lengths[row] + t]

    def select(self, rows):
        """Returns the completions with these numbers, in this order. rows: (n,), on the CPU."""
        numbers = rows.tolist()

        def chosen(values):
            if isinstance(values, torch.Tensor):
                return values[rows.to(values.device)]
            return None if values is None else [values[i] for i in numbers]

        return self.of({name: chosen(values) for name, values in vars(self).items()})

    def __getitem__(self, part):
        """Returns a slice of the completions, such as rollouts[-8:]."""
        return self.select(torch.arange(len(self.texts))[part])

    def to(self, device):
        """Returns the same completions with all tensors on a device."""
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in vars(self).items()}
        return self.of(moved)

    @classmethod
    def join(cls, parts):
        """Returns several Rollouts as one, padded to the longest."""
        joined = {}
        for name, first in vars(parts[0]).items():
            rows = None if first is None else [row for part in parts for row in getattr(part, name)]
            if isinstance(first, torch.Tensor):
                rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if first.dim() > 1 else torch.stack(rows)
            joined[name] = rows
        return cls.of(joined)

    @classmethod
    def of(cls, attributes):
        """Returns Rollouts with the attributes {name: value}, which may include added ones."""
        rollouts = cls.__new__(cls)
        vars(rollouts).update(attributes)
        return rollouts


def in_places(values, completion_mask):
    """Turns one number per completion token, (tokens,), into (B, T), with 0 where masked. It has their gradient."""
    blank = values.new_zeros(completion_mask.shape)
    return blank.masked_scatter(completion_mask.to(values.device), values)


def last_tokens(completion_mask):
    """Returns which tokens are the last of their completions, (B, T). completion_mask: (B, T)."""
    return completion_mask & ~torch.nn.functional.pad(completion_mask, (0, 1))[:, 1:]


def on_last_token(values, rollouts):
    """Turns one number per completion, (B,), into (B, T): the number at its last token, and 0 elsewhere."""
    last = rollouts.completion_lengths[:, None] - 1
    return torch.zeros(rollouts.completion_mask.shape).scatter(1, last, values[:, None].float())
