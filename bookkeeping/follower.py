"""The run of a process other than process 0, which writes for all: it loads, steps and stops as process 0 does."""

import sys
import time
from pathlib import Path

from bookkeeping import checkpoints
from bookkeeping.folder import finite
from bookkeeping.resuming import fingerprints
from bookkeeping.saving import copies_of_sharded, copy_of, load_state, state_of
from bookkeeping.signals import Stopped, StopSignals
from configs import ALONE, InputError
from engine import processes
from engine.sharding import is_sharded


class Follower:
    """What Run is to a trainer, without a folder. Raises InputError if the run's checkpoint is not on this machine."""

    def __init__(self, trainer):
        self.constants, self.history = trainer.constants, trainer.metrics_history
        self.signals = StopSignals([trainer.optimizer, *(one.optimizer for one in trainer.beside.values())])
        self.trainer, self.done, self.unfinished = trainer, 0, {"step": 0}
        fingerprints(trainer)  # process 0 needs this process for those of sharded weights
        if checkpoint := processes.from_all("", "the start of the run")[0]:
            if not Path(checkpoint).is_dir():
                raise InputError(f"{checkpoint} is not on this machine; give an --output-dir that all machines share")
            self.done, state, metrics = checkpoints.load(Path(checkpoint), trainer.policy, trainer.adapter)
            self.unfinished = state["pending"]
            load_state(trainer, state)
            self.history += metrics
        self.gather(finals=True)  # process 0 tries to save

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, _):
        self.signals.__exit__()
        if kind is Stopped:
            self.gather()
            if is_sharded(self.trainer.policy):
                processes.from_all(None, "the checkpoint")  # process 0 writes it
            time.sleep(ALONE)  # torchrun ends all processes when the first one ends, and process 0 has to save
            sys.exit(128 + self.signals.received)
        if kind is not None:
            processes.Meetings.explain(error)
        else:
            processes.end()

    def gather(self, checkpoint=True, finals=False):
        """Takes part when process 0 gathers sharded weights, for a checkpoint and for final/."""
        if is_sharded(self.trainer.policy):
            if checkpoint:
                copy_of(self.trainer, state_of(self.trainer))
            if finals:
                copies_of_sharded(self.trainer)

    def steps(self):
        """Yields the numbers of the steps that are left, as Run.steps does."""
        if self.unfinished is not None:
            yield self.unfinished["step"]
        elif self.done >= self.constants.MAX_STEPS:
            self.gather(checkpoint=False, finals=True)
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
        last = step == self.constants.MAX_STEPS
        self.gather(self.constants.checkpoint_is_due(step), finals=last)
        if not last:
            self.signals.raise_if_received()
