"""Reads the rows of data files and data sets, checks them, and splits off a held-out part."""

import json
import logging
import math
import re

import pyarrow.parquet
import torch

from configs import InputError, find_path, is_hub_id
from inputs.answer_marks import marked_answers
from inputs.errors import LOAD_ERRORS, hub_remedy, short

ONE_PER_LINE = "one object per line; a JSON array belongs in a file named .json"


def load_prompts(source, name, prompt_column, answer_column, config="", split="train"):
    """Returns the rows of a JSONL, JSON or Parquet file, or of a dataset on the Hub, as dicts.

    A dict has all fields of its row, and four more. "prompt" is the prompt as text, "messages" the prompt as a chat,
    [{"role": ..., "content": ...}], and "answer" the answer as text. "begun" is the begun answer in the assistant's
    message at the end, or "". If that message is a whole answer, it is left out, because the policy must not see it,
    and a printed line counts such rows. The data may hold a prompt as a text or as messages, and a column inside
    others, as in "reward_model.ground_truth". Raises InputError with the line's number if a row is no object, lacks a
    column, or has an empty prompt or answer.
    """
    rows, where = _read_rows(source, name, config, split)
    whole = 0
    for number, row in enumerate(rows, 1):
        place = where(number)
        if not isinstance(row, dict):
            raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}; {ONE_PER_LINE}")
        messages = _field(row, prompt_column, "PROMPT_COLUMN", place)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not _is_chat(messages):
            raise InputError(
                f"{place}: {prompt_column!r} must be a text that is not empty, or messages with role and content"
            )
        answer = _as_text(_field(row, answer_column, "ANSWER_COLUMN", place), f"{place}: {answer_column!r}")
        begun = ""
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            begun = last["content"]
            if _is_whole(begun, answer):
                begun, whole = "", whole + 1
        text = "\n".join(message["content"] for message in messages)
        if not text.strip():
            raise InputError(f"{place}: {prompt_column!r} is an assistant's message alone; begin it with a user's")
        try:
            f"{text}{answer}{begun}".encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair, such as "\\ud83d"
            raise InputError(f"{place}: the text holds half of a surrogate pair; write the character whole") from None
        rows[number - 1] = {**row, "prompt": text, "messages": messages, "begun": begun, "answer": answer}
    if not rows:
        raise InputError(f"{name} = {source!r} holds no prompts; give at least one")
    if whole:
        print(f"{source}: {whole} of {len(rows)} prompts end with an assistant's whole answer, which was left out")
    return rows


def _is_whole(begun, answer):
    """Returns whether an assistant's message is a whole answer.

    It is one if it marks an answer, ends with the row's answer, or is a sentence that holds it.
    """
    holds_it = rf"(?<!\w){re.escape(answer.strip())}(?!\w)(.*[.!?])?\s*$"
    return bool(marked_answers(begun) or re.search(holds_it, begun, re.DOTALL))


def _field(row, column, constant, place):
    """Returns the value of a row's column. A name with dots leads into nested fields: "reward_model.ground_truth".

    constant: the constant that names the column, for the message.
    """
    value = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(row) or "no fields"
            raise InputError(f"{place}: no field {column!r}, it has {has}; add it or set {constant}")
        value = value[part]
    return value


def _as_text(answer, name):
    """Returns an answer as text. A list of one answer gives that answer, and 3.0 gives "3".

    Some file types store all numbers as floats. name: the name of the answer, for the message.
    """
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    if isinstance(answer, list | dict | bytes) or isinstance(answer, float) and not math.isfinite(answer):
        raise InputError(f"{name} is {answer!r:.60}; give a text or a number")
    if answer is None or not str(answer).strip():
        raise InputError(f"{name} is {'null' if answer is None else 'empty'}; give an answer or remove the row")
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _is_chat(messages):
    try:
        return any(message["content"].strip() for message in messages) and all(
            isinstance(message["content"], str) and isinstance(message["role"], str) and message["role"]
            for message in messages
        )
    except (TypeError, KeyError, AttributeError):
        return False


