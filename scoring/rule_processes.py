"""The processes that run rules, so that a rule that hangs, dies or eats memory cannot take a run with it."""

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

START = 60.0  # seconds that the process of the rules may take beside them, to load them most of all
MEMORY = 4 * 2**30  # bytes that a rule's process may take beside what loading rewards.py took
PROCESSES = min(4, os.cpu_count() or 1)
LARGEST = 1e30  # of a score, so that products with weights and their sums fit in float32
TAKES = ["prompt", "completion", "row"]


def score_by_rule(file, name, rows, texts):
    """A (score, problem) for each completion: a number and None; 0 and why it is no number; None twice for None.

    file: that holds the rules.
    """
    plain = [{key: value for key, value in row.items() if key not in ("prompt_ids", "prompt_text")} for row in rows]
    return _server_of(str(file)).ask(name, list(zip(plain, texts, strict=True))) if rows else []


def rule_of(module, name):
    """The rule of that name in a module of rules, or None: a function of that name, or of that name and _reward."""
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
    """The names of a function's parameters, but for those that can only be given by name and have a default."""
    try:
        parameters = inspect.signature(function).parameters.values() if callable(function) else ()
    except (TypeError, ValueError):  # of some builtins
        return []
    return [p.name for p in parameters if p.kind != p.KEYWORD_ONLY or p.default is p.empty]


@functools.cache
def _server_of(file):
    return _Server(file)


class _Server:
    """The process that runs the rules of a file; started by the first request, and again if it has died."""

    def __init__(self, file):
        self.file, self.process, self.lock = file, None, threading.Lock()

    def ask(self, name, items):
        """What serve() answers to a rule's name and a list of (row, completion): a (score, problem) for each."""
        request = pickle.dumps((name, items))  # not JSON, which has no dates
        longest = START + 2 * seconds_of_rules() * len(
            items
        )  # a slow one takes its second twice, among others and then alone
        with self.lock:
            for _ in range(2):
                began, process = time.monotonic(), self._running()
                late = threading.Timer(longest, _end, [process])  # writing and reading end with the process
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
            _end(self.process)  # what it forked may live on
            self.process = None
        if self.process is None:
            serve_it = (
                "import sys; sys.path[0] = sys.argv[1]; from scoring import rule_processes as p; p.serve(sys.argv[2])"
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", serve_it, str(HERE), self.file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the run to handle
            )
        return self.process


def _end(process):
    """Ends a server and the processes that it has forked, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(file):
    """The server: pickled requests on stdin, answers on stdout, a line of JSON each. It forks the rules' processes."""
    import resource
    from multiprocessing import get_context

    from pebble import ProcessPool

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm may send it to all processes; it is for the run to handle
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints is not an answer
    # A process forked while this one reads its stdin would wait for ever to close it, for reading holds its lock.
    requests, sys.stdin = sys.stdin.buffer, open(os.devnull)  # noqa: SIM115, for as long as the server
    spec = importlib.util.spec_from_file_location("rules", file)
    rules = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    # Libraries may reserve far more addresses than they use, so that only what comes after loading is limited.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def limit():
        for file in (requests, answers):  # or their other ends would not see that the server is gone
            os.close(file.fileno())
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))

    with ProcessPool(PROCESSES, context=get_context("fork"), initializer=limit) as pool:
        while True:
            try:
                name, items = pickle.load(requests)
            except EOFError:
                return
            size = max(1, min(16, len(items) // PROCESSES))  # one by one would cost as much as a rule
            chunks = [items[i : i + size] for i in range(0, len(items), size)]
            futures = [pool.schedule(_score, [name, chunk], timeout=seconds_of_rules()) for chunk in chunks]
            scores = [_scores(pool, name, *pair) for pair in zip(chunks, futures, strict=True)]
            print(json.dumps(sum(scores, [])), file=answers, flush=True)


def _score(name, items):
    rule, scores = rule_of(sys.modules["rules"], name), []  # by name, because not every rule can be pickled
    for row, text in items:
        try:
            scores.append(checked(rule(row["prompt"], text, row)))
        except BaseException as error:  # whatever a rule raises is the rule's failure
            scores.append((0.0, f"raised {type(error).__name__}: {error}"[:300]))
    return scores


def checked(value):
    """(score, problem): the value as a number and None, or 0 and why it is no number; (None, None) of None."""
    if value is None:
        return None, None
    try:
        if abs(number := float(value)) <= LARGEST:  # nor NaN
            return number, None
    except (TypeError, ValueError, OverflowError):  # the last: of a whole number beyond all floats
        pass
    return 0.0, f"returned {value!r:.200}, not a finite number up to {LARGEST:g}"


def _scores(pool, name, items, future):
    """What a chunk scored; where it took too long or its process died, one item after the other to find the culprit."""
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
