"""Keeps the libraries that load models and data from printing."""

import contextlib
import logging

import transformers

LEVELS = {"transformers": logging.ERROR, "huggingface_hub": logging.ERROR, "datasets": logging.CRITICAL}


@contextlib.contextmanager
def quiet_libraries():
    """A context, or a decorator, in which the libraries show no progress bars and log only errors.

    They log retries and weights that do not fit, for example. The consequences are checked and reported here.
    `datasets` logs nothing at all, because it logs the errors that it also raises.
    """
    loggers = {name: logging.getLogger(name) for name in LEVELS}
    before = {name: logger.level for name, logger in loggers.items()}
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    for name, logger in loggers.items():
        logger.setLevel(LEVELS[name])
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
        if bars:
            transformers.logging.enable_progress_bar()
