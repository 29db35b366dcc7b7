"""The run of a process other than process 0, which writes for all: it loads, steps and stops as process 0 does."""

import hashlib
import sys
import time
from pathlib import Path

import configs
from bookkeeping import checkpoints
from bookkeeping.folder import finite, sha256_of_rewards
from bookkeeping.resuming import MADE_FROM, fingerprints
from bookkeeping.saving import copies_of_sharded, copy_of, load_state, state_of
from bookkeeping.signals import Stopped, StopSignals
from configs import InputError, as_saved
from engine import processes
from engine.sharding import is_sharded

OWN = ("_DEVICE", "OUTPUT_DIR", "RESUME")  # ends of the constants that may differ between machines


def meet_at_start(constants, made_from, folder="", checkpoint=""):
    """Returns the folder of the run and the path of the checkpoint that it goes on from, or "", as process 0 has them.

    Raises InputError if a process has other constants, files, prompts or models than process 0. made_from: those of
    fingerprints().
    """
    script = hashlib.sha256(constants.text.encode()).hexdigest()
    content = made_from | {constants.path.name: script, "rewards.py": sha256_of_rewards()}
    own = {name: value for name, value in as_saved(constants.values()).items() if not name.endswith(OWN + MADE_FROM)}
    known = processes.from_all((own, content, (str(folder), str(checkpoint))), "the start of the run")
    own, content, places = known[0]
    for number, (others, other_content, _) in enumerate(known):
        differ = [f"{name} = {others.get(name)!r}, not {own[name]!r}" for name in own if others.get(name) != own[name]]
        differ += [f"another {name}" for name in content if other_content.get(name) != content[name]]
        if differ:
            has = f"process {number} has {', '.join(differ)}, unlike process 0"
            raise InputError(f"{has}; start all with the same files and flags")
    return places


class Follower:
    """What Run is to a trainer, without a folder. Raises InputError if the run's checkpoint is not on this machine."""

    def __init__(self, trainer):
        self.constants, self.history = trainer.constants, trainer.metrics_history
        self.signals = StopSignals([trainer.optimizer, *(one.optimizer for one in trainer.beside.values())])
        self.trainer, self.done, self.unfinished = trainer, 0, {"step": 0}
        folder, checkpoint = meet_at_start(self.constants, fingerprints(trainer))
        processes.from_all(Path(folder).is_dir(), "the run's folder")
        if checkpoint:
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
        try:
            if kind is Stopped:
                self.gather()
                processes.from_all(None, "the checkpoint")  # process 0 writes it
                time.sleep(configs.ALONE)  # torchrun ends all when the first one ends, and process 0 has more to do
                sys.exit(128 + self.signals.received)
        finally:
            self.signals.__exit__()
        left = self.signals.received or processes.told("stopped")  # process 0, which saves alone
        if kind is InputError and left:
            sys.exit(128 + int(left))
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
