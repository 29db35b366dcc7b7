"""Prompts, models and tokenizers, checked as they are read. What is wrong with them is an InputError, one line."""

import contextlib
import inspect
import json
import logging
import math
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

import attention
from answers import marked_answers
from configs import InputError, check_size, find_model, find_path, is_hub_id, is_run, one_line_errors
from metrics import check_right

# In one line where a script is run; where it is imported, as into a notebook, the exception itself.
with one_line_errors() if is_run() else contextlib.nullcontext():
    try:
        from rewards import OF_ANSWERS, Rewards, check_answers, check_rules
    except SyntaxError as error:  # in the file that people edit; the scripts import it after this one
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}; mend it there") from None

# What they say of retries and of weights that do not fit; what comes of it is checked and reported here.
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
huggingface_hub.logging.set_verbosity_error()

# What the libraries raise about a file, a name, a package or the network. Anything else is a fault of ours, and shows
# itself. A TypeError is what they have for a config of the wrong types.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    TypeError,
    SafetensorError,
    huggingface_hub.errors.StrictDataclassError,
)


def _short(error):
    """What an error of a library says, on one line that can be read."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 400, placeholder=" ...").rstrip(".") or type(error).__name__


def hub_remedy(names, else_give, error):
    """What to do if the Hub, or what the cache has of it, does not give something."""
    cache = huggingface_hub.constants.HF_HOME
    while error:
        if isinstance(error, OSError) and str(error.filename or "").startswith(cache):
            return f"the cache {cache} cannot be used: set HF_HOME to a folder that can be written and has room"
        error = error.__cause__ or error.__context__
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # the libraries would have people look at their network
        return (
            f"check {names}, unset HF_HUB_OFFLINE to ask the network for what is not in the cache, or give {else_give}"
        )
    return f"check {names} and network, or give {else_give}"


# ---- Prompts


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
            if marked_answers(begun) or re.search(
                rf"(?<!\w){re.escape(answer.strip())}(?!\w)(.*[.!?])?\s*$", begun, re.S
            ):
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
            what = f"{name} = {str(path)!r} cannot be read as parquet: {_short(error)}"
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
            what = "nested too deeply" if isinstance(error, RecursionError) else _short(error)
        raise InputError(f"{path}, line {line}: not JSON ({what}); {ONE_PER_LINE}") from None


def _read_hub(source, name, config, split):
    import datasets  # here, for it takes a second

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs an error, and raises it
    try:
        rows = datasets.load_dataset(source, config or None, split=split)
    except (*LOAD_ERRORS, datasets.exceptions.DatasetsError) as error:
        remedy = hub_remedy("id, configuration, split", "a file", error)
        what = f"{name} = {source!r}, split {split!r}, cannot be loaded: {_short(error.__cause__ or error)}"
        raise InputError(f"{what}; {remedy}") from None
    return list(rows), lambda number: f"{source}, row {number}"


def hold_out(rows, share, source, generator):
    """Splits rows into a share that is held out, one row for each of its prompts, and those with other prompts.

    Returns (held out, others), in the order of a generator's draw. Raises InputError if there are too few prompts.
    """
    of_prompt = {}
    for row in rows:
        of_prompt.setdefault(_prompt_of(row), []).append(row)
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


def _prompt_of(row):
    return row["prompt"], row["begun"]


def encode_prompts(rows, tokenizer, longest, source, system_prompt="", thinking=False, variables=None):
    """Adds to each row the text that the model sees and its ids; leaves out, and counts, prompts that are too long.

    A tokenizer with a chat template gets the messages and the opening of the answer, with what is begun of it. The
    system prompt stands before them, unless one of them is a system's or a developer's. A tokenizer without a template
    gets the plain text. longest: tokens, which nothing is ever cut to. variables: of the template, {name: value}.
    Raises InputError if none is left.
    """
    kept, empty, own_system = [], 0, 0
    options = {"enable_thinking": thinking, **(variables or {})}
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters} & {*options}
    if ours:
        raise InputError(
            f"CHAT_TEMPLATE_KWARGS sets {', '.join(sorted(ours))}, which is not a template's to say; leave it out"
        )
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
        why, remedy = _short(error), "change the prompts or the template"
    with contextlib.suppress(Exception):
        if system and tokenizer.apply_chat_template(messages, tokenize=False, **options):
            remedy = 'it takes no system message, so give --system-prompt "" and say it in the prompts'
    raise InputError(f"{source}: the chat template refuses {messages!r:.200}: {why}; {remedy}") from None


# ---- Models and tokenizers


def _not_loaded(what, name, constant, error):
    """The InputError for what a library cannot load."""
    if "trust_remote_code" in str(error):
        remedy = "if you trust that code, --trust-remote-code runs it"
    elif isinstance(error, ImportError):
        remedy = "install that, or give another model"
    elif is_hub_id(name):
        remedy = hub_remedy("name, revision", "a folder", error)
    else:
        remedy = "save or download it again, with safetensors and tokenizer, or give another model"
    return InputError(f"{constant} = {name!r}: the {what} cannot be loaded: {_short(error)}; {remedy}")


OTHER_KIND = {  # what to do where the head of a reward model is not what is asked for
    transformers.AutoModelForSequenceClassification: (
        "give a sequence classifier, or for a token classifier --no-use-sequence-level-reward"
    ),
    transformers.AutoModelForTokenClassification: (
        "give a token classifier, or for a sequence classifier --use-sequence-level-reward"
    ),
}


def load_model(auto_class, name, constant, device, *, revision="main", dtype=torch.float32, trust=False, packed=True):
    """A model in eval mode. Every tensor comes from its safetensors files; none is made up or left over.

    packed: with the attention of attention.py, which the scripts' own passes use; else the best that the machine has.
    """
    flash = device.type == "cuda" and dtype != torch.float32 and transformers.utils.is_flash_attn_2_available()
    place = find_model(name, constant)
    try:  # transformers passes over one that it cannot read, and over the ends of sequence in it
        if (generation := Path(place) / "generation_config.json").is_file():
            json.loads(generation.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_loaded("generation_config.json", name, constant, error) from None
    try:
        model, info = auto_class.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention.NAME if packed else "flash_attention_2" if flash else "sdpa",
            use_safetensors=True,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise _not_loaded("model", name, constant, error) from None
    wrong = [f"{what.replace('_', ' ')} {sorted(map(str, keys))[:3]}" for what, keys in info.items() if keys]
    if wrong:
        head = any(str(key).startswith(("score.", "classifier.")) for keys in info.values() for key in keys)
        remedy = OTHER_KIND.get(auto_class, "save it anew") if head else "save it anew"
        raise InputError(f"{constant} = {name!r}: its weights do not fit its config: {'; '.join(wrong)}; {remedy}")
    return model.to(device).eval()


def add_lora(model, rank, alpha, targets):
    """Wraps a model in LoRA adapters (Hu et al. 2021, arXiv 2106.09685), the only weights that train: a peft model.

    model itself computes with the adapters from then on; the wrapper saves them and turns them off.
    """
    import peft  # here, for it takes seconds

    try:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets if targets == "all-linear" else re.split(r"[,\s]+", targets.strip()),
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft, about a name that peft still uses
            warnings.simplefilter("ignore", UserWarning)  # of a tied output head, which is refused below
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # of patterns that peft makes for experts, and has no use for
            adapter = peft.get_peft_model(model, config)
    except ValueError as error:
        remedy = "give names of the model's linear layers"
        raise InputError(f"LORA_TARGETS = {targets!r}: {_short(error)}; {remedy}") from None
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise InputError(f"LORA_TARGETS = {targets!r} names the output head, which takes no adapter; leave it out")
    return adapter


def policy_weights(model, adapter=None):
    """What a checkpoint has to hold: {name: tensor} of all weights, or of those of the adapter."""
    weights = model.state_dict() if adapter is None else adapter.state_dict()
    return weights if adapter is None else {name: value for name, value in weights.items() if ".lora_" in name}


def save_policy(folder, model, adapter=None, weights=None):
    """Writes a policy in Hugging Face layout: all weights, or its adapter alone; as they are, or a copy of them."""
    (model if adapter is None else adapter).save_pretrained(folder, state_dict=weights)
    if adapter is not None:
        (Path(folder) / "README.md").unlink(
            missing_ok=True
        )  # peft's form for a model's card, which nobody has filled in


def save_merged(folder, model, adapter):
    """Writes the whole model with the adapter added in; the model itself stays, for adding in place would round it."""
    import peft

    def without_wrappers(key):  # of which experts have one for each of their parameters
        return ".".join(part for part in key.split(".") if part != "base_layer")

    weights = {without_wrappers(key): value for key, value in model.state_dict().items() if ".lora_" not in key}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            key = f"{without_wrappers(name)}.{getattr(module, 'parameter_name', 'weight')}"
            weights[key] = weights[key] + module.get_delta_weight("default")
    model.save_pretrained(folder, state_dict=weights)


@torch.no_grad()
def load_policy(folder, model, adapter=None):
    """Puts what save_policy wrote into a policy, in place. Raises InputError unless all weights are there and fit."""
    name = str(folder)
    if adapter is None:
        saved = load_model(type(model), name, "checkpoint", torch.device("cpu"), dtype=model.dtype)
        saved = dict(saved.named_parameters()) | dict(saved.named_buffers())
        mine = dict(model.named_parameters()) | dict(model.named_buffers())
    else:
        import peft

        try:
            saved = load_file(folder / "adapter_model.safetensors")
        except LOAD_ERRORS as error:
            raise InputError(f"checkpoint {name}: the adapter cannot be loaded: {error}") from None
        mine = peft.get_peft_model_state_dict(adapter)  # the tensors themselves, under the names that it saves
    if wrong := sorted(saved.keys() ^ mine.keys()) or [key for key in mine if saved[key].shape != mine[key].shape]:
        raise InputError(f"checkpoint {name}: its weights do not fit the policy: {wrong[:3]}; give the run's own model")
    for key, value in mine.items():
        value.copy_(saved[key])


def load_tokenizer(name, constant, *, revision="main", trust=False):
    """A tokenizer with a pad token, the end-of-sequence token where it has none of its own."""
    place = find_model(name, constant)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except Exception as error:  # the tokenizers library raises nothing narrower about a file it cannot use
        raise _not_loaded("tokenizer", name, constant, error) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes such a one where there are no files
        raise InputError(f"{constant} = {name!r}: no tokenizer files there; save the tokenizer in that folder")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"{constant} = {name!r}: the tokenizer has no pad and no end-of-sequence token; set eos_token in its "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_sequence_ids(model, tokenizer, constant):
    """All ids that end a completion: a chat model's generation config often has more than the tokenizer's one."""
    of_model = model.generation_config.eos_token_id
    ids = {*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id} - {None}
    if wrong := [value for value in ids if type(value) is not int]:
        raise InputError(
            f"{constant}: eos_token_id {wrong[0]!r} is no token's number; mend the model's generation_config.json"
        )
    if not ids:
        raise InputError(f"{constant}: the model has no end-of-sequence token; set eos_token in its tokenizer")
    return sorted(ids)


@torch.no_grad()
def check_policy(model, tokenizer, constant):
    """Raises InputError where the scripts would sample from, and train, another model than the one given.

    They pack sequences and apply the output head themselves, a matrix and perhaps a bias, to completion positions
    alone: a model that scales or caps its logits after it is not supported, nor one whose attention is of another kind.
    And every id of the tokenizer must have an embedding.
    """
    check_vocabulary(model, tokenizer, constant)
    ids, lengths, head = torch.arange(10).remainder(len(tokenizer)).view(2, 5), [5, 3], model.get_output_embeddings()
    try:
        packing = attention.Packing(model, torch.tensor(lengths))
        hidden = model.base_model(**packing.inputs(ids), use_cache=False).last_hidden_state[0]
        packed = torch.nn.functional.linear(hidden, head.weight, head.bias)
        model.set_attn_implementation("sdpa")
        alone = [model(row[None, :n].to(model.device)).logits[0] for row, n in zip(ids, lengths, strict=True)]
        model.set_attn_implementation(attention.NAME)
    except Exception:  # a model of another kind may raise what it likes
        packed, alone = torch.zeros(1), [torch.ones(1)]
    if not packed.isfinite().all():
        raise InputError(f"{constant}: its logits are not finite, so its weights hold nan or inf; give another copy")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(packed, torch.cat(alone), rtol=tolerance, atol=tolerance):
        raise InputError(
            f"{constant}: {type(model).__name__} has an attention of its own kind, or changes its logits after the "
            "output head, which the scripts do not support; give a model like Qwen3 or Llama"
        )


def check_rotation(model, longest):
    """Raises InputError if a token's rotation would depend on the longest sequence of a pass, as LongRoPE's does.

    Sampling and training group sequences in other ways, so they would not agree. longest: tokens of a sequence.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # some models have several
        limit = one.get("original_max_position_embeddings") or config.max_position_embeddings
        if one.get("rope_type") in ("longrope", "dynamic") and longest > limit:
            raise InputError(
                f"POLICY_MODEL: its rotation of positions, {one['rope_type']}, depends on whether a sequence beside "
                f"is longer than {limit} tokens, and prompt and completion may have {longest} here; lower "
                "--max-completion-tokens or --max-prompt-tokens, or give another model"
            )


