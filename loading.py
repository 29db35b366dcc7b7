"""Prompts, models and tokenizers, checked as they are read. What is wrong with them is an InputError, one line."""

import json

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError

from configs import InputError, find_model, find_path

transformers.logging.disable_progress_bar()
huggingface_hub.logging.set_verbosity_error()  # its retries; what comes of them is reported


def load_prompts(source, name, prompt_column, answer_column):
    """The rows of a JSONL file: dicts of all fields, with the prompt in "prompt" and the answer, as text, in "answer".

    Raises InputError, with the line's number, if a line is not a JSON object, lacks a column, or has an empty prompt.
    """
    path = find_path(source, name)
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: cannot read {path}: {error}; give a JSONL file in UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}; one object per line")
        for column, constant in ((prompt_column, "PROMPT_COLUMN"), (answer_column, "ANSWER_COLUMN")):
            if column not in row:
                has = ", ".join(row) or "no fields"
                raise InputError(f"{where}: no field {column!r}, it has {has}; add it or set {constant}")
        if not isinstance(row[prompt_column], str) or not row[prompt_column].strip():
            raise InputError(f"{where}: {prompt_column!r} must be a text that is not empty")
        if row[answer_column] is None:
            raise InputError(f"{where}: {answer_column!r} is null; give an answer or remove the line")
        rows.append({**row, "prompt": row[prompt_column], "answer": str(row[answer_column])})
    if not rows:
        raise InputError(f"{name}: {path} holds no prompts; give a JSONL file with one object per line")
    return rows


def encode_prompts(rows, tokenizer, longest, source):
    """Adds to each row the text that the model sees, by the tokenizer's chat template if it has one, and its ids."""
    for number, row in enumerate(rows, 1):
        message = [{"role": "user", "content": row["prompt"]}]
        if tokenizer.chat_template:
            row["prompt_text"] = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        else:
            row["prompt_text"] = row["prompt"]
        row["prompt_ids"] = tokenizer(row["prompt_text"], add_special_tokens=not tokenizer.chat_template)["input_ids"]
        if len(row["prompt_ids"]) > longest:
            raise InputError(
                f"{source}, prompt {number}: {len(row['prompt_ids'])} tokens, more than the {longest} that the model's "
                "context leaves beside MAX_COMPLETION_TOKENS; shorten the prompt or lower --max-completion-tokens"
            )
    return rows


def load_model(auto_class, name, constant, device):
    """A model in float32 and eval mode. Every tensor comes from its safetensors files; none is made up or left over."""
    try:
        model, info = auto_class.from_pretrained(
            find_model(name, constant), dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{constant} = {name!r}: the model cannot be loaded: {error}") from None
    wrong = [f"{what.replace('_', ' ')} {sorted(map(str, keys))[:3]}" for what, keys in info.items() if keys]
    if wrong:
        raise InputError(f"{constant} = {name!r}: its weights do not fit its config: {'; '.join(wrong)}; save it anew")
    return model.to(device).eval()


def load_tokenizer(name, constant):
    """A tokenizer with a pad token, the end-of-sequence token where it has none of its own."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(name, constant))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{constant} = {name!r}: the tokenizer cannot be loaded: {error}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{constant} = {name!r}: the tokenizer has no pad and no end-of-sequence token; set one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_sequence_ids(model, tokenizer, constant):
    """All ids that end a completion: a chat model's generation config often has more than the tokenizer's one."""
    of_model = model.generation_config.eos_token_id
    ids = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise InputError(f"{constant}: the model has no end-of-sequence token; set eos_token in its tokenizer")
    return sorted(ids)


@torch.no_grad()
def check_head(model, constant):
    """Raises InputError where the model's logits are not its head applied to its last hidden state.

    The scripts apply the head themselves, to completion positions alone; a model that scales or caps its logits after
    it would be sampled from, and trained as, another model.
    """
    ids = torch.arange(4, device=model.device)[None]
    by_hand = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(by_hand, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        kind = type(model).__name__
        raise InputError(
            f"{constant}: {kind} changes its logits after the output head, which the scripts do not support"
        )
