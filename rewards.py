"""The rules that say what a completion is worth. Add yours here.

A rule is a function of (prompt, completion, row) that returns a number. row is the prompt's line of the data, so
`row["answer"]` is its answer. If a rule does not concern a row, it returns None: the row is left out of the rule's
mean, and gets nothing from it. A row that no rule concerns gets 0.

The constant REWARDS names the rules, with weights: "math 1.0, format 0.2". The name "math" stands for the function
math_reward, so that a rule may have the name of a module. A function may also have the rule's own name, as exact_match
has. `reward_model` stands for the model of the constant REWARD_MODEL. A rule may be imported here, or be a lambda, a
functools.partial or an object with __call__.

Rules run in processes of their own, so that one that hangs, dies or eats memory cannot take a run with it. If a rule
raises, returns something else than a finite number, or takes longer than SECONDS, that completion gets 0 from it, and
the failure is written down.
"""

from scoring.answers import is_right, marked_answers

SECONDS = 1.0  # per completion and rule; raise it for a rule that needs longer, such as one that asks a judge


def exact_match(prompt: str, completion: str, row: dict) -> float:
    """1.0 if the text after the last `#` is the row's answer, else 0.0."""
    _, marker, answer = completion.rpartition("#")
    return float(bool(marker) and answer.strip() == str(row["answer"]).strip())


def math_reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 if the completion's answer equals the row's, as mathematics or else in the same words, else 0.0.

    The answer is what the completion marks last: after `####` or `Answer:`, or in \\boxed{...}. The row's answer may be
    marked alike, or bare: \\frac{1}{2}, "0.5", "B", "$14" and "(2, 3)" are all read. See docs/answers.md.
    """
    return float(is_right(str(row["answer"]), completion))


def format_reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 if the completion marks an answer, by `####`, `Answer:` or \\boxed{...}, else 0.0."""
    return float(bool(find_answer(completion)))


def length_reward(prompt: str, completion: str, row: dict) -> float:
    """−1 per thousand characters: a pull towards short completions, to be weighed against the others."""
    return -len(completion) / 1000


def find_answer(text: str) -> str:
    """The answer that a text marks last, for rules of your own; "" if it marks none."""
    return (marked_answers(text) or [""])[-1]
