"""One run of a trainer, new or resumed: when it logs, saves and draws, and how it ends."""

import contextlib
import sys
import time
from typing import Protocol

import torch

import configs
import plotting
from bookkeeping import checkpoints, resuming, sample_page
from bookkeeping.boards import Boards, Profiler
from bookkeeping.folder import RunFolder, finite
from bookkeeping.follower import Follower, meet_at_start
from bookkeeping.progress import (
    Progress,
    print_summary,
    say_if_accuracy_fell,
    say_what_does_not_act,
    say_what_looks_wrong,
    warn_about_learning_rate,
)
from bookkeeping.saving import Saver, load_state, state_of
from bookkeeping.signals import Stopped, StopSignals, lossy_streams
from configs import InputError
from engine import processes
from engine.sharding import is_sharded
from inputs.libraries import quiet_libraries
from scoring.rules import Rewards

DRAW_EVERY = 30  # seconds
MOST_BAD_UPDATES = 8  # this many updates without a finite gradient, in consecutive steps, end a run


class Trainer(Protocol):
    """Everything that a run uses of a trainer. Prompts are rows as encode_prompts returns them."""

    # Its inputs
    constants: configs.Constants  # of configs.snapshot
    devices: dict[str, torch.device]  # {"POLICY_DEVICE": ..., ...}
    train_rows: list[dict]  # prompts to train on, for their fingerprint
    eval_rows: list[dict]  # held-out prompts, for their fingerprint and the summary
    rewards: Rewards  # training maximises it; the run sets its log
    eval_reward: Rewards  # evaluation counts it; the run sets its log

    # The model
    policy: torch.nn.Module  # saved, and loaded in place
    adapter: object  # peft's model around the policy, None without LoRA
    tokenizer: object  # saved beside the policy
    beside: dict  # further models that train, {"critic": a Critic}; saved in checkpoints and as final-critic/
    kept: tuple[str, ...]  # names of further attributes that checkpoints hold: tensors and plain values
    optimizer: torch.optim.Optimizer  # after its first step in a training step, a signal waits for the end

    # The results of steps
    metrics_history: list[dict]  # the rows of metrics.jsonl; the run fills it
    samples: list[dict]  # of the latest step, for samples.jsonl
    skipped: list[dict]  # completions of the latest step with a skipped update, for skipped.jsonl
    eval_texts: list[str]  # greedy completions of the latest evaluation, for the summary
    run: object  # None before train(), because a trainer trains once


