"""Rewards: the functions to edit for a task of your own, and what runs them safely.

A rule reward is a function of (prompt, completion, row) that returns a number; row is the prompt's line of the data, so
`row["answer"]` is its answer. A rule that does not concern a row returns None: that row is left out of the rule's mean,
and gets nothing from it. A row that no rule concerns gets 0. A rule's name is what the constant REWARDS says:
`"exact_match"`, or with weights `"math 1.0, format 0.2"`. `reward_model` stands for the model of the constant
REWARD_MODEL. A rule may also be imported here, or be a lambda, a functools.partial or an object with __call__.

Rules run in processes of their own, so that one that hangs, dies or eats memory cannot take a run with it. A reward
that raises, returns something else than a finite number, or takes longer than SECONDS counts as 0 for that completion,
and is written down. The run stops if more than MOST_FAILURES of a batch's scores fail.
"""

import ast
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

from answers import is_right, marked_answers
from configs import InputError

SECONDS = 1.0  # per completion and rule; raise it for a rule that needs longer, such as one that asks a judge
START = 60.0  # seconds that the process of the rules may take beside them, to load them most of all
MEMORY = 4 * 2**30  # bytes that a rule's process may take beside what loading rewards.py took
MOST_FAILURES = 0.5  # share of a batch's scores
MOST_UNREADABLE = 0.1  # share of the data's rows whose own answer a rule may take for wrong
PROCESSES = min(4, os.cpu_count() or 1)
LARGEST, LARGEST_WEIGHT = 1e30, 1e6  # of a score and of a weight: their products and sums fit in float32


# ---- Rule rewards: add yours here


def exact_match(prompt, completion, row):
    """1.0 if the text after the last `#` is the row's answer, else 0.0."""
    _, marker, answer = completion.rpartition("#")
    return float(bool(marker) and answer.strip() == str(row["answer"]).strip())


def math(prompt, completion, row):
    """1.0 if the completion's answer equals the row's, as mathematics or else in the same words, else 0.0.

    The answer is what the completion marks last: after `####` or `Answer:`, or in \\boxed{...}. The row's answer may be
    marked alike, or bare: \\frac{1}{2}, "0.5", "B", "$14" and "(2, 3)" are all read. See docs/answers.md.
    """
    return float(is_right(str(row["answer"]), completion))


def format(prompt, completion, row):
    """1.0 if the completion marks an answer, by `####`, `Answer:` or \\boxed{...}, else 0.0."""
    return float(bool(find_answer(completion)))


def length(prompt, completion, row):
    """−1 per thousand characters: a pull towards short completions, to be weighed against the others."""
    return -len(completion) / 1000


def find_answer(text):
    """The answer that a text marks last, for rules of your own; "" if it marks none."""
    return (marked_answers(text) or [""])[-1]


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
    """The rule reward of that name in this file: it can be called with (prompt, completion, row)."""
    for imported in _imports_under_a_rules_name():
        raise InputError(
            f"rewards.py imports {imported} and has a rule of the same name, so that one hides the other; import it "
            f"under another name: import {imported} as {imported}_module"
        )
    found, takes = globals().get(reward), ["prompt", "completion", "row"]
    if callable(found) and _parameters(found) != takes:
        has = (
            f"{name}: {reward!r} of rewards.py takes ({', '.join(_parameters(found) or ['nothing that can be seen'])})"
        )
        raise InputError(f"{has}; a rule must take (prompt, completion, row)")
    if not callable(found):
        rules = sorted(key for key, value in globals().items() if key[0] != "_" and _parameters(value) == takes)
        have = ", ".join(rules)
        raise InputError(f"{name}: rewards.py has no rule {reward!r}, it has {have}; name one of them, or add yours")
    return found


def _parameters(function):
    """The names of a function's parameters, but for those that can only be given by name and have a default."""
    try:
        parameters = inspect.signature(function).parameters.values() if callable(function) else ()
    except (TypeError, ValueError):  # of some builtins
        return []
    return [p.name for p in parameters if p.kind != p.KEYWORD_ONLY or p.default is p.empty]


