"""Several processes, as torchrun starts them: what each one does of the work, and what they add up and exchange.

All of them hold a step's whole batch. They share the work on it: each samples for some prompts, scores some completions
and passes some through the models, and gets the others' results. So means, splits and metrics are those of one process.
With one process, that process does all of the work.
"""

import contextlib
import datetime
import os
import sys
import time

import torch
from torch import distributed as dist

from configs import InputError
from engine.rollouts import Rollouts

AT_ONCE = 2**26  # numbers in a message, a quarter of a GB
PATIENCE = datetime.timedelta(minutes=20)  # how long the others wait for a process
TOGETHER = datetime.timedelta(minutes=2)  # how long they wait for its first word, before anything is loaded


class Meetings:
    """The places at which all processes wait for each other. They tell each other how far they are."""

    places = None  # torch.distributed's store, and the number of this process and of all, once they are known
    store = None  # the same store, once several processes have met
    count = 0  # of this process
    ended = 0  # runs of this process that have
    in_step = False  # whether each pass through a model is one, because its weights are sharded
    mesh = None  # of the sharded weights

    @classmethod
    def hold(cls, what, work):
        """Runs work(), in which this process waits for the others. what: what they do there, for the message.

        Raises InputError, naming the processes that are missing, if one has ended or does not come in time.
        """
        cls.count += 1
        try:
            cls.store.set(f"process {rank()}", f"{cls.count} {what}")
            return work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(f"{cls.missing(what)} ({' '.join(str(error).split())[:120]})") from None

    @classmethod
    def explain(cls, error):
        """Raises InputError, naming the processes that have gone, if an error comes from a message to them."""
        if isinstance(error, dist.DistError) or cls.in_step and "gloo" in str(error):
            cls.count += 1
            with contextlib.suppress(RuntimeError):  # the store may have gone, too
                cls.store.set(f"process {rank()}", f"{cls.count} a pass")
            time.sleep(2)  # the others do the same
            raise InputError(f"{cls.missing('a pass')} ({' '.join(str(error).split())[:120]})") from None

    @classmethod
    def missing(cls, what):
        """Returns who is behind this process, and at what."""
        behind = []
        for other in range(size()):
            try:
                known = cls.store.check([f"process {other}"])  # get would wait for it
                count, where = cls.store.get(f"process {other}").decode().split(" ", 1) if known else ("0", "its start")
            except RuntimeError:  # the store has gone, with the process that held it
                return f"the other processes cannot be reached, for {what}"
            if int(count) < cls.count:
                behind.append(f"process {other} did not come to {what}, and was last seen at {where}")
        return "; ".join(behind) or f"another process ended or was cut off, at {what}"


def find():
    """Returns torch.distributed's store, the number of this process, and how many there are. They need not have met."""
    if Meetings.places is None:
        Meetings.places = next(dist.rendezvous("env://", timeout=PATIENCE))
    return Meetings.places


def from_first(what, decide):
    """Returns the text that process 0 decides on, in each process. decide: a function, which process 0 calls."""
    if not several():
        return decide()
    if os.environ["RANK"] == "0":
        tell(what, text := decide())
        return text
    with contextlib.suppress(RuntimeError):
        find()[0].wait([_key(what)], TOGETHER)
    if not (text := told(what)):
        raise InputError(f"process 0 has not told {what}; start all processes with the same flags")
    return text


def tell(what, text):
    """Lets the other processes know a text, without waiting for them."""
    with contextlib.suppress(RuntimeError):  # the store is gone with the process that held it
        if several():
            find()[0].set(_key(what), text)


def told(what):
    """Returns the text that a process has told, or "" if none has, or if none can be reached."""
    with contextlib.suppress(RuntimeError):
        if several() and find()[0].check([_key(what)]):
            return find()[0].get(_key(what)).decode()
    return ""


def _key(what):
    return f"{what}, of run {Meetings.ended + 1}"  # torchrun's store outlives a run


def start(device):
    """Meets the other processes, if torchrun has started several and they have not met. device: this one's, first."""
    if several() and Meetings.store is None:
        Meetings.store, number, count = find()
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=Meetings.store, rank=number, world_size=count, timeout=PATIENCE)


def end():
    """Parts from the other processes, once all are done."""
    if Meetings.store is not None:
        from_all(None, "the end")
        if "vllm" not in sys.modules:  # it ends them when the process does, and needs them until then
            dist.destroy_process_group()
        Meetings.store = Meetings.places = Meetings.mesh = None
        Meetings.in_step = False
        Meetings.ended += 1


def several():
    """Returns whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes_on(device):
    """Returns how many processes share a device: those of a machine its CPU, while each has a GPU of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def size():
    """Returns the number of processes that have met."""
    return dist.get_world_size() if Meetings.store is not None else 1


def rank():
    """Returns the number of this process, from 0. Process 0 writes the run's folder."""
    return dist.get_rank() if Meetings.store is not None else 0


def own(things):
    """Returns this process's share of a list, in one piece."""
    return things[len(things) * rank() // size() : len(things) * (rank() + 1) // size()]


def own_rows(tokens, numbers):
    """Returns the rows of this process, ascending, so that all have about as many tokens.

    tokens: of each row, a list. numbers: that of each row's prompt, whose rows stay together.
    """
    if size() == 1:
        return list(range(len(tokens)))
    sums = {}
    for number, count in zip(numbers, tokens, strict=True):
        sums[number] = sums.get(number, 0) + count
    loads, owner = [0] * size(), {}
    for number in sorted(sums, key=lambda number: (-sums[number], number)):
        owner[number] = loads.index(min(loads))
        loads[owner[number]] += sums[number]
    return [row for row, number in enumerate(numbers) if owner[number] == rank()]


def from_all(thing, what):
    """Returns what each process gives, as a list in their order. thing: anything on the CPU that pickle takes."""
    things = [thing] * size()
    if size() > 1:
        Meetings.hold(what, lambda: dist.all_gather_object(things, thing))
    return things


def sum_over_processes(tensor, what):
    """Replaces a tensor by its sum over all processes, and returns it."""
    if size() > 1:
        if tensor.is_cuda:
            from_all(None, what)  # a GPU's sum is only begun here, so who is missing must be found before
        Meetings.hold(what, lambda: dist.all_reduce(tensor))
    return tensor


def add_up(tensors, what):
    """Replaces tensors by their sums over all processes, in float32, about AT_ONCE numbers in a message."""
    if size() == 1:
        return
    parts, room = [[]], AT_ONCE
    for tensor in tensors:
        if parts[-1] and tensor.numel() > room:
            parts.append([])
            room = AT_ONCE
        parts[-1].append(tensor.detach())
        room -= tensor.numel()
    for part in parts:
        flat = sum_over_processes(torch.cat([tensor.float().flatten() for tensor in part]), what)
        for tensor, total in zip(part, flat.split([tensor.numel() for tensor in part]), strict=True):
            tensor.copy_(total.view_as(tensor))


def in_shares(sampler, rows, group_size, uniform, **settings):
    """Returns group_size completions of each row's prompt: Rollouts. Each process samples for some of the prompts."""
    with sampler.weights():
        mine, part = own(list(range(len(rows)))), None
        if mine:
            numbers = uniform if uniform is None else uniform[mine[0] * group_size : (mine[-1] + 1) * group_size]
            part = sampler([rows[number] for number in mine], group_size, numbers, **settings)
    if size() > 1:
        part = Rollouts.join([part for part in from_all(part, "sampling") if part is not None])
        part.prompts = [row for row in rows for _ in range(group_size)]  # the rows themselves, not copies of them
    sampler.add_experts(part)
    return part
