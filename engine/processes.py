"""Several processes, as torchrun starts them: what each one does of the work, and what they add up and exchange.

All of them hold a step's whole batch. They share the work on it: each samples for some prompts, scores some completions
and passes some through the models, and gets the others' results. So means, splits and metrics are those of one process.
With one process each function gives back what it was given.
"""

import datetime
import os

import torch
from torch import distributed as dist

from configs import InputError
from engine.rollouts import Rollouts

PATIENCE = datetime.timedelta(minutes=20)  # how long the others wait for a process


class Meetings:
    """The places at which all processes wait for each other. They tell each other how far they are."""

    store = None  # of torch.distributed, once several processes have met
    count = 0  # of this process

    @classmethod
    def hold(cls, what, work):
        """Runs work(), in which this process waits for the others. what: what they do there, for the message.

        Raises InputError, naming the processes that are missing, if one has ended or does not come in time.
        """
        cls.count += 1
        cls.store.set(f"process {rank()}", f"{cls.count} {what}")
        try:
            return work()
        except RuntimeError as error:
            raise InputError(f"{cls.missing(what)} ({' '.join(str(error).split())[:120]})") from None

    @classmethod
    def missing(cls, what):
        """Returns who is behind this process, and at what."""
        behind = []
        for other in range(size()):
            try:
                count, where = cls.store.get(f"process {other}").decode().split(" ", 1)
            except RuntimeError:  # the store has gone, with the process that held it
                return f"the other processes cannot be reached, for {what}"
            if int(count) < cls.count:
                behind.append(f"process {other} did not come to {what}, and was last seen at {where}")
        return "; ".join(behind) or f"another process ended or was cut off, at {what}"


def start():
    """Meets the other processes, if torchrun has started several and they have not met."""
    if several() and not dist.is_initialized():
        Meetings.store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=Meetings.store, rank=number, world_size=count, timeout=PATIENCE)


def end():
    """Parts from the other processes, once all are done."""
    if dist.is_initialized():
        from_all(None, "the end")
        dist.destroy_process_group()


def several():
    """Returns whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def size():
    """Returns the number of processes that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Returns the number of this process, from 0. Process 0 writes the run's folder."""
    return dist.get_rank() if dist.is_initialized() else 0


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
    """Returns the sum of a tensor over all processes."""
    if size() > 1:
        tensor = tensor.clone()
        Meetings.hold(what, lambda: dist.all_reduce(tensor))
    return tensor


def add_up(tensors, what):
    """Replaces tensors by their sums over all processes, in float32 and in one message."""
    if size() > 1:
        flat = sum_over_processes(torch.cat([tensor.detach().float().flatten() for tensor in tensors]), what)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))


def in_shares(sampler, rows, group_size, uniform, **settings):
    """Returns group_size completions of each row's prompt: Rollouts. Each process samples for some of the prompts."""
    if size() == 1:
        return sampler(rows, group_size, uniform, **settings)
    mine = own(list(range(len(rows))))
    part = None
    if mine:
        numbers = uniform if uniform is None else uniform[mine[0] * group_size : (mine[-1] + 1) * group_size]
        part = sampler([rows[number] for number in mine], group_size, numbers, **settings)
    whole = Rollouts.join([part for part in from_all(part, "sampling") if part is not None])
    whole.prompts = [row for row in rows for _ in range(group_size)]  # the rows themselves, not copies of them
    return whole
