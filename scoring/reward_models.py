"""Learned rewards: one for a whole completion, or one for each token."""

import math

import torch
import transformers

from configs import InputError
from engine.packing import batches_of
from engine.precision import dtype_of
from engine.processes import from_all
from inputs.errors import short
from inputs.models import check_vocabulary, load_model, load_tokenizer


def load_reward_model(c, device, policy_tokenizer):
    """Returns the model of REWARD_MODEL: a RewardModel or a TokenRewardModel, as the constants say."""
    options = {"revision": c.REWARD_REVISION, "trust": c.TRUST_REMOTE_CODE}
    classifiers = transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification
    classifier = classifiers[not c.USE_SEQUENCE_LEVEL_REWARD]
    dtype = dtype_of(c.FROZEN_DTYPE, device)
    model = load_model(classifier, c.REWARD_MODEL, "REWARD_MODEL", device, dtype=dtype, packed=False, **options)
    tokenizer = load_tokenizer(c.REWARD_MODEL, "REWARD_MODEL", **options)

    def batches(lengths):
        return batches_of(lengths, c.MICRO_BATCH_TOKENS)

    if c.USE_SEQUENCE_LEVEL_REWARD:
        return RewardModel(model, tokenizer, c.REWARD_MODEL, batches)
    return TokenRewardModel(model, tokenizer, policy_tokenizer, c.REWARD_MODEL, batches, c.STEP_SEPARATOR)


class RewardModel:
    """A learned reward: the one logit of a sequence classifier for a prompt and its completion.

    The model has its own tokenizer. If that has a chat template, the model sees the chat in this form. Otherwise it
    sees prompt and completion as one text. A text longer than the model's context loses its beginning, and report()
    says how often that happens. batches: a function that splits rows into batches by their lengths.
    """

    def __init__(self, model, tokenizer, name, batches):
        self.model, self.tokenizer = model.requires_grad_(False), tokenizer
        self.name, self.batches = name, batches
        config = model.config.get_text_config()
        config.pad_token_id = tokenizer.pad_token_id
        if model.config.num_labels != 1:
            have = f"REWARD_MODEL = {name!r} has {model.config.num_labels} logits"
            raise InputError(f"{have}; give --reward-model one with a single logit")
        check_vocabulary(model, tokenizer, f"REWARD_MODEL = {name!r}")
        limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        self.longest = min(limit for limit in limits if limit)
        self.seen = self.cut = 0

    @torch.no_grad()
    def __call__(self, rows, texts, _):
        """Returns a score per completion, as a list."""
        texts = [self.text_of(row, text) for row, text in zip(rows, texts, strict=True)]
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # equal completions get equal scores
        whole = self.tokenizer(list(distinct), add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        cut = [len(ids) > self.longest for ids in whole]
        self.seen, self.cut = self.seen + len(texts), self.cut + sum(cut[distinct[text]] for text in texts)
        lengths, device = torch.tensor([min(len(ids), self.longest) for ids in whole]), self.model.device
        scores = torch.zeros(len(whole), device=device)
        for rows in self.batches(lengths):
            ids = {"input_ids": [whole[i][-self.longest :] for i in rows]}
            batch = self.tokenizer.pad(ids, return_tensors="pt", padding_side="right").to(device)
            scores[rows.to(device)] = self.model(**batch).logits[:, 0].float()
        scores = scores.tolist()
        return [scores[distinct[text]] for text in texts]

    def text_of(self, row, text):
        if self.tokenizer.chat_template:
            chat = [*row["messages"], {"role": "assistant", "content": text}]
            try:
                return self.tokenizer.apply_chat_template(chat, tokenize=False)
            except Exception as error:  # a template is code, and may raise anything
                raise InputError(
                    f"REWARD_MODEL = {self.name!r}: its chat template refuses {chat!r:.200}: {short(error)}; change "
                    "the prompts or the template"
                ) from None
        return row["prompt"] + text

    def check(self, row):
        """Raises InputError if a prompt and its answer get no finite score.

        So a broken model is found before a step has sampled anything.
        """
        (score,) = self([row], [row["answer"]], None)
        self.report()
        if not math.isfinite(score):
            raise InputError(f"REWARD_MODEL = {self.name!r} gives {score} for the first prompt; give another copy")

    def report(self):
        """Returns the share of texts that were cut since the last report."""
        seen, cut = map(sum, zip(*from_all((self.seen, self.cut), "scoring"), strict=True))
        self.seen = self.cut = 0
        return {"reward_cut": cut / max(1, seen)}


class TokenRewardModel:
    """A learned reward per token: the one logit of a token classifier at each token of a completion.

    The model reads the very ids that the policy sampled, so it must have the policy's vocabulary. separator: if it is
    not empty, only tokens at which this text ends, and the last token, have a reward. The rest is as in RewardModel.
    """

    def __init__(self, model, tokenizer, policy_tokenizer, name, batches, separator):
        self.model, self.tokenizer, self.batches = model.requires_grad_(False), policy_tokenizer, batches
        self.separator, self.token_scores, self.seen, self.cut = separator, None, 0, 0
        if model.config.num_labels != 1:
            raise InputError(f"REWARD_MODEL = {name!r} has {model.config.num_labels} logits; give a model with 1")
        if tokenizer.get_vocab() != policy_tokenizer.get_vocab():
            raise InputError(
                f"REWARD_MODEL = {name!r} does not have the policy's vocabulary, whose tokens it is to score; give one "
                "with the same tokenizer, or --use-sequence-level-reward"
            )
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62

    @torch.no_grad()
    def __call__(self, rows, texts, rollouts):
        """Returns the sum of each completion's token scores, as a list, and sets token_scores (B, T)."""
        mask, lengths = rollouts.completion_mask, rollouts.lengths
        self.token_scores = torch.zeros(mask.shape)
        self.seen, self.cut = self.seen + len(texts), self.cut + int((lengths > self.longest).sum())
        for batch in self.batches(lengths.clamp(max=self.longest)):
            kept = [rollouts.input_ids[i, : lengths[i]][-self.longest :] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)  # pads on the right
            here = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in kept])[:, None]
            device = self.model.device
            logits = self.model(input_ids=ids.to(device), attention_mask=here.to(device)).logits[..., 0].float().cpu()
            for row, i, scores in zip(kept, batch.tolist(), logits, strict=True):
                count = min(int(rollouts.completion_lengths[i]), len(row))
                last = int(rollouts.completion_lengths[i])
                self.token_scores[i, last - count : last] = scores[len(row) - count : len(row)]
        if self.separator:
            self.token_scores.masked_fill_(~self.step_ends(rollouts), 0.0)
        sums = self.token_scores.double().sum(1)
        self.token_scores[~sums.isfinite()] = 0.0  # the sum shows the failure
        return sums.tolist()

    def step_ends(self, rollouts):
        """Returns which tokens end a step, (B, T).

        These are the tokens at which the separator ends, and the last token of each completion.
        """
        ends = torch.zeros_like(rollouts.completion_mask)
        for i, (start, end) in enumerate(zip(rollouts.prompt_lengths, rollouts.lengths, strict=True)):
            pieces = [self.tokenizer.decode([token]) for token in rollouts.input_ids[i, start:end].tolist()]
            text, written = "", 0
            for t, piece in enumerate(pieces):
                text += piece
                ends[i, t] = text.count(self.separator) > written
                written = text.count(self.separator)
            ends[i, len(pieces) - 1] = True
        return ends

    report = RewardModel.report
