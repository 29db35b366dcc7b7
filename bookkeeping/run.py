"""A run: its folder, what is written there, and what keeps it: checkpoints, signals, resuming.

outputs/gspo-20260131-101500/
    gspo.py          a copy of the script
    rewards.py       a copy of the rules
    config.json      resolved constants, fingerprints of prompts and models, command, git commit, versions, hardware
    metrics.jsonl    one object per training step; step 0 holds the evaluation before training
    metrics.png      the 4x2 figure, redrawn while training runs
    samples.jsonl    prompts, completions, rewards, advantages, answers
    samples.html     the same to look at, by sample_page.py
    checkpoints/step-N/    the whole state after step N, see checkpoints.py
    final/           the trained model, in Hugging Face layout
"""

import contextlib
import fcntl
import hashlib
import json
import math
import operator
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import configs
import plotting
from bookkeeping import checkpoints, sample_page
from bookkeeping.metrics import idle_clip
from bookkeeping.policy_files import policy_weights, save_merged, save_policy
from configs import InputError

DRAW_EVERY = 30  # seconds
IDLE_STEPS = 10  # steps after which a clip that never acted, or groups without a signal, are worth a warning
MOST_BAD_UPDATES = 8  # optimizer steps without a finite gradient, in steps one after the other, that end a run


class Stopped(BaseException):
    """A signal, at a place where the run can be left. No Exception, so that nothing handles it on the way."""


class Patient:
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


