"""What libraries raise about a file, a name, a package or the network, and what a person can do about it."""

import textwrap

import huggingface_hub
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from configs import InputError, is_hub_id

# Anything else is a fault of ours, and shows itself. They raise a TypeError for a config of the wrong types.
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


def not_loaded(what, name, constant, error):
    """The InputError for what a library cannot load."""
    if "trust_remote_code" in str(error):
        remedy = "if you trust that code, --trust-remote-code runs it"
    elif isinstance(error, ImportError):
        remedy = "install that, or give another model"
    elif is_hub_id(name):
        remedy = hub_remedy("name, revision", "a folder", error)
    else:
        remedy = "save or download it again, with safetensors and tokenizer, or give another model"
    return InputError(f"{constant} = {name!r}: the {what} cannot be loaded: {short(error)}; {remedy}")
