"""The sampler: it completes prompts with a transformers model, token by token, with a key/value cache."""

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.cache import GrowingCache, with_cache
from engine.decoding import decoder_of
from engine.memory import completions_in_memory
from engine.packing import common_start
from engine.precision import autocast, dtype_of_products
from engine.rollouts import Rollouts
from engine.routing import watch
from engine.vocabulary import head_of, invert_cumulative


def load_sampler(c, inputs, fit_to_memory):
    """Returns a run's Sampler. c: the script's constants. inputs: an Inputs. fit_to_memory: a FitToMemory."""
    policy = inputs.policy, inputs.tokenizer, inputs.eos_ids
    return Sampler(*policy, c.SAMPLED_AT_ONCE, c.COMPUTE_DTYPE, fit_to_memory)


class Sampler:
    """Samples completions from a policy, as many at once as memory holds.

    eos_ids: the tokens that end a completion. at_once: the most completions to sample together, or 0 for as many as
    there is free memory for. compute_dtype: the constant COMPUTE_DTYPE. fit_to_memory: a FitToMemory.
    """

    def __init__(self, policy, tokenizer, eos_ids, at_once, compute_dtype, fit_to_memory):
        self.policy, self.tokenizer, self.eos_ids = policy, tokenizer, eos_ids
        self.at_once, self.compute_dtype, self.fit_to_memory = at_once, compute_dtype, fit_to_memory
        self.dtype = dtype_of_products(policy, compute_dtype)
        # Whether a completion's log-probs are the trainer's, whatever else is in the batch, but for 1e-6.
        self.exact = policy.device.type == "cpu" and self.dtype == torch.float32

    def __call__(
        self,
        rows: list,
        group_size: int,
        uniform: torch.Tensor | None,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> Rollouts:
        """Returns group_size completions of each row's prompt, groups contiguous.

        uniform: (B, max_tokens), numbers in [0, 1). Each decides one token, so a completion does not depend on how many
        are sampled at once, which may be a part of a group. If uniform is None, decoding is greedy.
        """

        def sample_in_parts(at_once):
            parts, prompts, most = [], max(1, at_once // group_size), min(at_once, group_size)
            for i in range(0, len(rows), prompts):
                for first in range(0, group_size, most):
                    size, numbers = min(most, group_size - first), None
                    if uniform is not None:
                        numbers = uniform.view(len(rows), group_size, -1)[i : i + prompts, first : first + size]
                        numbers = numbers.flatten(0, 1)
                    part = (rows[i : i + prompts], size, numbers)
                    parts.append(self.sample_together(*part, temperature, top_p, max_tokens))
            return parts[0] if len(parts) == 1 else Rollouts.join(parts)

        tokens = max(len(row["prompt_ids"]) for row in rows) + max_tokens
        wanted, width = len(rows) * group_size, self.dtype.itemsize
        at_once = self.at_once or completions_in_memory(self.policy, wanted, tokens, width)
        return self.fit_to_memory("sampling", at_once, sample_in_parts)

    @torch.no_grad()
    def sample_together(self, rows, group_size, uniform, temperature, top_p, max_tokens):
        """Does the same as __call__, in one batch. A completion that has ended leaves the batch."""
        model, device, batch = self.policy, self.policy.device, len(rows) * group_size
        uniform = None if uniform is None else uniform.to(device)
        with watch(model) as routing:
            hidden, cache, visible, position, experts = self.read_prompts(rows, group_size, max_tokens, routing)
        width, eos_ids = visible.shape[1] - max_tokens, torch.tensor(self.eos_ids, device=device)
        ids = torch.full((batch, max_tokens), self.tokenizer.pad_token_id, device=device)
        logps = torch.zeros(batch, max_tokens, device=device)
        lengths = torch.zeros(batch, dtype=torch.long, device=device)
        place = torch.arange(batch, device=device)  # the completion of each row that is still in the batch
        running = torch.ones(batch, dtype=torch.bool, device=device)
        # This is not the autocast of read_prompts, because each keeps copies of the weights until it ends.
        with torch.inference_mode(), autocast(device, self.compute_dtype), watch(model) as routing:
            decode, head = decoder_of(model), head_of(model)
            for t in range(max_tokens):
                logits = head(hidden)  # (rows, V)
                numbers = None if uniform is None else uniform[place, t]
                tokens, logps[place, t] = sample_tokens(logits, numbers, temperature, top_p)
                ids[place, t] = tokens
                lengths[place] += running
                running &= ~torch.isin(tokens, eos_ids)
                left = int(running.sum()) if (t + 1) % tokens_between_checks(device) == 0 else len(running)
                if left == 0 or t == max_tokens - 1:
                    break
                # Finished rows leave together, because a copy of the cache costs more than a few idle rows.
                if left <= 0.75 * len(running):
                    keep = running.nonzero().squeeze(1)
                    cache.select(keep)
                    place, tokens, running, visible, position = (
                        x[keep] for x in (place, tokens, running, visible, position)
                    )
                hidden = decode(tokens, position, cache, visible[:, : width + t + 1])  # (rows, H)
                if routing:
                    experts[place, width + t] = routing.take()
                position = position + 1
        truncated = torch.zeros(batch, dtype=torch.bool, device=device)
        truncated[place] = running
        rollouts = assemble(self.tokenizer, rows, group_size, ids.cpu(), lengths.cpu(), logps.cpu(), truncated.cpu())
        if routing:
            begin = (width - rollouts.prompt_lengths).tolist()
            parts = [row[i : i + n] for row, i, n in zip(experts.cpu(), begin, rollouts.lengths.tolist(), strict=True)]
            rollouts.experts = pad_sequence(parts, batch_first=True)
            rollouts.experts[torch.arange(batch), rollouts.lengths - 1] = 0  # the last token need not go through
        return rollouts

    def read_prompts(self, rows, group_size, max_tokens, routing):
        """Passes each prompt through the model once, padded on the left, and repeats the results for its group.

        If all prompts begin with the same tokens, such as a system message, these go through once for all.

        Returns the last hidden states (B, H); the cache; a mask (B, P + max_tokens) that is False at the prompt's
        padding; the position of each completion's first token (B,); and with a Routing the experts of the prompts'
        tokens (B, P + max_tokens, layers, k).
        """
        model, device = self.policy, self.policy.device
        prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
        lengths, pad = torch.tensor([len(ids) for ids in prompts]), self.tokenizer.pad_token_id
        common = common_start(pad_sequence(prompts, batch_first=True), lengths) if len(rows) > 1 else 0
        prompt_ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left").to(device)
        width, padding = prompt_ids.shape[1], prompt_ids.shape[1] - lengths[:, None]
        visible = (torch.arange(width + max_tokens) >= padding).to(device)  # (prompts, P + max_tokens)
        position = (visible[:, :width].cumsum(1) - 1).clamp(min=0)
        seen = visible[:, None, None, :width] | torch.eye(width, dtype=torch.bool, device=device)
        seen, cache = seen.tril(), GrowingCache(width + max_tokens)  # (prompts, 1, P, P)

        def read(ids, mask, position):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
            with autocast(device, self.compute_dtype):
                hidden = model.base_model(**inputs, **with_cache(model.base_model, cache)).last_hidden_state[:, -1]
            return hidden, routing.take().unflatten(0, ids.shape) if routing else None

        place = torch.arange(common, device=device)
        spread = (place - padding.to(device)).clamp(min=0)  # (prompts, common)
        if common:  # each row has as much of it as its padding leaves room for, and reads the rest with its own tokens
            _, before = read(prompts[0][None, :common].to(device), (place[:, None] >= place)[None, None], place[None])
            cache.spread(spread)
        hidden, experts = read(prompt_ids[:, common:], seen[:, :, common:], position[:, common:])  # (prompts, H)
        prompt = torch.arange(len(rows) * group_size, device=device) // group_size
        cache.select(prompt)
        if routing:
            before = before[0, spread] if common else experts[:, :0]  # (prompts, common, layers, k)
            room = experts.new_zeros(len(rows), max_tokens, *experts.shape[2:])
            experts = torch.cat([before, experts, room], 1)[prompt]
        return hidden[prompt], cache, visible[prompt], lengths.to(device)[prompt], experts


def sample_tokens(logits, uniform, temperature, top_p):
    """Returns one token per row, and its log-prob under the full distribution, both (rows,).

    The token is where the cumulative distribution passes uniform (rows,). If uniform is None, it is the most likely
    one.
    """
    probs = full = (logits.float() / temperature if temperature != 1 else logits.float()).softmax(-1)  # (rows, V)
    if uniform is None:
        tokens = probs.argmax(-1)
    else:
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            outside = ranked.cumsum(-1) - ranked >= top_p  # the most likely token always stays
            probs = probs.scatter(-1, order, ranked.masked_fill(outside, 0.0))
        tokens = invert_cumulative(probs, uniform)
    return tokens, full.gather(1, tokens[:, None]).squeeze(1).log()


def tokens_between_checks(device):
    """How many tokens to sample between checks for finished rows.

    A check makes the CPU wait for the GPU, so on a GPU it is done every 16 tokens.
    """
    return 16 if device.type == "cuda" else 1


def assemble(tokenizer, rows, group_size, completion_ids, completion_lengths, logps, truncated):
    """Returns the Rollouts of sampled completions.

    Masks are made from lengths. Each completion stands right behind its prompt, without padding between them.
    """
    prompts = [row for row in rows for _ in range(group_size)]
    longest = int(completion_lengths.max())
    completion_mask = torch.arange(longest) < completion_lengths[:, None]  # (B, T)
    completions = [ids[:n].tolist() for ids, n in zip(completion_ids, completion_lengths, strict=True)]
    written = [ids[: len(ids) - ended] for ids, ended in zip(completions, (~truncated).tolist(), strict=True)]
    texts = tokenizer.batch_decode(written, skip_special_tokens=False)  # keep tokens such as <think>
    sequences = [torch.tensor(row["prompt_ids"] + ids) for row, ids in zip(prompts, completions, strict=True)]
    return Rollouts(
        prompts=prompts,
        texts=[row.get("begun", "") + text for row, text in zip(prompts, texts, strict=True)],
        input_ids=pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id),
        prompt_lengths=torch.tensor([len(row["prompt_ids"]) for row in prompts]),
        completion_lengths=completion_lengths,
        completion_mask=completion_mask,
        sampled_logps=logps[:, :longest].masked_fill(~completion_mask, 0.0),
        truncated=truncated,
    )
