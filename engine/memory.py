"""Says how much memory has room for, continues with less if it runs out, and decides whether freed memory is kept."""

import contextlib
import ctypes
import math
from collections import Counter

import psutil
import torch

from configs import InputError
from engine import processes


class FitToMemory:
    """Does as much work at once as memory holds: fit_to_memory("updates", most, work) returns work(most).

    If memory runs out, it tries again with half as much, and starts there from then on. No computed number changes.
    Raises InputError if memory runs out with a single one.
    """

    def __init__(self):
        self.halvings = Counter()  # {purpose: halvings since the run began}

    def __call__(self, purpose, most, work):
        while True:
            size = max(1, most >> self.halvings[purpose])
            try:
                return work(size)
            except torch.OutOfMemoryError as error:
                if processes.Meetings.in_step and purpose != "sampling":
                    raise InputError(
                        f"out of memory in {purpose} ({error}); with SHARD a process cannot go on with less alone, so "
                        "resume with a lower --micro-batch-tokens"
                    ) from None
                if size == 1:
                    raise InputError(
                        f"out of memory in {purpose} with one completion at a time ({error}); use "
                        "--gradient-checkpointing, or begin a new run with a smaller model, --lora-rank or "
                        "a lower --max-completion-tokens"
                    ) from None
            self.halvings[purpose] += 1
            torch.cuda.empty_cache()


def completions_in_memory(model, wanted, tokens, width):
    """Returns how many completions there is memory for at once while a model samples: wanted, or a half, a quarter, ...

    tokens: of a prompt and its completion. They need room for their keys and values, of width bytes each, and for the
    logits of one token. Only halves are returned, so that the number stays the same while free memory varies a little.
    """
    config, device = model.config.get_text_config(), model.device
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_one = 2 * config.num_hidden_layers * heads * size * tokens * width
    of_one += 4 * config.vocab_size * 4  # logits, probabilities and their sums, in float32
    while wanted > 1 and wanted * of_one > 0.9 * free_memory(device):
        wanted = math.ceil(wanted / 2)
    return wanted


def free_memory(device):
    """Returns the bytes that are free on a device, those that torch has kept for itself among them.

    Processes of one machine share its memory.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available // processes.processes_on(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def set_up_process(device):
    """Meets the other processes, and changes settings of this one so that training on a device is faster.

    A script calls it when training begins.
    """
    processes.start(device)
    if device.type == "cuda":
        # cuDNN's attention makes a plan for each new shape, and most shapes here come once.
        torch.backends.cuda.enable_cudnn_sdp(False)
    keep_freed_memory()


def keep_freed_memory():
    """Tells glibc to keep freed blocks of up to 32 MB.

    The next pass needs such blocks again, and new pages take time. Larger blocks still go back to the system, because
    kept ones would become fragmented.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, -1)
