"""Rewards: the functions to edit for a task of your own, and what runs them safely.

A rule reward is a function of (prompt, completion, row) that returns a number; row is the prompt's line of the data, so
`row["answer"]` is its answer. Its name is what the constant REWARDS says: `"exact_match"`, or with weights
`"math 1.0, format 0.2"`. `reward_model` stands for the model of the constant REWARD_MODEL.

Rules run in processes of their own, so that one that hangs, dies or eats memory cannot take a run with it. A reward
that raises, returns something else than a finite number, or takes longer than SECONDS counts as 0 for that completion,
and is written down; the run stops where more than MOST_FAILURES of a batch's scores fail.
"""

import contextlib
import functools
import importlib.util
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import TimeoutError
from pathlib import Path

from math_verify import parse, verify

from configs import InputError

SECONDS = 1.0  # per completion and rule
START = 60.0  # seconds that the process of the rules may take beside them, to load them most of all
MEMORY = 4 * 2**30  # bytes of address space per process
MOST_FAILURES = 0.5  # share of a batch's completions
PROCESSES = min(4, os.cpu_count() or 1)
LARGEST, LARGEST_WEIGHT = 1e30, 1e6  # of a score and of a weight: their products and sums fit in float32


# ---- Rule rewards: add yours here


def exact_match(prompt, completion, row):
    """1.0 if the text after the last `#` is the row's answer, else 0.0."""
    _, marker, answer = completion.rpartition("#")
    return float(bool(marker) and answer.strip() == str(row["answer"]).strip())


def math(prompt, completion, row):
    """1.0 if the completion's answer equals the row's as mathematics, 0.5 and \\boxed{\\frac{1}{2}} say, else 0.0.

    The answer is what follows the last `####`, or else the last \\boxed{...}; the row's answer may be marked alike.
    """
    gold, answer = find_answer(row["answer"]) or row["answer"], find_answer(completion)
    unlimited = {"parsing_timeout": None}  # the time limit of all rewards holds here, too
    return float(bool(answer) and verify(parse(gold, **unlimited), parse(answer, **unlimited), timeout_seconds=None))


def format(prompt, completion, row):
    """1.0 if the completion marks an answer, by `####` or \\boxed{...}, else 0.0."""
    return float(bool(find_answer(completion)))


def length(prompt, completion, row):
    """−1 per thousand characters: a pull towards short completions, to be weighed against the others."""
    return -len(completion) / 1000


