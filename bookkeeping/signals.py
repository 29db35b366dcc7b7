"""Stops a run in order: signals wait until it can be left, and a lost terminal does not end it."""

import contextlib
import os
import signal
import sys
import threading
import time

from tqdm import tqdm

import configs
from engine.processes import Meetings, from_all, rank, size

# SIGHUP comes when the terminal has gone. Slurm sends SIGUSR1 some time before its limit.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """Raised after a signal, at a place where the run can be left.

    It is no Exception, so that nothing handles it on the way.
    """


class StopSignals:
    """A context in which a signal raises Stopped, or waits for raise_if_received().

    received: the first signal, or None. A second signal ends the process at once.

    interruptible: whether the run can be left where it is, so that a signal need not wait. Each optimizer step sets it
    to False, because the weights have then moved in a step that is not done. An optimizer may step in a thread beside
    the main one. So a lock decides which comes first: the signal, or the step, which then does not happen.

    With several processes, a signal to any of them stops all in raise_if_received(), which all call. Process 0 can
    leave before, because it can save alone, unless models are sharded. The others miss it at their next meeting.
    """

    def __init__(self, optimizers):
        self.optimizers = optimizers
        self.together = size() > 1
        self.agreed = False  # whether all processes have left at the same place
        self.lock, self.left = threading.RLock(), False
        self.received = None
        self.interruptible = False
        self.handlers = {}  # the handlers from before this context

    def __enter__(self):
        self.hooks = [optimizer.register_step_pre_hook(self._before_update) for optimizer in self.optimizers]
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def raise_if_received(self):
        """Raises Stopped if a signal has waited for this place."""
        if self.together:
            sent = next((number for number in from_all(self.received, "the end of a step") if number), None)
            if sent is None:
                return  # one that came meanwhile is sent at the next meeting
            self.since = time.monotonic()
            self.received, self.agreed = sent, True
        if self.received:
            raise Stopped

    def _before_update(self, *_):
        with self.lock:
            if self.left:
                raise Stopped
            self.interruptible = False

    def _on_signal(self, number, _):
        now = time.monotonic()
        if self.received is not None and not (self.together and now < self.since + configs.ALONE):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self.received is not None:
            return  # Slurm and torchrun may both pass a signal on
        self.since = now  # first, because the next signal may come between the two
        self.received = signal.Signals(number)
        if rank() == 0:
            once_more = f"once more, after {configs.ALONE} seconds," if self.together else "once more"
            tqdm.write(f"{self.received.name}: stopping, with a checkpoint; {once_more} stops at once, without")
        with self.lock:
            if self.interruptible and rank() == 0 and not Meetings.in_step:
                self.left = True
                raise Stopped


class LossyStream:
    """A stream that loses its lines instead of raising an error.

    Errors come from a full disk, from a terminal that has gone, and from a closed stream.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, because it stays open

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed, or cannot show a character
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def lossy_streams():
    """A context in which stdout and stderr are LossyStreams."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LossyStream, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