def _read_rows(source, name, config, split):
    """Returns the rows as they are in the source, and a function that says where row N is."""
    if is_hub_id(source):
        return _read_hub(source, name, config, split)
    path = find_path(source, name)
    kind = path.suffix.lower().lstrip(".")
    if path.is_dir():
        raise InputError(f"{name} = {source!r} is a folder; give the JSONL, JSON or Parquet file itself")
    if kind in ("csv", "tsv"):
        convert = f"pandas.read_csv({path.name!r}).to_json('{path.stem}.jsonl', orient='records', lines=True)"
        raise InputError(f"{name} = {source!r} is a CSV file, which is not read; convert it: {convert}")
    if path.stat().st_size == 0:
        return [], None
    if kind == "parquet":
        try:
            return pyarrow.parquet.read_table(path).to_pylist(), lambda number: f"{path}, row {number}"
        except LOAD_ERRORS as error:
            problem = f"{name} = {str(path)!r} cannot be read as parquet: {short(error)}"
            raise InputError(f"{problem}; write the file anew") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: cannot read {path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; give JSONL in UTF-8, or JSON or Parquet") from None
    if kind == "json" and text.lstrip().startswith("["):  # many .json files hold an object per line instead
        return _parse_json(text, path, 1), lambda number: f"{path}, row {number}"
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    rows = [_parse_json(lines[number - 1], path, number) for number in numbers]
    return rows, lambda number: f"{path}, line {numbers[number - 1]}"


def _parse_json(text, path, line):
    """Returns the value of a JSON text that begins in a line of a file. path, line: for the message."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\0" in text:
            raise InputError(f"{path}, line {line}: holds NUL, as UTF-16 does; save it as UTF-8") from None
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            problem = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        else:
            problem = "nested too deeply" if isinstance(error, RecursionError) else short(error)
        raise InputError(f"{path}, line {line}: not JSON ({problem}); {ONE_PER_LINE}") from None


def _read_hub(source, name, config, split):
    import datasets  # imported here, because it takes a second

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # because importing it sets another level
    try:
        rows = datasets.load_dataset(source, config or None, split=split)
    except (*LOAD_ERRORS, datasets.exceptions.DatasetsError) as error:
        remedy = hub_remedy("id, configuration, split", "a file", error)
        problem = f"{name} = {source!r}, split {split!r}, cannot be loaded: {short(error.__cause__ or error)}"
        raise InputError(f"{problem}; {remedy}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    return list(rows), lambda number: f"{source}, row {number}"


def hold_out(rows, share, source, generator):
    """Returns (held out, others): a share of the prompts with one row for each, and all rows with other prompts.

    The order is that of the generator's draw. Raises InputError if there are too few prompts.
    """
    of_prompt = {}
    for row in rows:
        of_prompt.setdefault(prompt_of(row), []).append(row)
    if repeated := len(rows) - len(of_prompt):
        print(f"{source}: {repeated} of {len(rows)} rows repeat the prompt of another; prompts are held out whole")
    count = max(1, round(share * len(of_prompt)))
    if count >= len(of_prompt):
        raise InputError(
            f"PROMPTS = {source!r}: {len(of_prompt)} prompts are too few to hold some out; give --eval-prompts"
        )
    groups = list(of_prompt.values())
    order = torch.randperm(len(groups), generator=generator).tolist()
    return [groups[i][0] for i in order[:count]], [row for i in order[count:] for row in groups[i]]


def prompt_of(row):
    return row["prompt"], row["begun"]


def prompts_of_step(rows, step, batch_size, generator_of):
    """Returns batch_size rows for a step (from 1). Each pass over the data has its own order.

    generator_of: the script's function, whose generator draws the order of a pass.
    """
    first = (step - 1) * batch_size
    chosen = []
    for position in range(first, first + batch_size):
        epoch, index = divmod(position, len(rows))
        if not chosen or index == 0:
            order = torch.randperm(len(rows), generator=generator_of("data order", epoch))
        chosen.append(rows[order[index]])
    return chosen