class Run:
    """One run of a trainer, new or resumed, as a context around its steps. A script's train() shows the loop.

    Raises InputError if the folder cannot be written. folder: its path. unfinished: the metrics of a step that is
    trained, but not yet evaluated and logged, or None. If there are several processes, the first has a Run, and the
    others have a Follower in its place.
    """

    def __new__(cls, trainer):
        return super().__new__(cls) if processes.rank() == 0 else Follower(trainer)

    constants_to_resume = staticmethod(resuming.constants_of_run)  # for configs.apply_overrides

    @quiet_libraries()
    def __init__(self, trainer: Trainer):
        if trainer.run is not None:
            raise InputError("this trainer has trained already; make a new one, with RESUME set to go on with its run")
        self.trainer, self.constants = trainer, trainer.constants
        self.history = trainer.metrics_history
        self.seconds = dict.fromkeys(("start", "steps", "evaluation", "saving", "pictures"), 0.0)
        self.lapped = time.perf_counter()
        self.bad_updates = 0
        self.progress = None  # until the steps begin
        self.in_step = False  # True from a step's first sample to its last update, when no checkpoint can be taken
        configs.warn_about_constants(self.constants)
        warn_about_learning_rate(self.constants, trainer.policy)
        self.boards = Boards(self.constants)
        resumed = resuming.run_to_resume(self.constants) if self.constants.RESUME else None
        self.files = RunFolder(self.constants, resumed)
        self.folder = self.files.path
        self.signals = StopSignals([trainer.optimizer, *(one.optimizer for one in trainer.beside.values())])
        self.saver = Saver(trainer, self.folder)
        self.profiler = Profiler(self.constants.PROFILE, self.files)
        self.done = 0
        self.unfinished = {"step": 0}  # row 0 is not written yet
        self.texts_before = []
        made_from = resuming.fingerprints(trainer)
        checkpoint = None
        if resumed:
            resuming.check_fingerprints(self.files, self.constants, made_from)
            checkpoint = resuming.checkpoint_to_resume(self.folder)
        try:
            meet_at_start(self.constants, made_from, self.folder, checkpoint or "")
        except InputError:
            self.files.remove_if_new()
            raise
        if checkpoint:
            self._load(checkpoint)
        self._begin(checkpoint, made_from)
        self._warn_if_not_shared()
        self._try_to_save()
        trainer.rewards.log = trainer.eval_reward.log = self._log_failures
        self.boards.open(self.files, self.done + 1 if self.history else None)

    # -- Before the first step

    def _load(self, checkpoint):
        """Loads a checkpoint into the trainer and this run."""
        trainer = self.trainer
        self.done, state, metrics = checkpoints.load(checkpoint, trainer.policy, trainer.adapter)
        self.unfinished, self.texts_before = state["pending"], state["texts_before"]
        self.seconds |= state.get("seconds", {})  # older checkpoints have none
        trainer.samples = state["samples"]
        load_state(trainer, state)
        self.history += metrics

    def _begin(self, checkpoint, made_from):
        """Writes the run's constants into its folder. If the run is resumed, it also prints from which step."""
        devices = {name: str(device) for name, device in self.trainer.devices.items()}
        constants = configs.as_saved(self.constants.values() | devices)
        try:
            if self.files.is_new:
                self.files.begin(self.constants, constants, made_from)
                print(f"Run folder: {self.folder}")
            else:
                before = self.files.config()
                self.files.cut_logs(self.history, self.done, in_part=self.unfinished is not None)
                self.files.write("config.json", before | {"constants": constants})
                without = "" if checkpoint else ", because it has no checkpoint"
                resting = min(self.done, self.constants.resting_steps)
                rested = f"; the policy rested in steps 1 to {resting}" if resting else ""
                print(f"Resumed {self.folder} after step {self.done}{without}{rested}")
                steps_before = before["constants"].get("MAX_STEPS")
                resuming.say_what_the_rate_will_do(self.constants, steps_before, self.done, self.history)
        except OSError as error:
            self.files.remove_if_new()
            raise InputError(f"{self.folder}: cannot write there ({error}); free some space, or look why") from None

    def _warn_if_not_shared(self):
        """Warns if there are processes that do not see the run's folder."""
        seen = processes.from_all(True, "the run's folder")
        if not all(seen):
            without = ", ".join(str(number) for number, there in enumerate(seen) if not there)
            shared = "give an --output-dir that all machines share"
            print(f"Warning: {self.folder} is not there for process {without}, so the run cannot be resumed; {shared}")

    def _try_to_save(self):
        """Tries to save everything that later steps will save.

        If that fails, it raises InputError, and removes the folder of a new run.
        """
        try:
            self.saver.try_out()
        except BaseException as error:
            self.files.remove_if_new()
            if isinstance(error, OSError):
                raise InputError(f"{self.folder}: the model cannot be saved there ({error}); free some space") from None
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            problem = f"POLICY_MODEL = {self.constants.POLICY_MODEL!r} cannot be saved: {why}"
            raise InputError(f"{problem}; give another model, or with --lora-rank other --lora-targets") from None

    def __enter__(self):
        self.closing = contextlib.ExitStack()  # closes these, the last one first
        self.closing.callback(self.files.unlock)
        self.closing.enter_context(lossy_streams())
        self.closing.enter_context(quiet_libraries())
        self.closing.callback(self.boards.close)
        self.closing.callback(lambda: self.progress and self.progress.close())
        self.closing.enter_context(self.signals)
        self.closing.callback(self.saver.close)
        self.closing.callback(self.profiler.stop)
        return self

    # -- The steps

    def steps(self):
        """Yields the numbers of the steps that are left.

        The first is that of the evaluation before step 1, or of an evaluation that a stop cut off.
        """
        last = self.constants.MAX_STEPS
        self.progress = Progress(self.constants)
        self._lap("start")
        self.state, self.drawn = state_of(self.trainer), time.perf_counter()
        if self.unfinished is not None:
            yield self.unfinished["step"]
        elif self.done >= last:
            self.saver.final()  # the one there may be a shorter run's
            self._draw()
            print(f"The run is complete, its model is in {self.folder / 'final'}; --max-steps can make it longer")
        self.progress.move_to(self.done)
        for step in range(self.done + 1, last + 1):
            self.profiler.begin_step()
            self.in_step = self.signals.interruptible = True
            yield step

    def keep(self, step, metrics):
        """Marks a step as trained. From here on a stop keeps it, even if its evaluation is cut off."""
        self._lap("steps")
        self.in_step = self.signals.interruptible = False
        self.done, self.unfinished, self.state = step, metrics, state_of(self.trainer)
        self.signals.raise_if_received()
        self.signals.interruptible = True

    def evaluation_is_due(self, step):
        """Returns whether an evaluation follows a step."""
        return self.constants.evaluation_is_due(step)

    def finish_step(self, step, metrics):
        """Logs, saves and draws whatever is due. metrics: those of the step and of its evaluation."""
        self._lap("evaluation")
        self.signals.interruptible = False
        last = step == self.constants.MAX_STEPS
        self._log(step, metrics)
        self.unfinished = None
        self._check_updates(metrics)
        if self.constants.checkpoint_is_due(step):
            self.checkpoint()
        if last:
            self.saver.final()
        self._lap("saving")
        if step > 0:
            if "eval_accuracy" in metrics or time.perf_counter() - self.drawn > DRAW_EVERY:
                self._draw()
            if "eval_accuracy" in metrics:
                say_if_accuracy_fell(self.history, len(self.trainer.eval_rows), self.files)
            say_what_does_not_act(step, self.history, self.constants, self.files)
            say_what_looks_wrong(self.history, self.constants, self.files)
            self.progress.show(self.history)
        self._lap("pictures")
        if last:
            self.profiler.stop()
            self.progress.close()
            texts = self.texts_before, self.trainer.eval_texts
            print_summary(self.history, self.seconds, self.trainer.eval_rows, *texts, self.folder)
        else:
            self.signals.raise_if_received()

    def _lap(self, part):
        """Counts the time since the last lap for a part of the run, so that the parts add up to its wall time."""
        now = time.perf_counter()
        self.seconds[part] += now - self.lapped
        self.lapped = now

    def _log(self, step, metrics):
        """Writes a step's metrics and samples."""
        metrics |= finite(metrics)  # the same as in metrics.jsonl
        self.history.append(metrics)
        self.files.append("metrics.jsonl", [metrics])
        self.boards.log(metrics)
        if step == 0:
            self.texts_before = self.trainer.eval_texts[:3]
        else:
            self.files.append("samples.jsonl", self._with_groups(self.trainer.samples))

    def _log_failures(self, failures):
        where = {"step": self.done + self.in_step, "of": "rollout" if self.in_step else "evaluation"}
        self.files.append("reward_failures.jsonl", [where | failure for failure in failures])

    def _check_updates(self, metrics):
        """Ends the run if too many updates fail in consecutive steps."""
        if not (skipped := metrics.get("skipped_updates", 0)):
            self.bad_updates = 0
            return
        self.bad_updates += skipped
        self.files.append("skipped.jsonl", self._with_groups(self.trainer.skipped))
        if self.bad_updates >= MOST_BAD_UPDATES:
            raise InputError(
                f"{self.bad_updates} updates in steps that follow one another had no finite loss and gradient; their "
                f"completions are in {self.folder / 'skipped.jsonl'}; look there for what breaks, or start a new run "
                "with a lower --learning-rate"
            )

    def _with_groups(self, samples):
        """Returns samples with the number of their group in the step.

        Two groups may have the same prompt, so the prompt does not tell them apart.
        """
        return [{**sample, "group": i // self.constants.GROUP_SIZE} for i, sample in enumerate(samples)]

    def _draw(self):
        self.drawn = time.perf_counter()
        try:
            plotting.draw_run(self.folder)
            sample_page.draw_samples(self.folder)
        except (OSError, InputError) as error:
            self.files.complain("pictures", f"the pictures could not be drawn: {error}; training goes on")

    def checkpoint(self):
        """Saves the state after the last whole step, and returns where it will be.

        A thread writes it once it is copied, or while training waits if it is too large for that.
        """
        state = self.state | {"pending": self.unfinished, "texts_before": self.texts_before}
        state |= {"samples": self.trainer.samples if self.unfinished else [], "seconds": self.seconds}
        return self.saver.checkpoint(self.done, state, self.history)

    # -- The end

    def __exit__(self, kind, error, _):
        with self.closing:
            can_save = not self.in_step or self.signals.interruptible  # the weights are between two steps
            can_save &= kind is Stopped or not is_sharded(self.trainer.policy)  # which then takes all processes
            self.signals.interruptible = False
            if kind is Stopped or (kind and issubclass(kind, Exception)):
                self._end_early(kind, error, can_save)
            self.saver.wait()
        if kind is None:
            processes.end()

    def _end_early(self, kind, error, can_save):
        """Keeps what can be kept, and prints where it is.

        Raises SystemExit after a signal, and InputError if a person can do something about the error.
        """
        stopped, step = kind is Stopped, self.done + self.in_step
        try:
            processes.Meetings.explain(error)
        except InputError as explained:
            kind, error = InputError, explained
        if stopped:
            processes.tell("stopped", str(int(self.signals.received)))
        saved = can_save and self.checkpoint() and self.saver.wait()
        if self.signals.agreed:
            with contextlib.suppress(InputError):  # one has gone already
                processes.from_all(None, "the checkpoint")  # the others wait, because torchrun ends all with the first
        path = checkpoints.newest(self.folder)
        if self.history[1:]:
            self._draw()
        found = f"the newest checkpoint is {path}" if path else "there is no checkpoint"
        kept = f"the state after step {self.done} is in {path}" if saved else found
        kept += f"; go on with python {self.constants.algorithm}.py --resume {self.folder}"
        if issubclass(kind, torch.OutOfMemoryError):  # smaller parts were tried already
            remedy = "resume with more memory, or begin a new run with --lora-rank or --policy-dtype bfloat16"
            kind, error = InputError, f"out of memory ({' '.join(str(error).split())}); {remedy}"
        if kind is InputError:
            raise InputError(f"step {step}: {error}; {kept}") from None
        if self.progress:
            self.progress.close()
        print(f"Stopped by {self.signals.received.name if stopped else f'{kind.__name__} in step {step}'}: {kept}")
        if stopped:
            sys.exit(128 + self.signals.received)