def check_vocabulary(model, tokenizer, constant):
    """Raises InputError unless every id of the tokenizer has an embedding."""
    if len(tokenizer) > (vocabulary := model.get_input_embeddings().num_embeddings):
        raise InputError(
            f"{constant}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}; give a pair that fits"
        )


class RewardModel:
    """A learned reward: the one logit of a sequence classifier for a prompt and its completion.

    It has its own tokenizer, and sees a chat by its own template where it has one, else prompt and completion as one
    text. What is longer than the model's context loses its beginning; report() says how often.
    batches: a function that splits rows into batches by their lengths.
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
        """A score per completion, as a list."""
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
            except Exception as error:  # as for prompts: a template may raise what it likes
                raise InputError(
                    f"REWARD_MODEL = {self.name!r}: its chat template refuses {chat!r:.200}: {_short(error)}; change "
                    "the prompts or the template"
                ) from None
        return row["prompt"] + text

    def check(self, row):
        """Raises InputError where a prompt and its answer get no score: now, and not after a step's sampling."""
        (score,) = self([row], [row["answer"]], None)
        self.report()
        if not math.isfinite(score):
            raise InputError(f"REWARD_MODEL = {self.name!r} gives {score} for the first prompt; give another copy")

    def report(self):
        """The share of texts that were cut since the last report."""
        seen, cut, self.seen, self.cut = self.seen, self.cut, 0, 0
        return {"reward_cut": cut / max(1, seen)}