class Run:
    """One run of a trainer, new or resumed; a context around its steps. Raises InputError if it cannot be written.

        with Run(trainer) as run:
            for step in run.steps():
                metrics = run.unfinished or trainer.train_step(step)
                run.keep(step, metrics)
                if run.evaluation_is_due(step):
                    metrics |= trainer.evaluate()
                run.finish_step(step, metrics)

    Metrics also go to TensorBoard, if TENSORBOARD is set and the package is there, and to Weights & Biases, if
    WANDB_PROJECT names a project.
    """

    def __init__(self, trainer):
        if trainer.run is not None:
            raise InputError("this trainer has trained already; make a new one, with RESUME set to go on with its run")
        self.trainer, self.constants, self.algorithm = trainer, trainer.constants, trainer.constants.algorithm
        self.tensorboard = self.wandb_run = self.signal = self.saving = self.profiler = None
        self.steps_begun = 0
        self.interruptible = False  # whether a signal may end the step at once: not after its first update
        self.hook = trainer.optimizer.register_step_pre_hook(self._on_update)
        self.writer = ThreadPoolExecutor(1)  # of checkpoints
        self.complaints, self.unwritten, self.bad_updates = set(), {}, 0
        self.history = trainer.metrics_history
        self.in_step = False  # between a step's first sample and its last update, where no checkpoint can be taken
        configs.warn_about_constants(self.constants)
        self.wandb = _wandb() if self.constants.WANDB_PROJECT else None
        resumed = configs.run_to_resume(self.constants) if self.constants.RESUME else None
        self.folder = resumed or self._new_folder()
        self._lock()
        self.done, self.unfinished, self.texts_before = 0, {"step": 0}, []  # nothing is done, and row 0 is not written
        made_from = fingerprints(trainer)
        if resumed:
            self._check_inputs(made_from)
        path = checkpoints.newest(self.folder) if resumed else None
        if resumed and path is None and any(self.folder.glob("checkpoints/step-*[0-9]")):
            remedy = "copy one back, or remove them all to begin the run again"
            raise InputError(f"{self.folder}: none of its checkpoints is as it was written; {remedy}")
        if path is not None:
            self.done, state, metrics = checkpoints.load(path, trainer.policy, trainer.adapter)
            self.unfinished, self.texts_before = state["pending"], state["texts_before"]
            trainer.samples = state["samples"]
            trainer.load_state(state["trainer"])
            self.history += metrics
        self._begin(resumed, path, made_from)
        self._try_to_save(resumed)
        self.before = next((row for row in self.history if "eval_accuracy" in row), None)
        self.after = next((row for row in reversed(self.history) if "eval_accuracy" in row), None)
        trainer.rewards.log = trainer.eval_reward.log = self._log_failures
        self._open_boards()

    # -- The folder

    def _new_folder(self):
        parent, name = Path(self.constants.OUTPUT_DIR), f"{self.algorithm}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            for number in range(1, 1000):  # two runs may start in the same second
                folder = parent / (name if number == 1 else f"{name}-{number}")
                try:
                    folder.mkdir(parents=True)
                    return folder
                except FileExistsError:
                    if not parent.is_dir():
                        raise
        except OSError as error:
            raise InputError(f"OUTPUT_DIR = {str(parent)!r}: cannot write there ({error}); give another") from None

    def _lock(self):
        """Keeps a second process out of the folder; a crash releases it."""
        try:
            self.lock = open(self.folder / "lock", "w")  # noqa: SIM115, for as long as the run
        except OSError as error:
            raise InputError(f"{self.folder}: cannot write there ({error}); make it writable") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is writing this run; wait for it, or stop it") from None
        except OSError as error:
            nothing = f"this file system has no locks ({error}), so nothing keeps a second process from writing the run"
            self._complain("lock", f"{self.folder}: {nothing}")

    def _begin(self, resumed, path, made_from):
        """Has the folder say what the run is made of; if it is resumed, from when on, too."""
        script, devices = (
            self.constants.path,
            dict(zip(configs.DEVICES, map(str, self.trainer.devices), strict=True)),
        )
        constants = configs.as_saved(self.constants.values() | devices)
        try:
            if resumed:
                before = self._config()
                self.id = before.get("id", self.folder.name)  # older runs have no other
                self._cut_logs()
                self._write("config.json", before | {"constants": constants})
                print(f"Resumed {self.folder} after step {self.done}" + ("" if path else ", for it has no checkpoint"))
                self._say_what_the_rate_will_do(before["constants"].get("MAX_STEPS"))
            else:
                self.id = f"{self.folder.name}-{secrets.token_hex(4)}"  # runs of other folders may have the same name
                about = {"id": self.id, "constants": constants, "fingerprints": made_from}
                (self.folder / script.name).write_text(self.constants.text, encoding="utf-8")
                shutil.copy(configs.HERE / "rewards.py", self.folder)
                for name in (script.name, "rewards.py"):
                    checkpoints.sync(self.folder / name)
                self._write("config.json", about | describe_machine(script.resolve().parent))
                checkpoints.sync(self.folder)
                print(f"Run folder: {self.folder}")
        except OSError as error:
            self._leave_nothing(resumed)
            raise InputError(f"{self.folder}: cannot write there ({error}); free some space, or look why") from None

    def _leave_nothing(self, resumed):
        """Removes the folder of a run that has not begun."""
        if not resumed:
            self.lock.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _say_what_the_rate_will_do(self, steps_before):
        """A schedule that falls to zero over MAX_STEPS is another one if MAX_STEPS is."""
        steps, schedule = self.constants.MAX_STEPS, self.constants.LR_SCHEDULE
        if schedule != "constant" and steps_before not in (None, steps) and 0 < self.done < steps and self.history[1:]:
            last, then = self.history[-1]["learning_rate"], self.trainer.learning_rate_at(self.done + 1)
            print(
                f"MAX_STEPS is {steps} now and was {steps_before}, and LR_SCHEDULE = {schedule!r} falls over them: "
                f"the learning rate goes from {last:.2g} in step {self.done} to {then:.2g} in step {self.done + 1}"
            )

    def _try_to_save(self, resumed):
        """Writes what a checkpoint and final/ will hold, reads the checkpoint again, and removes both.

        What fails here would have failed after all steps. Raises InputError, and leaves no folder of a new run.
        """
        trial, trainer = self.folder / "trial", self.trainer
        try:
            state = {"trainer": trainer.state()}
            weights = policy_weights(trainer.policy, trainer.adapter)
            checkpoints.write_folder(trial / "checkpoint", *self._writers_of_checkpoint(weights, 0, state, []))
            checkpoints.load(trial / "checkpoint", trainer.policy, trainer.adapter)
            if trainer.adapter is not None:  # else the same weights in the same way
                checkpoints.write_folder(trial / "final", *self._writers_of_final())
        except BaseException as error:
            self._leave_nothing(resumed)
            if isinstance(error, OSError):
                raise InputError(f"{self.folder}: the model cannot be saved there ({error}); free some space") from None
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            what = f"POLICY_MODEL = {self.constants.POLICY_MODEL!r} cannot be saved: {why}"  # whatever a library raises
            raise InputError(f"{what}; give another model, or with --lora-rank other --lora-targets") from None
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def _config(self):
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def _check_inputs(self, found):
        """Raises InputError where prompts or models are others than those that the run began with."""
        expected = self._config().get("fingerprints", found)  # older runs have others, of another kind
        changed = [f"{name} = {getattr(self.constants, name)!r}" for name in found if found[name] != expected.get(name)]
        if changed:
            raise InputError(
                f"{self.folder} began with other content of {', '.join(changed)}; put back what was there, or begin a "
                "new run"
            )

    def _cut_logs(self):
        """Has the logs hold what the run had written by the checkpoint, whatever came later or was half written."""
        last = self.done - (self.unfinished is not None)
        self._write("metrics.jsonl", *self.history)
        for name in ("samples.jsonl", "reward_failures.jsonl", "skipped.jsonl"):
            if (self.folder / name).is_file():
                rows = _rows(self.folder / name)
                of_step = [row for row in rows if row["step"] == self.done > last and row.get("of") == "rollout"]
                self._write(name, *(row for row in rows if row["step"] <= last), *of_step)

    def _write(self, name, *rows):
        """A file of the folder, whole or not at all: JSON lines, or one JSON document."""
        indent = None if name.endswith("l") else 2
        beside = self.folder / f"{name}.part"
        beside.write_text("".join(_json(row, indent) + "\n" for row in rows), encoding="utf-8")
        checkpoints.sync(beside)
        os.replace(beside, self.folder / name)

    def _append(self, name, rows):
        """Adds JSON lines to a file of the folder; where the disk refuses, with the next ones."""
        rows = self.unwritten.pop(name, []) + rows
        path, size = self.folder / name, None
        try:
            with open(path, "a", encoding="utf-8") as file:
                size = file.tell()
                file.write("".join(_json(row) + "\n" for row in rows))
            self.complaints.discard(name)
        except OSError as error:
            self.unwritten[name] = rows
            if size is not None:
                os.truncate(path, size)  # no half line
            self._complain(name, f"{path} could not be written: {error}; training goes on, its lines follow later")

    def _complain(self, topic, message):
        """Says what went wrong without ending the run; once, until it goes well again."""
        if topic not in self.complaints:
            tqdm.write(f"Warning: {message}")
            self.complaints.add(topic)

    def _log_failures(self, failures):
        where = {"step": self.done + self.in_step, "of": "rollout" if self.in_step else "evaluation"}
        self._append("reward_failures.jsonl", [where | failure for failure in failures])

    # -- The steps

    def __enter__(self):
        self.handlers, self.streams = {}, (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = map(Patient, self.streams)
        if threading.current_thread() is threading.main_thread():
            # SIGHUP: its terminal has gone; SIGUSR1: Slurm's, some time before its limit
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                    self.handlers[number] = signal.signal(number, self._on_signal)
        return self

    def _on_update(self, *_):
        """Before each optimizer step: from the first one on a signal waits for the end of the training step."""
        self.interruptible = False

    def _on_signal(self, number, _):
        if self.signal is not None:  # the second one: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)
        tqdm.write(f"{self.signal.name}: stopping, with a checkpoint; once more stops at once, without")
        if self.interruptible:
            raise Stopped

    def steps(self):
        """The numbers of the steps that are left. First, the evaluation before step 1, or one that a stop cut off."""
        constants = self.constants
        hidden = not sys.stderr.isatty()  # a file or a batch system's log gets a line per step instead
        total = constants.MAX_STEPS
        self.bar = tqdm(total=total, desc=self.algorithm, unit="step", dynamic_ncols=True, disable=hidden)
        self.state, self.drawn = self.trainer.state(), time.perf_counter()
        if self.unfinished is not None:
            yield self.unfinished["step"]
        elif self.done >= constants.MAX_STEPS:
            self._save_final()  # anew: what lies there may be that of a shorter run
            self._draw()
            print(f"The run is complete, its model is in {self.folder / 'final'}; --max-steps can make it longer")
        self.bar.update(self.done - self.bar.n)
        for step in range(self.done + 1, constants.MAX_STEPS + 1):
            self._profile(step)
            self.in_step = self.interruptible = True
            yield step

    def _profile(self, step):
        """With PROFILE, traces the second to fourth step of this process, or as many as there are."""
        self.steps_begun += 1
        if not self.constants.PROFILE:
            return
        if self.steps_begun == 2:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.steps_begun == 5:
            self._end_profile()

    def _end_profile(self):
        if self.profiler:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.folder / "profile.json.gz"))
            time_of = operator.attrgetter(f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total")
            operations = sorted(self.profiler.key_averages(), key=time_of, reverse=True)
            total = sum(map(time_of, operations))
            shares = ", ".join(f"{operation.key} {time_of(operation) / total:.0%}" for operation in operations[:8])
            print(f"Profile: {self.folder / 'profile.json.gz'}, for chrome://tracing or ui.perfetto.dev; {shares}")
            self.profiler = None

    def keep(self, step, metrics):
        """Marks a step as trained: a stop from here on keeps it, even if it cuts the step's evaluation off."""
        self.in_step = self.interruptible = False
        self.done, self.unfinished, self.state = step, metrics, self.trainer.state()
        if self.signal:
            raise Stopped
        self.interruptible = True

    def evaluation_is_due(self, step):
        every = self.constants.EVAL_EVERY
        return step in (0, self.constants.MAX_STEPS) or (every > 0 and step % every == 0)

    def finish_step(self, step, metrics):
        """Logs, saves and draws, as far as it is due. metrics: of the step and of its evaluation."""
        self.interruptible = False
        constants, last = self.constants, step == self.constants.MAX_STEPS
        evaluating = "eval_accuracy" in metrics
        if evaluating:
            self.after, texts = metrics, self.trainer.eval_texts
            if step == 0:
                self.before, self.texts_before = metrics, texts[:3]
        self._log(metrics)
        if step > 0:
            self._append("samples.jsonl", self._with_groups(self.trainer.samples))
        self.unfinished = None
        self._check_updates(metrics)
        if step > 0 and constants.SAVE_EVERY > 0 and (last or step % constants.SAVE_EVERY == 0):
            self.checkpoint()
        if last:
            self._save_final()
        if step > 0 and (evaluating or time.perf_counter() - self.drawn > DRAW_EVERY):
            self._draw()
        if step > 0:
            self._say_what_does_not_act(step)
            self._show(metrics)
        if last:
            self._end_profile()
            self._print_summary(self.trainer.eval_texts)
        elif self.signal:
            raise Stopped

    def _say_what_does_not_act(self, step):
        """Warns of rewards that teach nothing, and of a clip that is too wide to act."""
        latest = [row.get("dead_groups") for row in self.history[1:]][-IDLE_STEPS:]
        if latest[-1] != 1:
            self.complaints.discard("signal")
        if latest == [1] * IDLE_STEPS:
            self._complain(
                "signal",
                f"in {IDLE_STEPS} steps no group had a signal: all completions of each got the same reward, so that "
                "there is nothing to prefer; look at samples.html, and change --rewards, the prompts or --temperature",
            )
        elif step == IDLE_STEPS and (ratios := idle_clip(self.history)):
            tqdm.write(
                f"Warning: in {step} steps the ratio stayed in [{ratios[0]:.6f}, {ratios[1]:.6f}] and the clip never "
                f"acted; lower CLIP_LOW = {self.constants.CLIP_LOW:g} and CLIP_HIGH = {self.constants.CLIP_HIGH:g}"
            )

    def _log(self, metrics):
        metrics |= _finite(metrics)  # as metrics.jsonl has them
        self.history.append(metrics)
        self._append("metrics.jsonl", [metrics])
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        try:
            if self.tensorboard:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, metrics["step"])
                self.tensorboard.flush()
        except Exception as error:
            self._complain("tensorboard", f"TensorBoard's events could not be written: {error}; training goes on")
        try:
            if self.wandb_run:
                self.wandb_run.log(numbers, step=metrics["step"])
        except Exception as error:
            self._complain("wandb", f"Weights & Biases did not take the metrics: {error}; training goes on")

    def _show(self, metrics):
        numbers = (
            f"reward {metrics['reward']:.2f}, accuracy {self.after['eval_accuracy']:.2f}, "
            f"KL {metrics['kl_divergence'] or 0:.3f}, clipped {metrics['clip_fraction'] or 0:.0%}, "
            f"{metrics['tokens_per_second']:.0f} tokens/s"
        )
        self.bar.update(metrics["step"] - self.bar.n)
        self.bar.set_postfix_str(numbers)
        if self.bar.disable:
            print(f"{self.algorithm} step {metrics['step']}/{self.constants.MAX_STEPS}: {numbers}", flush=True)

    def _check_updates(self, metrics):
        """Ends the run where updates fail one after the other, and says what to look at."""
        if not (skipped := metrics.get("skipped_updates", 0)):
            self.bad_updates = 0
            return
        self.bad_updates += skipped
        self._append("skipped.jsonl", self._with_groups(self.trainer.skipped))
        if self.bad_updates >= MOST_BAD_UPDATES:
            raise InputError(
                f"{self.bad_updates} updates in steps that follow one another had no finite loss and gradient; their "
                f"completions are in {self.folder / 'skipped.jsonl'}; look there for what breaks, or start a new run "
                "with a lower --learning-rate"
            )

    def _with_groups(self, samples):
        """Samples, each with the number of its group in the step: two groups may have the same prompt."""
        return [{**sample, "group": i // self.constants.GROUP_SIZE} for i, sample in enumerate(samples)]

    def _draw(self):
        self.drawn = time.perf_counter()
        try:
            plotting.draw_run(self.folder)
            sample_page.draw_samples(self.folder)
        except (OSError, InputError) as error:
            self._complain("pictures", f"the pictures could not be drawn: {error}; training goes on")

    # -- Checkpoints

    def checkpoint(self):
        """Saves the state after the last whole step, in a thread once it is copied; returns where it will be."""
        self._finish_saving()
        trainer, step, history = self.trainer, self.done, list(self.history)
        state = {"trainer": self.state, "pending": self.unfinished, "texts_before": self.texts_before}
        state["samples"] = trainer.samples if self.unfinished else []
        weights = policy_weights(trainer.policy, trainer.adapter)
        state, weights = checkpoints.copy_to_cpu(state), checkpoints.copy_to_cpu(weights)
        best = history[-1].get("eval_accuracy") if history and history[-1]["step"] == step else None
        target = self.folder / "checkpoints" / f"step-{step}"

        def write():
            checkpoints.write_folder(target, *self._writers_of_checkpoint(weights, step, state, history, best))
            checkpoints.prune(self.folder, self.constants.KEEP_CHECKPOINTS)

        self.saving = self.writer.submit(write)
        return target

    def _writers_of_checkpoint(self, weights, step, state, history, best=None):
        trainer = self.trainer
        return (
            lambda folder: save_policy(folder, trainer.policy, trainer.adapter, weights),
            trainer.tokenizer.save_pretrained,
            lambda folder: checkpoints.write_state(folder, step, state, history, best),
        )

    def _writers_of_final(self):
        trainer = self.trainer
        merge = self.constants.MERGE_LORA and trainer.adapter is not None
        save = save_merged if merge else save_policy
        return lambda folder: save(folder, trainer.policy, trainer.adapter), trainer.tokenizer.save_pretrained

    def _finish_saving(self):
        """Waits for the checkpoint that is being written, and says so if it could not be. Returns whether it could."""
        saving, self.saving = self.saving, None
        try:
            if saving:
                saving.result()
            return True
        except checkpoints.WRITE_ERRORS as error:
            print(f"Warning: a checkpoint could not be written: {error}; the one before it is intact, training goes on")
            return False

    def _save_final(self):
        self._finish_saving()
        try:
            checkpoints.write_folder(self.folder / "final", *self._writers_of_final())
        except checkpoints.WRITE_ERRORS as error:
            raise InputError(f"{self.folder / 'final'} could not be written ({error}); free some space") from None

    # -- The end

    def __exit__(self, kind, error, _):
        stopped, step = kind is Stopped, self.done + self.in_step
        can_save = not self.in_step or self.interruptible  # the weights are those between two steps
        self.interruptible = False
        try:
            if stopped or (kind and issubclass(kind, Exception)):
                saved = can_save and self._finish_saving() and self.checkpoint() and self._finish_saving()
                path = checkpoints.newest(self.folder)
                if self.history[1:]:
                    self._draw()
                found = f"the newest checkpoint is {path}" if path else "there is no checkpoint"
                kept = f"the state after step {self.done} is in {path}" if saved else found
                kept += f"; go on with python {self.algorithm}.py --resume {self.folder}"
                if issubclass(kind, torch.OutOfMemoryError):  # where no smaller part of the work would help
                    remedy = "resume with more memory, or begin a new run with --lora-rank or --policy-dtype bfloat16"
                    kind, error = InputError, f"out of memory ({' '.join(str(error).split())}); {remedy}"
                if kind is InputError:
                    raise InputError(f"step {step}: {error}; {kept}") from None
                self.bar.close()
                print(f"Stopped by {self.signal.name if stopped else f'{kind.__name__} in step {step}'}: {kept}")
                if stopped:
                    sys.exit(128 + self.signal)
            self._finish_saving()
        finally:
            self._end_profile()
            self._close()

    def _close(self):
        self.writer.shutdown()
        self.hook.remove()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if getattr(self, "bar", None):
            self.bar.close()
        with contextlib.suppress(Exception):  # which end_of_step has complained of
            if self.tensorboard:
                self.tensorboard.close()
        with contextlib.suppress(Exception):
            if self.wandb_run:
                self.wandb_run.finish()  # or the next run of this process would go on with it
        sys.stdout, sys.stderr = self.streams
        self.lock.close()

    def _open_boards(self):
        try:
            if self.constants.TENSORBOARD and find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.folder, purge_step=self.done + 1 if self.history else None)
        except Exception as error:
            self._complain("tensorboard", f"TensorBoard's events cannot be written: {error}; training goes on without")
        try:
            if self.wandb:
                self.wandb_run = self.wandb.init(
                    project=self.constants.WANDB_PROJECT,
                    id=self.id,
                    name=self.folder.name,
                    resume="allow",
                    dir=self.folder,
                    config=configs.as_saved(self.constants.values()),
                )
        except Exception as error:  # no key, no network, a server that refuses
            remedy = "training goes on without; its lines are in metrics.jsonl; WANDB_MODE=offline logs to a file"
            self._complain("wandb", f"Weights & Biases cannot be logged to: {error}; {remedy}")

    def _print_summary(self, texts_after):
        """Held-out accuracy and the first completions before and after training, and where to find what was made."""
        self.bar.close()
        for name, how in (("eval_accuracy", "sampled"), ("eval_accuracy_greedy", "greedy")):
            print(f"Held-out accuracy, {how}: {self.before[name]:.3f} before, {self.after[name]:.3f} after")
        for row, old, new in zip(self.trainer.eval_rows, self.texts_before, texts_after, strict=False):
            prompt, answer = _brief(row["prompt"]), _brief(row["answer"])
            print(f"  {prompt!r} (answer {answer})\n    before {old!r}\n    after  {new!r}")
        names = [name for name in self.history[-1] if name.startswith("seconds_")]
        spent = {name.removeprefix("seconds_"): sum(row.get(name, 0.0) for row in self.history) for name in names}
        shares = ", ".join(f"{name} {seconds / sum(spent.values()):.0%}" for name, seconds in spent.items())
        print(f"Time:    {sum(spent.values()):.0f} s in {len(self.history) - 1} steps: {shares}")
        print(f"Model:   {self.folder / 'final'}")
        print(f"Picture: {self.folder / 'metrics.png'}")
        print(f"Samples: {self.folder / 'samples.html'}")


def _rows(path):
    """The rows of a log that can be read."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows += [row] if row["step"] >= 0 else []
    return rows


def _finite(value):
    """A value as JSON can hold it: None in place of numbers that are not finite, within lists and dicts, too."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(row, indent=None):
    return json.dumps(_finite(row), indent=indent, allow_nan=False)


def _brief(text, most=80):
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 4] + " ..."


