"""Shows a run elsewhere: TensorBoard, Weights & Biases, a profile. None of them can end the run."""

import contextlib
import operator
from importlib.util import find_spec

import torch

import configs
from configs import InputError


class Boards:
    """Logs to TensorBoard if TENSORBOARD is set and the package is installed.

    It logs to Weights & Biases if WANDB_PROJECT names a project. A failure is reported once. Raises InputError if wandb
    is asked for and not installed.
    """

    def __init__(self, constants):
        self.constants = constants
        self.wandb = _import_wandb() if constants.WANDB_PROJECT else None
        self.tensorboard = self.wandb_run = None

    def open(self, files, purge_step):
        """Begins to write. files: the RunFolder.

        purge_step: the step from which on TensorBoard forgets earlier events, or None.
        """
        self.complain = files.complain
        try:
            if self.constants.TENSORBOARD and find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(files.path, purge_step=purge_step)
        except Exception as error:
            self.complain("tensorboard", f"TensorBoard's events cannot be written: {error}; training goes on without")
        try:
            if self.wandb:
                self.wandb_run = self.wandb.init(
                    project=self.constants.WANDB_PROJECT,
                    id=files.run_id(),
                    name=files.path.name,
                    resume="allow",
                    dir=files.path,
                    config=configs.as_saved(self.constants.values()),
                )
        except Exception as error:  # no key, no network, a server that refuses
            remedy = "training goes on without; its lines are in metrics.jsonl; WANDB_MODE=offline logs to a file"
            self.complain("wandb", f"Weights & Biases cannot be logged to: {error}; {remedy}")

    def log(self, metrics):
        """Sends the numbers of a step to both."""
        numbers = {name: value for name, value in metrics.items() if name != "step" and value is not None}
        try:
            if self.tensorboard:
                for name, value in numbers.items():
                    self.tensorboard.add_scalar(name, value, metrics["step"])
                self.tensorboard.flush()
        except Exception as error:
            self.complain("tensorboard", f"TensorBoard's events could not be written: {error}; training goes on")
        try:
            if self.wandb_run:
                self.wandb_run.log(numbers, step=metrics["step"])
        except Exception as error:
            self.complain("wandb", f"Weights & Biases did not take the metrics: {error}; training goes on")

    def close(self):
        with contextlib.suppress(Exception):  # log has reported it
            if self.tensorboard:
                self.tensorboard.close()
        with contextlib.suppress(Exception):
            if self.wandb_run:
                self.wandb_run.finish()  # or the next run of this process would continue it


def _import_wandb():
    try:
        import wandb
    except ImportError:
        raise InputError(
            'WANDB_PROJECT is set, but wandb is not installed; pip install wandb, or set it to ""'
        ) from None
    return wandb


class Profiler:
    """Traces the second to fourth step of this process into profile.json.gz, if PROFILE is set.

    A shorter run is traced up to its end.
    """

    def __init__(self, wanted, files):
        self.wanted = wanted
        self.path = files.path / "profile.json.gz"
        self.complain = files.complain
        self.steps_begun = 0
        self.running = None  # the profile that is being taken

    def begin_step(self):
        self.steps_begun += 1
        if self.wanted and self.steps_begun == 2:
            with self._complaining():
                profile = torch.profiler.profile()
                profile.start()
                self.running = profile
        elif self.steps_begun == 5:
            self.stop()

    def stop(self):
        """Writes the trace if one is being taken, and prints which operations took most of the time."""
        if self.running:
            profile, self.running = self.running, None
            with self._complaining():
                profile.stop()
                profile.export_chrome_trace(str(self.path))
                time_of = operator.attrgetter(f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total")
                operations = sorted(profile.key_averages(), key=time_of, reverse=True)
                total = sum(map(time_of, operations))
                shares = ", ".join(f"{operation.key} {time_of(operation) / total:.0%}" for operation in operations[:8])
                print(f"Profile: {self.path}, for chrome://tracing or ui.perfetto.dev; {shares}")

    @contextlib.contextmanager
    def _complaining(self):
        try:
            yield
        except Exception as error:
            self.complain("profile", f"the profile could not be taken: {error}; training goes on without")