class TokenRewardModel:
    """A learned reward per token: the one logit of a token classifier at each token of a completion.

    It reads the very ids that the policy sampled, so it has the policy's vocabulary. With a separator, only the tokens
    count that end a step, where that text stands, and the last one. The rest is as in RewardModel.
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
        """The sum of each completion's token scores, as a list. token_scores (B, T) holds them, else 0."""
        mask, lengths = rollouts.completion_mask, rollouts.lengths
        self.token_scores = torch.zeros(mask.shape)
        self.seen, self.cut = self.seen + len(texts), self.cut + int((lengths > self.longest).sum())
        for batch in self.batches(lengths.clamp(max=self.longest)):
            kept = [rollouts.input_ids[i, : lengths[i]][-self.longest :] for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)  # on the right, which a causal model ignores
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
        self.token_scores[~sums.isfinite()] = 0.0  # the sum says that it failed
        return sums.tolist()

    def step_ends(self, rollouts):
        """Which tokens end a step: those in whose text the separator comes to its end, and each completion's last."""
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


# ---- All of it


EMBEDDED = "data/arithmetic/train.jsonl", "data/arithmetic/test.jsonl"  # PROMPTS and EVAL_PROMPTS as the scripts ship


@dataclass
class Loaded:
    """What a trainer works with."""

    train_rows: list  # prompts, as encode_prompts leaves them
    eval_rows: list
    tokenizer: object
    policy: torch.nn.Module
    eos_ids: list
    adapter: object  # peft's, None without LoRA
    ref_model: torch.nn.Module  # None without a KL term, or where the policy without its adapter is the reference
    reward_model: object  # RewardModel or TokenRewardModel, None where REWARDS does not name it