def find_answer(text):
    """What follows the last `####`, to the end of its line; else the last \\boxed{...} and what is in it; else ""."""
    _, marker, answer = text.rpartition("####")
    if marker:
        return answer.strip().partition("\n")[0].strip()
    _, marker, inside = text.rpartition("\\boxed{")
    depth = 1
    for end, letter in enumerate(inside if marker else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return f"\\boxed{{{inside[:end]}}}" if inside[:end].strip() else ""
    return ""


# ---- Names and weights


def parse_rewards(text, name="REWARDS"):
    """`"reward_model 1.0, exact_match 0.5"` -> {"reward_model": 1.0, "exact_match": 0.5}; a weight left out is 1."""
    weights = {}
    for part in text.split(","):
        words = part.split()
        try:
            reward, weight = words if len(words) == 2 else (*words, 1.0)
            weight = float(weight)
        except ValueError:
            raise InputError(f'{name} = {text!r}: cannot read {part!r}; write "name weight, name weight"') from None
        if not abs(weight) <= LARGEST_WEIGHT:  # nor NaN
            most = f"not a finite number up to {LARGEST_WEIGHT:g}"
            raise InputError(f"{name} = {text!r}: the weight of {reward} is {most}; give one such as 0.5")
        if reward in weights:
            raise InputError(f"{name} = {text!r}: {reward} is there twice; leave out one")
        if reward != "reward_model":
            find_reward(reward, name)
        weights[reward] = weight
    if not any(weights.values()):
        raise InputError(f"{name} = {text!r}: all weights are zero, which teaches nothing; give one such as 1.0")
    return weights


def find_reward(reward, name):
    """The rule reward of that name in this file: a function of (prompt, completion, row)."""
    functions = {key: f for key, f in globals().items() if inspect.isfunction(f) and f.__module__ == __name__}
    rules = {key: f for key, f in functions.items() if _parameters(f) == ["prompt", "completion", "row"]}
    if reward in functions and reward not in rules:
        takes = f"{name}: {reward!r} of rewards.py takes ({', '.join(_parameters(functions[reward]))})"
        raise InputError(f"{takes}; a rule must take (prompt, completion, row)")
    if reward not in rules:
        have = ", ".join(sorted(rules))
        raise InputError(f"{name}: rewards.py has no rule {reward!r}, it has {have}; name one of them, or add yours")
    return rules[reward]


def _parameters(function):
    return list(inspect.signature(function).parameters)


def check_rules(names, row, file=__file__):
    """Raises InputError where a rule has no score for any of some completions that hold the row's answer.

    That is a rule which is not finished: better to say so now than after a step's sampling.
    """
    answer = row["answer"]
    texts = [answer, f"#### {answer}", f"\\boxed{{{answer}}}", f"<answer>{answer}</answer>", ""]
    for name in sorted(names):
        problems = [problem for _, problem in _score_by_rule(file, name, [row] * len(texts), texts)]
        if all(problems):
            raise InputError(f"{name}, a rule of {file}, {problems[0]}, for the first prompt and its answer; mend it")


# ---- Running them


class Rewards:
    """The weighted sum of some rewards, computed safely.

    weights: {name: weight}. reward_model: of loading.py, for "reward_model": scores of (rows, texts), and a report.
    file: where the rules are. log: a function of a list of failures, set once a run has a folder.
    """

    def __init__(self, weights, reward_model=None, file=__file__):
        self.weights, self.reward_model, self.file = weights, reward_model, str(file)
        self.log, self.scored = None, {name: [] for name in weights}
        self.failures = []

    def __call__(self, rows, texts, rollouts=None):
        """One number per completion; rollouts: for a reward model that scores tokens.

        Raises InputError where more than MOST_FAILURES of the scores fail.
        """
        total, failed = [0.0] * len(texts), []
        for name, weight in self.weights.items():
            if name == "reward_model":
                scores = [_checked(score) for score in self.reward_model(rows, texts, rollouts)]
            else:
                scores = self._by_rule(name, rows, texts)
            for i, (score, problem) in enumerate(scores):
                total[i] += weight * score
                if problem:
                    failed.append(
                        {"reward": name, "prompt": rows[i]["prompt"], "completion": texts[i], "problem": problem}
                    )
            self.scored[name] += [score for score, _ in scores]
        self.failures += failed
        if self.log is not None and failed:
            self.log(failed)
        if len(failed) > MOST_FAILURES * len(texts) * len(self.weights):
            first = failed[0]
            raise InputError(
                f"{len(failed)} of {len(texts)} completions got no reward: {first['reward']} {first['problem']} for "
                f"{first['completion'][:60]!r}; mend it in rewards.py, see reward_failures.jsonl"
            )
        return total

    def report(self):
        """Metrics since the last report: each reward's mean, the share of scores that failed, and the model's own."""
        scores = sum(len(values) for values in self.scored.values())
        means = {name: sum(values) / len(values) for name, values in self.scored.items() if values}
        metrics = {f"reward_{name.removeprefix('reward_')}": mean for name, mean in means.items()}
        metrics["reward_failures"] = len(self.failures) / max(1, scores)
        self.failures, self.scored = [], {name: [] for name in self.weights}
        return metrics | (self.reward_model.report() if self.reward_model else {})

    def _by_rule(self, name, rows, texts):
        return _score_by_rule(self.file, name, rows, texts)


def _score_by_rule(file, name, rows, texts):
    plain = [{key: value for key, value in row.items() if key not in ("prompt_ids", "prompt_text")} for row in rows]
    return _server_of(str(file)).ask(name, list(zip(plain, texts, strict=True)))


@functools.cache
def _server_of(file):
    return _Server(file)


class _Server:
    """The process that runs the rules of a file; started by the first request, and again if it has died."""

    def __init__(self, file):
        self.file, self.process, self.lock = file, None, threading.Lock()

    def ask(self, name, items):
        """What serve() answers to a rule's name and a list of (row, completion): a (score, problem) for each."""
        line = json.dumps([name, items], default=str) + "\n"
        longest = START + 2 * SECONDS * len(items)  # a slow one takes its second twice, among others and then alone
        with self.lock:
            for _ in range(2):
                began, process = time.monotonic(), self._running()
                late = threading.Timer(longest, _end, [process])  # writing and reading end with the process
                late.start()
                try:
                    process.stdin.write(line)
                    process.stdin.flush()
                    if (answer := process.stdout.readline()).endswith("\n"):
                        return json.loads(answer)
                except OSError:
                    pass
                finally:
                    late.cancel()
                _end(process)
                process.wait()
        if time.monotonic() - began > longest:
            raise InputError(f"{name}, a rule of {self.file}, gave no answer in {longest:.0f} s; make it faster")
        raise InputError(f"the rules of {self.file} do not load; mend it, `python {self.file}` shows where")

    def _running(self):
        if self.process is not None and self.process.poll() is not None:
            _end(self.process)  # what it forked may live on
            self.process = None
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "import rewards, sys; rewards.serve(sys.argv[1])", self.file],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent,
                start_new_session=True,  # Ctrl-C is for the run to handle
            )
        return self.process


