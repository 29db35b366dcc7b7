"""The sampler: it completes prompts with a transformers model, token by token, with a key/value cache."""

import torch
from torch.nn.utils.rnn import pad_sequence

from engine.batch import Batch
from engine.decoding import decoder_of
from engine.memory import completions_in_memory
from engine.precision import autocast, dtype_of_products
from engine.rollouts import Rollouts
from engine.routing import watch
from engine.sharding import gathered
from engine.vocabulary import head_of, invert_cumulative


def load_sampler(c, inputs, devices, fit_to_memory):
    """Returns the sampler that SAMPLER names: the one below, or one with the same call.

    Its `exact` says whether its log-probs are the trainer's, and its `correction` what SAMPLER_CORRECTION comes to. c:
    the script's constants. inputs: an Inputs. devices: {"SAMPLER_DEVICE": ...}. fit_to_memory: a FitToMemory.
    """
    policy = inputs.policy, inputs.tokenizer, inputs.eos_ids
    if c.SAMPLER == "own":
        sampler = Sampler(*policy, c.SAMPLED_AT_ONCE, c.COMPUTE_DTYPE, fit_to_memory)
    else:
        from engine.vllm_sampler import VLLMSampler  # imported here, because it imports this module

        longest = max(len(row["prompt_ids"]) for row in inputs.train_rows + inputs.eval_rows)
        sampler = VLLMSampler(*policy, longest + c.MAX_COMPLETION_TOKENS, c, devices["SAMPLER_DEVICE"])
    by_sampler = {"own": "", "vllm": "token"}
    sampler.correction = by_sampler[c.SAMPLER] if c.SAMPLER_CORRECTION == "auto" else c.SAMPLER_CORRECTION
    return sampler


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
        longest, wanted = max(len(row["prompt_ids"]) for row in rows), len(rows) * group_size
        most = completions_in_memory(self.policy, wanted, longest + max_tokens, self.dtype.itemsize)
        arguments = rows, group_size, uniform, temperature, top_p, max_tokens
        return self.fit_to_memory("sampling", self.at_once or most, lambda n: self.sample_in_turn(*arguments, n))

    def weights(self):
        """Returns the context of calls: the policy's weights are all here, which matters if they are sharded."""
        return gathered(self.policy)

    def add_experts(self, rollouts):
        """Adds nothing, because the experts of a mixture are there: they were seen while it sampled."""

    @torch.no_grad()
    def sample_in_turn(self, rows, group_size, uniform, temperature, top_p, max_tokens, at_once):
        """Does the same as __call__, with at most at_once completions in the batch."""
        model, device, total = self.policy, self.policy.device, len(rows) * group_size
        uniform = None if uniform is None else uniform.to(device)
        ids = torch.full((total, max_tokens), self.tokenizer.pad_token_id, device=device)
        logps = torch.zeros(total, max_tokens, device=device)
        lengths = torch.zeros(total, dtype=torch.long, device=device)
        eos_ids, settings = torch.tensor(self.eos_ids, device=device), (self.compute_dtype, self.tokenizer.pad_token_id)
        with watch(model) as routing:
            batch = Batch(model, rows, group_size, max_tokens, at_once, *settings, routing)
            batch.fill()
            # This is not the autocast of the prompts, because each keeps copies of the weights until it ends.
            with torch.inference_mode(), autocast(device, self.compute_dtype):
                decode, head = decoder_of(model), head_of(model)
                while len(batch.place):
                    row = batch.place, batch.age
                    numbers = None if uniform is None else uniform[row]
                    ids[row], logps[row] = sample_tokens(head(batch.hidden), numbers, temperature, top_p)
                    lengths[batch.place] += batch.running
                    tokens = ids[row]
                    batch.running &= ~torch.isin(tokens, eos_ids)
                    tokens = batch.drop_ended(tokens)
                    if len(tokens):
                        batch.go_on(decode, tokens)
                    batch.fill()
        truncated = (lengths == max_tokens) & ~torch.isin(ids[:, -1], eos_ids)
        rollouts = assemble(self.tokenizer, rows, group_size, *(x.cpu() for x in (ids, lengths, logps, truncated)))
        if routing:  # the last token need not go through, so it has no experts
            through = torch.arange(rollouts.input_ids.shape[1]) < rollouts.lengths[:, None] - 1
            experts = batch.experts[:, : through.shape[1]].cpu()
            rollouts.experts = experts.masked_fill(~through[:, :, None, None], 0)
        return rollouts


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
