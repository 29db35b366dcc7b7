"""The run of a process other than process 0, which writes for all: it loads, steps and stops as process 0 does."""

import sys
import time
from pathlib import Path

from bookkeeping import checkpoints
from bookkeeping.folder import finite
from bookkeeping.saving import load_state
from bookkeeping.signals import Stopped, StopSignals
from configs import ALONE, InputError
from engine import processes


class Follower:
    """What Run is to a trainer, without a folder. Raises InputError if the run's checkpoint is not on this machine."""

    def __init__(self, trainer):
        self.constants, self.history = trainer.constants, trainer.metrics_history
        self.signals = StopSignals([trainer.optimizer, *(one.optimizer for one in trainer.beside.values())])
        self.done, self.unfinished = 0, {"step": 0}
        if checkpoint := processes.from_all("", "the start of the run")[0]:
            if not Path(checkpoint).is_dir():
                raise InputError(f"{checkpoint} is not on this machine; give an --output-dir that all machines share")
            self.done, state, metrics = checkpoints.load(Path(checkpoint), trainer.policy, trainer.adapter)
            self.unfinished = state["pending"]
            load_state(trainer, state)
            self.history += metrics

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, *_):
        self.signals.__exit__()
        if kind is Stopped:
            time.sleep(ALONE)  # torchrun ends all processes when the first one ends, and process 0 has to save
            sys.exit(128 + self.signals.received)
        if kind is None:
            processes.end()

    def steps(self):
        """Yields the numbers of the steps that are left, as Run.steps does."""
        if self.unfinished is not None:
            yield self.unfinished["step"]
        for step in range(self.done + 1, self.constants.MAX_STEPS + 1):
            self.signals.interruptible = True
            yield step

    def keep(self, step, metrics):
        """Marks a step as trained."""
        self.signals.interruptible = False
        self.signals.raise_if_received()
        self.signals.interruptible = True

    def evaluation_is_due(self, step):
        """Returns whether an evaluation follows a step."""
        return self.constants.evaluation_is_due(step)

    def finish_step(self, step, metrics):
        """Adds a step's metrics to the history."""
        self.signals.interruptible = False
        self.history.append(metrics | finite(metrics))
        self.unfinished = None
        if step < self.constants.MAX_STEPS:
            self.signals.raise_if_received()