def _end(process):
    """Ends a server and the processes that it has forked, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def serve(file):
    """The server: requests on stdin, a line each, answers on stdout. It forks the processes that run the rules."""
    import resource
    from multiprocessing import get_context

    from pebble import ProcessPool

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints is not an answer
    # A process forked while this one reads its stdin would wait for ever to close it, for reading holds its lock.
    requests, sys.stdin = sys.stdin, open(os.devnull)  # noqa: SIM115, for as long as the server
    spec = importlib.util.spec_from_file_location("rules", file)
    rules = sys.modules["rules"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)

    def limit():
        for file in (requests, answers):  # or their other ends would not see that the server is gone
            os.close(file.fileno())
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    with ProcessPool(PROCESSES, context=get_context("fork"), initializer=limit) as pool:
        for line in requests:
            name, items = json.loads(line)
            rule, size = getattr(rules, name), max(1, min(16, len(items) // PROCESSES))
            chunks = [
                items[i : i + size] for i in range(0, len(items), size)
            ]  # one by one would cost as much as a rule
            futures = [pool.schedule(_score, [rule, chunk], timeout=SECONDS) for chunk in chunks]
            scores = [_scores(pool, rule, *pair) for pair in zip(chunks, futures, strict=True)]
            print(json.dumps(sum(scores, [])), file=answers, flush=True)


def _score(rule, items):
    scores = []
    for row, text in items:
        try:
            scores.append(_checked(rule(row["prompt"], text, row)))
        except BaseException as error:  # whatever a rule raises is the rule's failure
            scores.append((0.0, f"raised {type(error).__name__}: {error}"[:300]))
    return scores


def _checked(value):
    """(score, problem): the value as a number and None, or 0 and why it is no number."""
    try:
        if abs(number := float(value)) <= LARGEST:  # nor NaN
            return number, None
    except (TypeError, ValueError, OverflowError):  # the last: of a whole number beyond all floats
        pass
    return 0.0, f"returned {value!r:.200}, not a finite number up to {LARGEST:g}"


def _scores(pool, rule, items, future):
    """What a chunk scored; where it took too long or its process died, one item after the other to find the culprit."""
    try:
        return future.result()
    except TimeoutError:
        problem = f"took longer than {SECONDS:g} s"
    except Exception as error:
        problem = f"ended its process: {error}"
    if len(items) == 1:
        return [(0.0, problem)]
    again = [([item], pool.schedule(_score, [rule, [item]], timeout=SECONDS)) for item in items]
    return [score for item, future in again for score in _scores(pool, rule, item, future)]
