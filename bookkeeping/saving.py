"""Saves a trainer: checkpoints, written by a thread, and the trained model in final/."""

import functools
import shutil
from concurrent.futures import ThreadPoolExecutor, wait

from bookkeeping import checkpoints
from bookkeeping.policy_files import policy_weights, save_merged, save_policy
from configs import InputError
from engine.sharding import is_sharded, load_optimizer

LARGE = 2**28  # bytes of weights that train, from which a state on a CPU is written without a copy


def state_of(trainer):
    """Returns what a checkpoint holds of a trainer beside the policy's weights."""
    kept = {name: getattr(trainer, name) for name in trainer.kept}
    of_trainer = {"optimizer": trainer.optimizer.state_dict()} | kept
    return {"trainer": of_trainer, "beside": {name: one.state() for name, one in trainer.beside.items()}}


def load_state(trainer, state):
    """Lets a trainer continue from such a state."""
    load_optimizer(trainer.optimizer, state["trainer"]["optimizer"])
    for name in trainer.kept:
        setattr(trainer, name, state["trainer"][name])
    for name, one in trainer.beside.items():
        one.load_state(state.get("beside", {}).get(name, {}))


def copy_of(trainer, state):
    """Returns copies on the CPU of a state, and of the policy's weights. If they are sharded, all processes call it."""
    return checkpoints.copy_to_cpu(state), checkpoints.copy_to_cpu(policy_weights(trainer.policy, trainer.adapter))


def copies_of_sharded(trainer):
    """Returns the weights of all models that train, {name of a folder: {name: tensor}}, or None if none is sharded.

    All processes call it.
    """
    models = {"final": trainer.policy} | {f"final-{name}": one.model for name, one in trainer.beside.items()}
    copy = checkpoints.copy_to_cpu
    return {name: copy(policy_weights(model)) if is_sharded(model) else None for name, model in models.items()}


class Saver:
    """Saves the model, the tokenizer and the state of a trainer. folder: the path of its run."""

    def __init__(self, trainer, folder):
        self.trainer, self.folder, self.constants = trainer, folder, trainer.constants
        self.thread, self.saving = ThreadPoolExecutor(1), None

    def close(self):
        self.thread.shutdown()

    def try_out(self):
        """Writes the files that a checkpoint and final/ will hold, reads the checkpoint again, and removes both.

        Anything that fails here would otherwise have failed after all steps.
        """
        trial, trainer = self.folder / "trial", self.trainer
        try:
            state, weights = state_of(trainer), policy_weights(trainer.policy, trainer.adapter)
            state, weights = copy_of(trainer, state) if is_sharded(trainer.policy) else (state, weights)
            checkpoints.write_folder(trial / "checkpoint", *self._writers_of_checkpoint(weights, 0, state, []))
            checkpoints.load(trial / "checkpoint", trainer.policy, trainer.adapter)
            for name, writers in self._finals().items():
                if name != "final" or trainer.adapter is not None:  # else it would write the same weights again
                    checkpoints.write_folder(trial / name, *writers)
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def checkpoint(self, step, state, history):
        """Saves a checkpoint, and returns where it will be. history: all rows of metrics up to it.

        It copies the state first, and then a thread writes the copy. On a CPU a copy takes as much memory again as the
        state has, so a large state is not copied, and training waits.
        """
        self.wait()
        history = list(history)
        if in_place := self._is_too_large_to_copy():
            weights = policy_weights(self.trainer.policy, self.trainer.adapter)
        else:
            state, weights = copy_of(self.trainer, state)
        best = history[-1].get("eval_accuracy") if history and history[-1]["step"] == step else None
        target = self.folder / "checkpoints" / f"step-{step}"

        def write():
            checkpoints.write_folder(target, *self._writers_of_checkpoint(weights, step, state, history, best))
            checkpoints.prune(self.folder, self.constants.KEEP_CHECKPOINTS)

        self.saving = self.thread.submit(write)
        if in_place:
            wait([self.saving])
        return target

    def _is_too_large_to_copy(self):
        policy = self.trainer.policy
        size = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
        return policy.device.type == "cpu" and not is_sharded(policy) and size > LARGE

    def wait(self):
        """Waits for the checkpoint that is being written. Returns whether it could be written.

        If not, a line says so.
        """
        saving, self.saving = self.saving, None
        try:
            if saving:
                saving.result()
            return True
        except checkpoints.WRITE_ERRORS as error:
            print(f"Warning: a checkpoint could not be written: {error}; the one before it is intact, training goes on")
            return False

    def final(self):
        """Writes final/, and final-critic/ if there is a critic. Raises InputError if it cannot."""
        self.wait()
        for name, writers in self._finals().items():
            try:
                checkpoints.write_folder(self.folder / name, *writers)
            except checkpoints.WRITE_ERRORS as error:
                raise InputError(f"{self.folder / name} could not be written ({error}); free some space") from None

    def _writers_of_checkpoint(self, weights, step, state, history, best=None):
        trainer = self.trainer
        return (
            lambda folder: save_policy(folder, trainer.policy, trainer.adapter, weights),
            trainer.tokenizer.save_pretrained,
            lambda folder: checkpoints.write_state(folder, step, state, history, best),
        )

    def _finals(self):
        """Returns {name of a folder: its writers}. A model beside the policy is always saved whole, with its head."""
        trainer = self.trainer
        weights = copies_of_sharded(trainer)
        models = {"final": (trainer.policy, trainer.adapter, self.constants.MERGE_LORA)}
        models |= {f"final-{name}": (one.model, one.adapter, True) for name, one in trainer.beside.items()}
        finals = {}
        for name, (model, adapter, merge) in models.items():
            write = functools.partial(save_policy, model=model, adapter=adapter, weights=weights[name])
            if merge and adapter is not None:
                write = functools.partial(save_merged, model=model)
            finals[name] = write, trainer.tokenizer.save_pretrained
        return finals
