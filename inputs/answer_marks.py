"""Finds the answers that a text marks, in a completion or in the data."""

import re

_MARK = re.compile(r"(?<!#)####(?!#)|\\f?box(?:ed)?\s*\{|\banswer\**\s*[:：]", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*\\?(?:text\s*\{)?\s*(?:and|or)\b\s*\}?)[\s$]*")


def marked_answers(text):
    """Returns the answers that a text marks, in order.

    An answer follows `####` or `Answer:`, up to the end of the line, or it stands in \\boxed{...}. Boxes that follow
    one another, as in \\boxed{3} and \\boxed{5}, are one answer: "3, 5". Empty marks are left out.
    """
    return [answer for answer, _ in marks(text)]


def marks(text):
    """Returns (answer, whether it may be a heading) for each mark.

    A `####` may be a heading if an answer comes before it and text comes below it.
    """
    answers, end_of_box = [], None
    for mark in _MARK.finditer(text):
        if not mark[0].endswith("{"):
            answer, _, below = text[mark.end() :].strip().partition("\n")
            answers.append((answer.strip(), mark[0] == "####" and any(a for a, _ in answers) and bool(below.strip())))
            continue
        inside = _up_to_brace(text[mark.end() :])
        joined = end_of_box is not None and _BETWEEN_BOXES.fullmatch(text[end_of_box : mark.start()])
        answers.append((f"{answers.pop()[0]}, {inside}" if joined else inside.strip(), False))
        end_of_box = mark.end() + len(inside) + 1
    return [(answer, may_be_heading) for answer, may_be_heading in answers if answer]


def _up_to_brace(text):
    """Returns the text before the brace that closes the one before the text, or "" if none does."""
    depth = 1
    for end, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:end]
    return ""
