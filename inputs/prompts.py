"""The rows of data files and data sets: read, checked, and split into those to train on and those held out."""

import json
import logging
import math
import re

import pyarrow.parquet
import torch

from configs import InputError, find_path, is_hub_id
from inputs.errors import LOAD_ERRORS, hub_remedy, short
from scoring.answers import marked_answers

ONE_PER_LINE = "one object per line; a JSON array belongs in a file named .json"


def load_prompts(source, name, prompt_column, answer_column, config="", split="train"):
    """The rows of a JSONL, JSON or Parquet file, or of a dataset on the Hub: dicts of all fields, and of these.

    "prompt": the prompt as text; "messages": the same as a chat, [{"role": ..., "content": ...}]; "answer": as text;
    "begun": what the assistant has begun to answer. A prompt may be given as a text, or as such a list of messages, and
    each column may be inside others: "reward_model.ground_truth". Raises InputError, with the line's number, if a row
    is no object, lacks a column, or has an empty prompt or answer.

    An assistant's message at the end is a begun answer, unless it marks an answer, ends with the row's, or is a
    sentence that holds it. Then it is a whole answer, which the policy must not see, and is left out; a printed line
    says of how many rows.
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
        except UnicodeEncodeError:  # JSON can write half a pair, "\\ud83d", which is no text
            raise InputError(f"{place}: the text holds half of a surrogate pair; write the character whole") from None
        rows[number - 1] = {**row, "prompt": text, "messages": messages, "begun": begun, "answer": answer}
    if not rows:
        raise InputError(f"{name} = {source!r} holds no prompts; give at least one")
    if whole:
        print(f"{source}: {whole} of {len(rows)} prompts end with an assistant's whole answer, which was left out")
    return rows


def _is_whole(begun, answer):
    """Whether a text marks an answer, ends with the row's, or is a sentence that holds it."""
    holds_it = rf"(?<!\w){re.escape(answer.strip())}(?!\w)(.*[.!?])?\s*$"
    return bool(marked_answers(begun) or re.search(holds_it, begun, re.DOTALL))


def _field(row, column, constant, place):
    """A row's field of that name, or the one that it leads to through others: "reward_model.ground_truth"."""
    value = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or part not in value:
            has = ", ".join(row) or "no fields"
            raise InputError(f"{place}: no field {column!r}, it has {has}; add it or set {constant}")
        value = value[part]
    return value


def _as_text(answer, what):
    """An answer as text: the one in a list of one, and 3.0 as "3", as which some file types have all numbers."""
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    if isinstance(answer, list | dict | bytes) or isinstance(answer, float) and not math.isfinite(answer):
        raise InputError(f"{what} is {answer!r:.60}; give a text or a number")
    if answer is None or not str(answer).strip():
        raise InputError(f"{what} is {'null' if answer is None else 'empty'}; give an answer or remove the row")
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
    """The rows as they are, and a function that says where row N is."""
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
            what = f"{name} = {str(path)!r} cannot be read as parquet: {short(error)}"
            raise InputError(f"{what}; write the file anew") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: cannot read {path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; give JSONL in UTF-8, or JSON or Parquet") from None
    if kind == "json" and text.lstrip().startswith("["):  # else it holds an object per line, as many of that name do
        return _parse_json(text, path, 1), lambda number: f"{path}, row {number}"
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines, 1) if line.strip()]
    rows = [_parse_json(lines[number - 1], path, number) for number in numbers]
    return rows, lambda number: f"{path}, line {numbers[number - 1]}"


def _parse_json(text, path, line):
    """What a JSON text says, which begins in that line of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if "\0" in text:
            raise InputError(f"{path}, line {line}: holds NUL, as UTF-16 does; save it as UTF-8") from None
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            what = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        else:
            what = "nested too deeply" if isinstance(error, RecursionError) else short(error)
        raise InputError(f"{path}, line {line}: not JSON ({what}); {ONE_PER_LINE}") from None


def _read_hub(source, name, config, split):
    import datasets  # here, for it takes a second

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error, and raises it
    try:
        rows = datasets.load_dataset(source, config or None, split=split)
    except (*LOAD_ERRORS, datasets.exceptions.DatasetsError) as error:
        remedy = hub_remedy("id, configuration, split", "a file", error)
        what = f"{name} = {source!r}, split {split!r}, cannot be loaded: {short(error.__cause__ or error)}"
        raise InputError(f"{what}; {remedy}") from None
    return list(rows), lambda number: f"{source}, row {number}"


def hold_out(rows, share, source, generator):
    """Splits rows into a share that is held out, one row for each of its prompts, and those with other prompts.

    Returns (held out, others), in the order of a generator's draw. Raises InputError if there are too few prompts.
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
    """batch_size rows for a step (from 1). Each pass over the data has an order of its own, a function of the pass.

    generator_of: the script's, for the order of a pass.
    """
    first = (step - 1) * batch_size
    chosen = []
    for position in range(first, first + batch_size):
        epoch, index = divmod(position, len(rows))
        if not chosen or index == 0:
            order = torch.randperm(len(rows), generator=generator_of("data order", epoch))
        chosen.append(rows[order[index]])
    return chosen
