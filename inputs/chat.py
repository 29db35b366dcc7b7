"""From a row of the data to the ids that the model reads: chat template, system prompt, begun answer."""

import contextlib
import inspect

from configs import InputError
from inputs.errors import short


def encode_prompts(rows, tokenizer, longest, source, system_prompt="", thinking=False, variables=None):
    """Returns the rows whose prompts fit, and prints how many do not.

    Each row gets prompt_text, the text that the model sees, and prompt_ids. If the tokenizer has a chat template, the
    text is the row's messages, the opening of the answer, and the part of the answer that the row has begun. The system
    prompt comes first, unless a message already has the role system or developer. If the tokenizer has no template, the
    text is plain.

    longest: the most tokens a prompt may have; a longer prompt is left out, and never cut. variables: values for the
    template, {name: value}. Raises InputError if no row is left.
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
            ids = ids[:-1]  # some tokenizers end each text with this token, but a prompt goes on
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
    """Returns a row's messages as the chat template writes them, up to the start of the completion."""
    messages = row["messages"]
    if row["begun"]:
        options = options | {"continue_final_message": True}
        messages = [*messages, {"role": "assistant", "content": row["begun"]}]
    else:
        options = options | {"add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(system + messages, tokenize=False, **options)
    except Exception as error:  # a template is code, and may raise anything
        why, remedy = short(error), "change the prompts or the template"
    with contextlib.suppress(Exception):
        if system and tokenizer.apply_chat_template(messages, tokenize=False, **options):
            remedy = 'it takes no system message, so give --system-prompt "" and say it in the prompts'
    raise InputError(f"{source}: the chat template refuses {messages!r:.200}: {why}; {remedy}") from None
