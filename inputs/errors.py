"""Errors that libraries raise about a file, a name, a package or the network, and what a person can do about them."""

import textwrap

import huggingface_hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from configs import InputError, is_hub_id

# Any other error is a bug here, and is not caught. Libraries raise a TypeError if a config has values of wrong types.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    TypeError,
    SafetensorError,
    StrictDataclassError,
)


def short(error):
    """Returns the message of a library's error as one short line."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 400, placeholder=" ...").rstrip(".") or type(error).__name__


def hub_remedy(names, else_give, error):
    """Returns what a person can do if something cannot be had from the Hub or from its cache."""
    cache = huggingface_hub.constants.HF_HOME
    while error:
        if isinstance(error, OSError) and str(error.filename or "").startswith(cache):
            return f"the cache {cache} cannot be used: set HF_HOME to a folder that can be written and has room"
        error = error.__cause__ or error.__context__
    if huggingface_hub.constants.HF_HUB_OFFLINE:  # the library's own message blames the network
        return (
            f"check {names}, unset HF_HUB_OFFLINE to ask the network for what is not in the cache, or give {else_give}"
        )
    return f"check {names} and network, or give {else_give}"


def not_loaded(part, name, constant, error):
    """Returns the InputError for something that a library cannot load."""
    if "trust_remote_code" in str(error):
        remedy = "if you trust that code, --trust-remote-code runs it"
    elif isinstance(error, ImportError):
        remedy = "install that, or give another model"
    elif is_hub_id(name):
        remedy = hub_remedy("name, revision", "a folder", error)
    else:
        remedy = "save or download it again, with safetensors and tokenizer, or give another model"
    return InputError(f"{constant} = {name!r}: the {part} cannot be loaded: {short(error)}; {remedy}")