def _wandb():
    try:
        import wandb
    except ImportError:
        raise InputError(
            'WANDB_PROJECT is set, but wandb is not installed; pip install wandb, or set it to ""'
        ) from None
    return wandb


def fingerprints(trainer):
    """Of what a run is made from, prompts and weights as loaded, a few digits each that change where they change.

    Prompts count as they were given, because a template may hold the day's date; the template counts to the policy.
    Weights count as bfloat16, which they may be on one device and not on another, by the exact sum of their bits.
    """
    reward_model = trainer.reward_model and trainer.reward_model.model
    content = {
        "PROMPTS": [(row["messages"], row["begun"], row["answer"]) for row in trainer.train_rows],
        "EVAL_PROMPTS": [(row["messages"], row["begun"], row["answer"]) for row in trainer.eval_rows],
        "POLICY_MODEL": (trainer.tokenizer.chat_template, _sums_of_bits(trainer.policy)),
        "REWARD_MODEL": _sums_of_bits(reward_model) if reward_model else None,
    }
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in content.items()}


@torch.no_grad()
def _sums_of_bits(model):
    weights = {name: value for name, value in model.named_parameters() if ".lora_" not in name}
    return [(name, value.bfloat16().view(torch.int16).sum(dtype=torch.long).item()) for name, value in weights.items()]


def describe_machine(repository):
    """What a reader of the run needs to repeat it."""
    commit = None
    if shutil.which("git"):
        describe = ["git", "-C", str(repository), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    packages = ("torch", "transformers", "numpy")
    return {
        "rewards_sha256": configs.sha256_of_rewards(),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git_commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "hardware": {
            "cpus": os.cpu_count(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
