"""Who does the work of the other models: the main thread, or a thread beside it if they have their own devices."""

from concurrent.futures import ThreadPoolExecutor

from engine.processes import several


def worker_beside(device, devices):
    """Returns an executor for the work of the other models. devices: {"REF_DEVICE": ...}, SAMPLER_DEVICE among them.

    It is a thread if one of their devices is not the policy's, and a LazyWorker otherwise. Several processes need one
    order of their work, so they have no thread.
    """
    others = {value for name, value in devices.items() if name != "SAMPLER_DEVICE"} - {device}
    return ThreadPoolExecutor(1) if others and not several() else LazyWorker()


class LazyWorker:
    """Takes the place of a thread if all models share a device. It does work when its result is asked for."""

    def __init__(self, work=None):
        self.work = work

    def submit(self, function, *arguments):
        return LazyWorker(lambda: function(*arguments))

    def result(self):
        return self.work()
