"""The completions that are sampled together, one row each: how they enter, go on by a token, and leave."""

import collections

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.cache import GrowingCache, with_cache
from engine.packing import common_start
from engine.precision import autocast
from engine.sharding import body_of


class Batch:
    """At most at_once of the completions of some prompts. Those that have ended make room for those that wait.

    A row's tokens stand side by side in the cache, and the latest stands in its last column. So rows of any age go on
    together. Columns before a row's first token are not its own, and it does not see them.

    place: (rows,) the number of each row's completion. age: (rows,) how many of its tokens are sampled. start: (rows,)
    the column of its prompt's first token. running: (rows,) False once it has ended. hidden: (rows, H) the states that
    predict its next token. experts: (completions, tokens, layers, k) of a mixture, or None.
    """

    def __init__(self, model, rows, group_size, max_tokens, at_once, compute_dtype, pad_id, routing):
        self.model, self.rows, self.group_size, self.max_tokens = model, rows, group_size, max_tokens
        self.at_once, self.compute_dtype, self.pad_id, self.routing = at_once, compute_dtype, pad_id, routing
        self.total, self.longest = len(rows) * group_size, max(len(row["prompt_ids"]) for row in rows) + max_tokens
        self.columns = torch.arange(self.longest, device=model.device)
        self.place, self.experts = self.columns[:0], None
        self.steps = self.entered = 0  # how many tokens each row could have had by now, and how many have had a row
        self.limits = collections.deque()  # the steps after which rows have max_tokens
        self.every = tokens_between_checks(model.device)

    # -- Enter

    def fill(self):
        """Lets completions enter if a quarter of the batch is free, because each time their prompts go through.

        Groups enter as a whole if the batch has room for one, because a group's prompt then goes through once.
        """
        room = self.at_once - len(self.place)
        room -= room % self.group_size if self.at_once >= self.group_size else 0
        if self.entered == self.total or room < max(1, 0.25 * self.at_once):
            return
        last = min(self.total, self.entered + room)
        hidden, cache, start, place = self.read_prompts(range(self.entered, last))
        age, running = torch.zeros_like(place), torch.ones_like(place, dtype=torch.bool)
        if len(self.place):
            self.forget_unused()
            more = cache.get_seq_length() - self.cache.get_seq_length()  # columns that the new rows have
            self.cache.join(cache)
            start = torch.cat([self.start + max(more, 0), start + max(-more, 0)])
            hidden, place = torch.cat([self.hidden, hidden]), torch.cat([self.place, place])
            age, running = torch.cat([self.age, age]), torch.cat([self.running, running])
        else:
            self.cache = cache
        self.hidden, self.start, self.place, self.age, self.running = hidden, start, place, age, running
        self.entered = last
        self.limits.append(self.steps + self.max_tokens)

    def forget_unused(self):
        """Takes the columns out of the cache that no row sees any more."""
        unused = int(self.start.min())
        self.cache.drop(unused)
        self.start = self.start - unused

    def read_prompts(self, numbers):
        """Passes the prompts of some completions through the model once each, padded on the left.

        If all of them begin with the same tokens, such as a system message, these go through once for all.

        Returns hidden, a cache, start and place of the completions, one row each. numbers: a range of completions.
        """
        model, device = self.model, self.model.device
        rows = self.rows[numbers[0] // self.group_size : numbers[-1] // self.group_size + 1]
        prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
        lengths = torch.tensor([len(ids) for ids in prompts])
        common = common_start(pad_sequence(prompts, batch_first=True), lengths) if len(rows) > 1 else 0
        prompt_ids = pad_sequence(prompts, batch_first=True, padding_value=self.pad_id, padding_side="left").to(device)
        width, padding = prompt_ids.shape[1], (prompt_ids.shape[1] - lengths).to(device)
        place, cache = self.columns[:width], GrowingCache(self.longest)
        visible = place >= padding[:, None]  # (prompts, P)
        position = (visible.cumsum(1) - 1).clamp(min=0)
        seen = visible[:, None, None] | torch.eye(width, dtype=torch.bool, device=device)
        seen = seen.tril()  # (prompts, 1, P, P)

        def read(ids, mask, position):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            with autocast(device, self.compute_dtype):
                hidden = body_of(model)(**inputs, **with_cache(model.base_model, cache)).last_hidden_state[:, -1]
            return hidden, self.routing.take().unflatten(0, ids.shape) if self.routing else None

        first = place[:common]
        spread = (first - padding[:, None]).clamp(min=0)  # (prompts, common)
        if common:  # each row has as much of it as its padding leaves room for, and reads the rest with its own tokens
            _, before = read(prompts[0][None, :common].to(device), (first[:, None] >= first)[None, None], first[None])
            cache.spread(spread)
        hidden, experts = read(prompt_ids[:, common:], seen[:, :, common:], position[:, common:])  # (prompts, H)
        numbers = torch.arange(numbers[0], numbers[-1] + 1, device=device)
        prompt = numbers // self.group_size - numbers[0] // self.group_size
        cache.select(prompt)
        if self.routing:
            experts = torch.cat([before[0, spread], experts], 1) if common else experts  # (prompts, P, layers, k)
            if self.experts is None:
                self.experts = experts.new_zeros(self.total, self.longest, *experts.shape[2:])
            shifted = (place + padding[:, None]).clamp(max=width - 1)  # (prompts, P) without the padding
            self.experts[numbers, :width] = experts[torch.arange(len(rows), device=device)[:, None], shifted][prompt]
        torch.clear_autocast_cache()  # copies of the weights
        return hidden[prompt], cache, padding[prompt], numbers

    # -- Go on

    def go_on(self, decode, tokens):
        """Passes each row's latest token through the model. decode: of decoder_of. tokens: (rows,)."""
        if self.cache.get_seq_length() == self.longest:
            self.forget_unused()  # there are some, because no row has as many tokens
        end = self.cache.get_seq_length()
        position = end - self.start
        self.hidden = decode(tokens, position, self.cache, self.columns[: end + 1] >= self.start[:, None])  # (rows, H)
        if self.routing:
            self.experts[self.place, position] = self.routing.take()

    # -- Leave

    def drop_ended(self, tokens):
        """Lets rows leave that have ended, once they are a quarter, because a copy of the cache costs more than a few.

        tokens: (rows,), the latest. Returns those of the rows that stay.
        """
        self.age += 1
        self.steps += 1
        full = self.steps == self.limits[0]
        if full:
            self.limits.popleft()
            if self.entered == self.total and not self.limits:
                self.place = self.place[:0]  # all have max_tokens
                return tokens[:0]
            self.running &= self.age < self.max_tokens
        elif self.steps % self.every:
            return tokens
        left = int(self.running.sum())
        if left == 0:
            self.place = self.place[:0]
            return tokens[:0]
        if left == len(tokens) or left > 0.75 * len(tokens) and not full:
            return tokens
        keep = self.running.nonzero().squeeze(1)
        self.cache.select(keep)
        for name in ("place", "age", "start", "running"):
            setattr(self, name, getattr(self, name)[keep])
        return tokens[keep]


def tokens_between_checks(device):
    """How many tokens to sample between checks for finished rows.

    A check makes the CPU wait for the GPU, so on a GPU it is done every 16 tokens.
    """
    return 16 if device.type == "cuda" else 1
