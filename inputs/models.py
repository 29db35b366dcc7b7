"""Loads models and tokenizers, and checks whether the scripts can train them."""

import json
from pathlib import Path

import torch
import transformers

from configs import InputError, find_model
from engine import packing
from inputs.errors import LOAD_ERRORS, not_loaded

OTHER_KIND = {  # the remedy if a reward model has the other kind of head
    transformers.AutoModelForSequenceClassification: (
        "give a sequence classifier, or for a token classifier --no-use-sequence-level-reward"
    ),
    transformers.AutoModelForTokenClassification: (
        "give a token classifier, or for a sequence classifier --use-sequence-level-reward"
    ),
}


def load_model(
    auto_class,
    name,
    constant,
    device,
    *,
    revision="main",
    dtype=torch.float32,
    trust=False,
    packed=True,
    new_head="",
    experts="eager",
):
    """Returns a model in eval mode. Its safetensors files hold exactly its tensors: none is made up, none is left over.

    packed: whether it gets the attention of engine/packing.py, which the scripts' own passes use. Otherwise it gets the
    fastest one that this machine has. new_head: the prefix of a head of one logit. Where the files have no such tensor,
    it is 0; they may have a language model's head, which is dropped. experts: how a mixture computes its experts.
    """
    flash = device.type == "cuda" and dtype != torch.float32 and transformers.utils.is_flash_attn_2_available()
    place = find_model(name, constant)
    check_generation_config(place, name, constant)
    try:
        model, info = auto_class.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            attn_implementation=packing.NAME if packed else "flash_attention_2" if flash else "sdpa",
            experts_implementation=experts,
            use_safetensors=True,
            trust_remote_code=trust,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
            **({"num_labels": 1} if new_head else {}),
        )
    except LOAD_ERRORS as error:
        raise not_loaded("model", name, constant, error) from None
    if new_head:
        for key in [key for key in info["missing_keys"] if str(key).startswith(new_head)]:
            torch.nn.init.zeros_(model.get_parameter(key))
            info["missing_keys"].remove(key)
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not str(key).startswith("lm_head.")}
    check_weights(info, auto_class, name, constant)
    return model.to(device).eval()


def check_generation_config(place, name, constant):
    """Raises InputError if a model's generation_config.json is broken: transformers would lose the EOS ids in it."""
    try:
        if (generation := Path(place) / "generation_config.json").is_file():
            json.loads(generation.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise not_loaded("generation_config.json", name, constant, error) from None


def check_weights(info, auto_class, name, constant):
    """Raises InputError if a model's files lack a tensor, or have one too many or of another shape.

    info: the output_loading_info of from_pretrained.
    """
    wrong = [f"{kind.replace('_', ' ')} {sorted(map(str, keys))[:3]}" for kind, keys in info.items() if keys]
    if wrong:
        head = any(str(key).startswith(("score.", "classifier.")) for keys in info.values() for key in keys)
        remedy = OTHER_KIND.get(auto_class, "save it anew") if head else "save it anew"
        raise InputError(f"{constant} = {name!r}: its weights do not fit its config: {'; '.join(wrong)}; {remedy}")


def load_tokenizer(name, constant, *, revision="main", trust=False):
    """Returns a tokenizer. Its pad token is the end-of-sequence token if it has none of its own."""
    place = find_model(name, constant)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except Exception as error:  # the tokenizers library raises a plain Exception about a bad file
        raise not_loaded("tokenizer", name, constant, error) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one if there are no files
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
    """Returns all ids that end a completion, sorted.

    The generation config of a chat model often has more of them than its tokenizer, which has one.
    """
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
    """Raises InputError if the scripts would sample from, and train, another model than the given one.

    The scripts pack sequences, and they apply the output head themselves, at completion positions only: a matrix and
    perhaps a bias. So a model that scales or caps its logits after the head is not supported, nor is one with another
    kind of attention. Every id of the tokenizer must have an embedding.
    """
    check_vocabulary(model, tokenizer, constant)
    ids, lengths, head = torch.arange(10).remainder(len(tokenizer)).view(2, 5), [5, 3], model.get_output_embeddings()
    try:
        # The first sequence stands in three parts, as the common start of prompts, a prompt and a completion do.
        parts = [ids[0, :1], ids[0, 1:3], ids[0, 3:], ids[1, :3]]
        packed_rows = packing.Packing(model, parts, [None, 0, 1, None])
        hidden = model.base_model(**packed_rows.inputs, use_cache=False).last_hidden_state[0]
        packed = torch.nn.functional.linear(hidden, head.weight, head.bias)
        model.set_attn_implementation("sdpa")
        alone = [model(row[None, :n].to(model.device)).logits[0] for row, n in zip(ids, lengths, strict=True)]
        model.set_attn_implementation(packing.NAME)
    except Exception:  # an unsupported model may raise anything
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

    Sampling and training put different sequences into one pass, so their rotations would differ. longest: the most
    tokens a sequence may have.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # there may be several
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


def without_dropout(model):
    """Returns the model with all dropout set to 0.

    Checkpointing works in training mode only, and dropout would make π another model there.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model