def _imports_under_a_rules_name():
    body = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    imports = [alias for node in body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    return [alias.name for alias in imports if (alias.asname or alias.name) in defined]


def check_rules(names, rows, file=__file__):
    """Raises InputError if a rule has no score for any of some completions that hold the first row's answer.

    Such a rule is not finished: better to say so now than after a step's sampling. A rule that does not concern the
    first row is tried on others.
    """
    answer = rows[0]["answer"]
    texts = [form.format(answer) for form in FORMS] + [""]
    for name in sorted(names):
        scores = _score_by_rule(file, name, rows[:1] * len(texts), texts)
        if all(score is None for score, _ in scores):
            some = rows[:: max(1, len(rows) // 100)]
            scores = _score_by_rule(file, name, some, [row["answer"] for row in some])
            if all(score is None for score, _ in scores):
                tried = f"returned None for each of {len(some)} prompts with their answers"
                raise InputError(f"{name}, a rule of {file}, {tried}; mend it, perhaps it lacks a return")
        if all(problem for _, problem in scores):
            raise InputError(f"{name}, a rule of {file}, {scores[0][1]}, for the first prompt and its answer; mend it")


FORMS = ("#### {}", "\\boxed{{{}}}", "Answer: {}", "<answer>{}</answer>", "{}")  # in which an answer is tried
OF_ANSWERS = ("exact_match", "math")  # the rules here that compare with row["answer"]


def check_answers(rule, name, rows, source, file=__file__):
    """Scores each row's own answer, in several forms, by a rule that says what is right: it must give them 1.

    Prints how many it does not, with an example; raises InputError if they are more than MOST_UNREADABLE of the rows. A
    rule of a person's own may want another form, so nothing is said of one that gives 1 to none. Returns the rows that
    the rule concerns. name, source: the constant that names the rule, and where the rows come from, for the message.
    """
    concerned, wrong = rows, rows
    for form in FORMS:
        scores = _score_by_rule(file, rule, wrong, [form.format(row["answer"]) for row in wrong])
        if form == FORMS[0]:
            concerned = [row for row, (score, _) in zip(rows, scores, strict=True) if score is not None]
        wrong = [row for row, (score, _) in zip(wrong, scores, strict=True) if score is not None and score < 1]
    share = len(wrong) / max(1, len(concerned))
    if not wrong or share == 1 and rule not in OF_ANSWERS:
        return concerned
    problem = (
        f"{name}: the rule {rule} gives 0 to the own answer of {len(wrong)} of {len(concerned)} prompts of {source}, "
    )
    problem += f"such as {wrong[0]['answer']!r:.100}"
    remedy = "give --eval-reward math, and math in --rewards" if rule == "exact_match" else "mark the answers with ####"
    remedy += ", leave those rows out, or add a rule to rewards.py that reads them"
    if share > MOST_UNREADABLE:
        raise InputError(f"{problem}; {remedy}")
    print(f"Warning: {problem}; no completion can be right there: {remedy}")
    return concerned


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

        Raises InputError if more than MOST_FAILURES of the scores fail.
        """
        total, failed, count = [0.0] * len(texts), [], 0

        def fail(i, name, problem):
            failed.append({"reward": name, "prompt": rows[i]["prompt"], "completion": texts[i], "problem": problem})

        for name, weight in self.weights.items():
            if name == "reward_model":
                scores = [_checked(score) for score in self.reward_model(rows, texts, rollouts)]
            else:
                scores = self._by_rule(name, rows, texts)
            for i, (score, problem) in enumerate(scores):
                if score is not None:
                    total[i] += weight * score
                    count += 1
                if problem:
                    fail(i, name, problem)
            self.scored[name] += [score for score, _ in scores if score is not None]
        self.failures += failed
        if self.log is not None and failed:
            self.log(failed)
        if len(failed) > MOST_FAILURES * count:
            first = failed[0]
            raise InputError(
                f"{len(failed)} of {count} scores failed: {first['reward']} {first['problem']} for "
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
    return _server_of(str(file)).ask(name, list(zip(plain, texts, strict=True))) if rows else []


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
        longest = START + 2 * SECONDS * len(items)  # a slow one takes its second twice, among others and then alone
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
            here = str(Path(__file__).parent)
            serve_it = "import sys; sys.path[0] = sys.argv[1]; import rewards; rewards.serve(sys.argv[2])"
            self.process = subprocess.Popen(
                [sys.executable, "-c", serve_it, here, self.file],
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
            futures = [pool.schedule(_score, [name, chunk], timeout=SECONDS) for chunk in chunks]
            scores = [_scores(pool, name, *pair) for pair in zip(chunks, futures, strict=True)]
            print(json.dumps(sum(scores, [])), file=answers, flush=True)


def _score(name, items):
    rule, scores = getattr(sys.modules["rules"], name), []  # by name, because not every rule can be pickled
    for row, text in items:
        try:
            scores.append(_checked(rule(row["prompt"], text, row)))
        except BaseException as error:  # whatever a rule raises is the rule's failure
            scores.append((0.0, f"raised {type(error).__name__}: {error}"[:300]))
    return scores


def _checked(value):
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
        problem = f"took longer than {SECONDS:g} s; make it faster, or raise SECONDS in rewards.py"
    except Exception as error:
        problem = f"ended its process: {error}"
    if len(items) == 1:
        return [(0.0, problem)]
    again = [([item], pool.schedule(_score, [name, [item]], timeout=SECONDS)) for item in items]
    return [score for item, future in again for score in _scores(pool, name, item, future)]
