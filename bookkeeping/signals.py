"""How a run is stopped in order: signals that wait until it can be left, and streams whose loss does not end it."""

import contextlib
import os
import signal
import sys
import threading

from tqdm import tqdm

# SIGHUP: the terminal has gone; SIGUSR1: Slurm's, some time before its limit
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal, at a place where the run can be left. No Exception, so that nothing handles it on the way."""


class StopSignals:
    """A context in which a signal raises Stopped if `interruptible`, and else waits for raise_if_received().

    received: the first signal, None without one. The second one ends the process at once.
    interruptible: whether the run can be left where it is. Each optimizer step sets it to False, because weights that
    have moved belong to a step that is not done.
    """

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.received = None
        self.interruptible = False
        self.handlers = {}  # as they were before

    def __enter__(self):
        self.hook = self.optimizer.register_step_pre_hook(self._before_update)
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        self.hook.remove()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def raise_if_received(self):
        """Raises Stopped if a signal has waited for this place."""
        if self.received:
            raise Stopped

    def _before_update(self, *_):
        self.interruptible = False

    def _on_signal(self, number, _):
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number)
        tqdm.write(f"{self.received.name}: stopping, with a checkpoint; once more stops at once, without")
        if self.interruptible:
            raise Stopped


class LossyStream:
    """A stream that loses its lines but does not raise: of a full disk, a terminal that has gone, a closed stream."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115, for as long as the stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # the second: closed, or a letter that it cannot show
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
