"""From a row of the data to the ids that the model reads: chat templates, system prompts, begun answers."""

import contextlib
import inspect

from configs import InputError
from inputs.errors import short


def encode_prompts(rows, tokenizer, longest, source, system_prompt="", thinking=False, variables=None):
    """Adds to each row the text that the model sees and its ids; leaves out, and counts, prompts that are too long.

    A tokenizer with a chat template gets the messages and the opening of the answer, with what is begun of it. The
    system prompt stands before them, unless one of them is a system's or a developer's. A tokenizer without a template
    gets the plain text. longest: tokens, which nothing is ever cut to. variables: of the template, {name: value}.
    Raises InputError if none is left.
    """
    kept, empty, own_system = [], 0, 0
    options = {"enable_thinking": thinking, **_checked(variables or {}, tokenizer)}
    for row in rows:
        has_system = any(message["role"] in ("system", "developer") for message in row["messages"])
        own_system += has_system
        system = [{"role": "system", "content": system_prompt}] if system_prompt and not has_system else []
        if tokenizer.chat_template:
            row["prompt_text"] = _render(tokenizer, system, row, options, source)
        else:
            row["prompt_text"] = "\n".join([*(one["content"] for one in system), row["prompt"]]) + row["begun"]
        ids = tokenizer(row["prompt_text"], add_special_tokens=not tokenizer.chat_template)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not row["prompt_text"].endswith(tokenizer.eos_token):
            ids = ids[:-1]  # which some tokenizers add to each text: a prompt is not over
        row["prompt_ids"] = ids
        empty += not ids
        if 0 < len(ids) <= longest:
            kept.append(row)
    if system_prompt and own_system:
        print(f"{source}: {own_system} prompts have a system message of their own, which takes SYSTEM_PROMPT's place")
    if empty == len(rows):
        raise InputError(
            f"{source}: no prompt has a token; the tokenizer of POLICY_MODEL does not know their letters, or its chat "
            "template leaves them out: give prompts and a model that fit"
        )
    if not kept:
        raise InputError(
            f"{source}: each prompt is longer than the {longest} tokens that MAX_PROMPT_TOKENS, or the model's context "
            "beside MAX_COMPLETION_TOKENS, leaves; raise --max-prompt-tokens if it is set, lower "
            "--max-completion-tokens, or shorten the prompts"
        )
    if len(kept) < len(rows):
        left_out = f"left out {len(rows) - len(kept)} of {len(rows)} prompts"
        print(f"{source}: {left_out}, longer than {longest} tokens or empty")
    return kept


def _checked(variables, tokenizer):
    if taken := {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} & {*variables}:
        raise InputError(
            f"CHAT_TEMPLATE_KWARGS sets {', '.join(sorted(taken))}, which is not a template's to say; leave it out"
        )
    return variables


def _render(tokenizer, system, row, options, source):
    """A row's messages by the chat template, up to where the completion begins."""
    messages = row["messages"]
    if row["begun"]:
        options = options | {"continue_final_message": True}
        messages = [*messages, {"role": "assistant", "content": row["begun"]}]
    else:
        options = options | {"add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(system + messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of the model's: it may raise what it likes
        why, remedy = short(error), "change the prompts or the template"
    with contextlib.suppress(Exception):
        if system and tokenizer.apply_chat_template(messages, tokenize=False, **options):
            remedy = 'it takes no system message, so give --system-prompt "" and say it in the prompts'
    raise InputError(f"{source}: the chat template refuses {messages!r:.200}: {why}; {remedy}") from None