def load_all(c, devices, reward_names, generator):
    """Prompts, tokenizer and models as the constants say. Raises InputError on whatever cannot be used.

    c: the script's constants, of configs.snapshot. devices: of policy, reference and reward model. generator: decides
    which prompts are held out and evaluated on.
    """
    columns = (c.PROMPT_COLUMN, c.ANSWER_COLUMN, c.PROMPTS_CONFIG)
    train_rows = load_prompts(c.PROMPTS, "PROMPTS", *columns, c.PROMPTS_SPLIT)
    eval_source = c.EVAL_PROMPTS
    if eval_source == EMBEDDED[1] and c.PROMPTS != EMBEDDED[0]:  # another task than the one that is trained on
        print(f"EVAL_PROMPTS is that of the embedded task: holding out {c.EVAL_SHARE:.0%} of PROMPTS in its place")
        eval_source = ""
    if eval_source:
        eval_rows = load_prompts(eval_source, "EVAL_PROMPTS", *columns, c.EVAL_SPLIT)
        trained_on = {_prompt_of(row) for row in train_rows}
        if both := sum(_prompt_of(row) in trained_on for row in eval_rows):
            print(f"Warning: {both} of {len(eval_rows)} prompts of EVAL_PROMPTS are also in PROMPTS, so not held out")
    else:
        eval_rows, train_rows = hold_out(train_rows, c.EVAL_SHARE, c.PROMPTS, generator)

    policy_device, ref_device, reward_device = devices
    options = {"revision": c.POLICY_REVISION, "trust": c.TRUST_REMOTE_CODE}
    tokenizer = load_tokenizer(c.POLICY_MODEL, "POLICY_MODEL", **options)
    causal, dtype = transformers.AutoModelForCausalLM, getattr(torch, c.POLICY_DTYPE)
    policy = load_model(causal, c.POLICY_MODEL, "POLICY_MODEL", policy_device, dtype=dtype, **options)
    check_policy(policy, tokenizer, "POLICY_MODEL")
    adapter = ref_model = reward_model = None
    if c.LORA_RANK > 0:
        with torch.random.fork_rng(devices=[]):  # peft draws the adapters' first weights
            torch.manual_seed(c.SEED)
            adapter = add_lora(policy, c.LORA_RANK, c.LORA_ALPHA, c.LORA_TARGETS)
    elif c.KL_COEF > 0 or c.ADAPTIVE_KL:
        dtype = frozen_dtype(c.FROZEN_DTYPE, ref_device)
        ref_model = load_model(causal, c.POLICY_MODEL, "POLICY_MODEL", ref_device, dtype=dtype, **options)
        ref_model.requires_grad_(False)
    if c.GRADIENT_CHECKPOINTING:
        without_dropout(policy)
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # in newer transformers, in older
        next(getattr(policy, name) for name in names if hasattr(policy, name))({"use_reentrant": False})
        policy.enable_input_require_grads()
    if "reward_model" in reward_names:
        options = {"revision": c.REWARD_REVISION, "trust": c.TRUST_REMOTE_CODE}
        dtype = frozen_dtype(c.FROZEN_DTYPE, reward_device)
        classifiers = transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification
        classifier = classifiers[not c.USE_SEQUENCE_LEVEL_REWARD]
        options |= {"packed": False}
        model = load_model(classifier, c.REWARD_MODEL, "REWARD_MODEL", reward_device, dtype=dtype, **options)
        own_tokenizer = load_tokenizer(
            c.REWARD_MODEL, "REWARD_MODEL", revision=c.REWARD_REVISION, trust=c.TRUST_REMOTE_CODE
        )

        def batches(lengths):
            return attention.micro_batches(lengths, c.MICRO_BATCH_TOKENS)

        if c.USE_SEQUENCE_LEVEL_REWARD:
            reward_model = RewardModel(model, own_tokenizer, c.REWARD_MODEL, batches)
        else:
            reward_model = TokenRewardModel(model, own_tokenizer, tokenizer, c.REWARD_MODEL, batches, c.STEP_SEPARATOR)

    context = getattr(policy.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    longest = context - c.MAX_COMPLETION_TOKENS
    longest = min(longest, c.MAX_PROMPT_TOKENS) if c.MAX_PROMPT_TOKENS else longest
    if longest < 1:
        raise InputError(
            f"MAX_COMPLETION_TOKENS = {c.MAX_COMPLETION_TOKENS} leaves no room for a prompt in the model's context of "
            f"{longest + c.MAX_COMPLETION_TOKENS} tokens; lower --max-completion-tokens"
        )
    chat = {"system_prompt": c.SYSTEM_PROMPT, "thinking": c.THINKING}
    chat["variables"] = json.loads(c.CHAT_TEMPLATE_KWARGS or "{}")
    train_rows = encode_prompts(train_rows, tokenizer, longest, c.PROMPTS, **chat)
    if len(eval_rows) > c.EVAL_SIZE:  # some of all, because files are often sorted
        chosen = torch.randperm(len(eval_rows), generator=generator)[: c.EVAL_SIZE].sort().values
        eval_rows = [eval_rows[i] for i in chosen]
    eval_rows = encode_prompts(eval_rows, tokenizer, longest, eval_source or c.PROMPTS, **chat)
    longest = max(len(row["prompt_ids"]) for row in train_rows + eval_rows)
    check_rotation(policy, longest + c.MAX_COMPLETION_TOKENS)
    check_size(c.values(), "EVAL_SIZE", "EVAL_SAMPLES", "MAX_COMPLETION_TOKENS", EVAL_SIZE=len(eval_rows))
    eos_ids = end_of_sequence_ids(policy, tokenizer, "POLICY_MODEL")
    if reward_model is not None and c.USE_SEQUENCE_LEVEL_REWARD:
        reward_model.check(train_rows[0])
    if not c.SELFTEST:  # which shows what fails in its table
        check_rules({*reward_names, c.EVAL_REWARD} - {"reward_model"}, train_rows)
        for name in sorted({*OF_ANSWERS} & {*reward_names}):
            check_answers(name, "REWARDS", train_rows, "PROMPTS")
        eval_rows = check_answers(c.EVAL_REWARD, "EVAL_REWARD", eval_rows, "the held-out ones")
        if not eval_rows:
            raise InputError(f"EVAL_REWARD = {c.EVAL_REWARD!r} returned None for each held-out prompt; give another")
        rule, answer = Rewards({c.EVAL_REWARD: 1.0}), train_rows[0]["answer"]
        with contextlib.suppress(InputError):  # that it scores too few of these, which was judged above
            rule(train_rows[:1] * 3, [answer, f"#### {answer}", ""])
        check_right(rule.scored[c.EVAL_REWARD], c.EVAL_REWARD)
    return Loaded(train_rows, eval_rows, tokenizer, policy, eos_ids, adapter, ref_model, reward_model)


def frozen_dtype(name, device):
    """The dtype of a model that is not trained: by name, or with "auto" bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def without_dropout(model):
    """The model, unable to drop anything: checkpointing works in training mode alone, where π must stay the same π."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model
