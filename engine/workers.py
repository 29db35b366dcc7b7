"""Who does work: the main thread, or another one beside it for models on devices of their own."""

from concurrent.futures import ThreadPoolExecutor


def worker_beside(device, others):
    """What work is submitted to, for models on other devices than the policy's: a thread if there are any."""
    return ThreadPoolExecutor(1) if {*others} - {device} else LazyWorker()


class LazyWorker:
    """In place of a thread if all models share a device: work is done when its result is asked for."""

    def __init__(self, work=None):
        self.work = work

    def submit(self, function, *arguments):
        return LazyWorker(lambda: function(*arguments))

    def result(self):
        return self.work()
