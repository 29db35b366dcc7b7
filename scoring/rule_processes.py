"""The processes that run rules. A rule that hangs, dies or eats memory cannot take a run with it."""

import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import TimeoutError
from pathlib import Path

from configs import HERE, InputError

START = 60.0  # seconds that the server may take in addition to the rules; most of it goes to loading them
MEMORY = 4 * 2**30  # bytes that a rule's process may take in addition to those that loading rewards.py took
CORES = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes share a machine's
PROCESSES = min(4, max(1, CORES))
LARGEST = 1e30  # the largest score: times a weight, and summed, it still fits in float32
TAKES = ["prompt", "completion", "row"]  # the parameters of a rule


def score_by_rule(file, name, rows, texts):
    """Returns a (score, problem) for each completion. file: the file that holds the rule.

    This is (number, None) for a score, (0, the reason) for a failure, and (None, None) if the rule returned None.
    """
    plain = [{key: value for key, value in row.items() if key not in ("prompt_ids", "prompt_text")} for row in rows]
    return _server_of(str(file)).ask(name, list(zip(plain, texts, strict=True))) if rows else []


def rule_of(module, name):
    """Returns the rule `name` of a module, or None if it has none.

    The rule is a function of that name, or of that name with _reward at its end.
    """
    for found in (getattr(module, name, None), getattr(module, f"{name}_reward", None)):
        if parameters_of(found) == TAKES:
            return found
    return None


def seconds_of_rules():
    """How long a rule may take for a completion: SECONDS of the file of rules, or of rewards.py if it has none."""
    rules = sys.modules.get("rules")  # in the process that runs them, which must not load a big file twice
    if not hasattr(rules, "SECONDS"):
        import rewards as rules
    return rules.SECONDS


def parameters_of(function):
    """Returns the names of a function's parameters, without keyword-only ones that have a default."""
    try:
        parameters = inspect.signature(function).parameters.values() if callable(function) else ()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    return [p.name for p in parameters if p.kind != p.KEYWORD_ONLY or p.default is p.empty]


@functools.cache
def _server_of(file):
    return _Server(file)


class _Server:
    """The process that runs the rules of a file. A request starts it, also if an earlier one has died."""

    def __init__(self, file):
        self.file, self.process, self.lock = file, None, threading.Lock()

    def ask(self, name, items):
        """Returns a (score, problem) for each item. name: of the rule. items: a list of (row, completion)."""
        request = pickle.dumps((name, items))  # not JSON, which has no dates
        # A slow item takes its time twice: in its chunk, and then alone.
        longest = START + 2 * seconds_of_rules() * len(items)
        with self.lock:
            for _ in range(2):
                began, process = time.monotonic(), self._running()
                late = threading.Timer(longest, _end, [process])  # this ends a write or read that hangs
                late.start()
                try:
                    process.stdin.write(request)
                    process.stdin.flush()
                    if (answer := process.stdout.readline()).endswith(b"\n"):
                        return json.loads(answer)
                except OSError:
                    pass
                finally:
                    late.cancel()
                _end(process)
                process.wait()
        if time.monotonic() - began > longest:
            slow = f"{name}, a rule of {self.file}, gave no answer in {longest:.0f} s"
            raise InputError(f"{slow}; make it faster, or raise SECONDS in rewards.py")
        raise InputError(f"the rules of {self.file} do not load; mend it, `python {self.file}` shows where")

    def _running(self):
        if self.process is not None and self.process.poll() is not None:
            _end(self.process)  # its own processes may still live
            self.process = None
        if self.process is None:
            serve_it = (
                "import sys; sys.path[0] = sys.argv[1]; from scoring import rule_processes as p; p.serve(sys.argv[2])"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", serve_it, str(HERE), self.file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # the run handles Ctrl-C
            )
        return self.process


def _end(process):
    """Kills a server and the processes that it has forked. They are a process group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(file):
    """Runs the server: it reads pickled requests from stdin, and writes one line of JSON per answer to stdout.

    It forks the processes that run the rules.
    """
    import resource
    from multiprocessing import get_context

    from pebble import ProcessPool

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm may send it to all processes; the run handles it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # text that a rule prints is no answer
    # Reading holds the lock of stdin. A process forked meanwhile would wait for it forever when it closes stdin.
    requests, sys.stdin = sys.stdin.buffer, open(os.devnull)  # noqa: SIM115, because it stays open
    spec = importlib.util.spec_from_file_location("rules", file)
    rules = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    # Libraries may reserve far more addresses than they use, so the limit counts only what comes after loading.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def limit():
        for file in (requests, answers):  # while a copy is open, the other end does not see that the server has died
            os.close(file.fileno())
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))

    with ProcessPool(PROCESSES, context=get_context("fork"), initializer=limit) as pool:
        while True:
            try:
                name, items = pickle.load(requests)
            except EOFError:
                return
            size = max(1, min(16, len(items) // PROCESSES))  # sending items one by one costs as much as a rule
            chunks = [items[i : i + size] for i in range(0, len(items), size)]
            futures = [pool.schedule(_score, [name, chunk], timeout=seconds_of_rules()) for chunk in chunks]
            scores = [_scores(pool, name, *pair) for pair in zip(chunks, futures, strict=True)]
            print(json.dumps(sum(scores, [])), file=answers, flush=True)


def _score(name, items):
    rule, scores = rule_of(sys.modules["rules"], name), []  # by name, because not every rule can be pickled
    for row, text in items:
        try:
            scores.append(checked(rule(row["prompt"], text, row)))
        except BaseException as error:  # anything that a rule raises is its failure
            scores.append((0.0, f"raised {type(error).__name__}: {error}"[:300]))
    return scores


def checked(value):
    """Returns (number, None), (0, the reason) for a value that is no score, or (None, None) for None."""
    if value is None:
        return None, None
    try:
        if abs(number := float(value)) <= LARGEST:  # False for NaN
            return number, None
    except (TypeError, ValueError, OverflowError):  # OverflowError: an int too large for a float
        pass
    return 0.0, f"returned {value!r:.200}, not a finite number up to {LARGEST:g}"


def _scores(pool, name, items, future):
    """Returns the scores of a chunk.

    If the chunk took too long or its process died, its items are tried one by one to find the culprit.
    """
    try:
        return future.result()
    except TimeoutError:
        problem = f"took longer than {seconds_of_rules():g} s; make it faster, or raise SECONDS in rewards.py"
    except Exception as error:
        problem = f"ended its process: {error}"
    if len(items) == 1:
        return [(0.0, problem)]
    again = [([item], pool.schedule(_score, [name, [item]], timeout=seconds_of_rules())) for item in items]
    return [score for item, future in again for score in _scores(pool, name, item, future)]
