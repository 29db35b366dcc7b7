"""Finds the answer that a text marks, and says whether two answers are the same: as mathematics, or else as words.

math-verify reads the mathematics. It was made to look for mathematics in a text, so it would take 7 out of "6 or 7" and
3 out of "3\\sqrt{2}". Here it gets one whole answer at a time, and only if nothing of that answer would be lost.
"""

import functools
import re

import sympy
from math_verify import parse, verify

# ---- Which part of a text is its answer

_MARK = re.compile(r"(?<!#)####(?!#)|\\f?box(?:ed)?\s*\{|\banswer\**\s*[:：]", re.IGNORECASE)
_BETWEEN_BOXES = re.compile(r"[\s$]*(?:,|;|,?\s*\\?(?:text\s*\{)?\s*(?:and|or)\b\s*\}?)[\s$]*")
_LONGEST = 80  # characters of an answer in words: a longer text is a solution that marks no answer


def marked_answers(text):
    """What a text marks as its answer, in order: after `####` or `Answer:`, to the end of the line; in \\boxed{...}.

    Boxes that follow one another, as in \\boxed{3} and \\boxed{5}, are one answer: "3, 5". Empty marks are left out.
    """
    answers, end_of_box = [], None
    for mark in _MARK.finditer(text):
        if not mark[0].endswith("{"):
            answers.append(text[mark.end() :].strip().partition("\n")[0].strip())
            continue
        inside = _up_to_brace(text[mark.end() :])
        joined = end_of_box is not None and _BETWEEN_BOXES.fullmatch(text[end_of_box : mark.start()])
        answers.append(f"{answers.pop()}, {inside}" if joined else inside.strip())
        end_of_box = mark.end() + len(inside) + 1
    return [answer for answer in answers if answer]


def _up_to_brace(text):
    """The text before the brace that closes what was open when it began; "" if none does."""
    depth = 1
    for end, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:end]
    return ""


def is_right(gold, completion):
    """Whether the answer that a completion marks is the row's. gold: the row's answer, marked or bare.

    Of several marks the last one counts. A Markdown heading uses `####`, too, so if gold is mathematics, the last mark
    counts that is mathematics.
    """
    gold = (marked_answers(gold) or [gold])[-1]
    answers, is_mathematics = marked_answers(completion), read(gold) is not None
    if is_mathematics:
        answers = [answer for answer in answers if read(answer) is not None]
    elif len(gold) > _LONGEST:
        return False
    return bool(answers) and same_answer(gold, answers[-1])


# ---- Whether two answers are the same


def same_answer(gold, answer):
    """Whether an answer equals the right one: as mathematics if both are, else in the same words."""
    gold, answer = _clean(gold), _clean(answer)
    if _words(gold) == _words(answer):
        return True
    if bool(_EQUALS.search(gold)) != bool(_EQUALS.search(answer)):  # `x = 5` and `5` are the same answer
        gold, answer = _without_name(gold), _without_name(answer)
    gold, answer = _read(gold), _read(answer)
    if gold is None or answer is None or _is_equation(gold) != _is_equation(answer):
        return False
    if isinstance(gold, sympy.Rational) and isinstance(answer, sympy.Rational):
        return gold == answer
    scale = _scale(gold) if _scale(answer) else 1
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}  # the time limit of all rules holds here, too
    return verify(gold * scale, answer * scale, **options) if scale > 1 else verify([gold], [answer], **options)


def read(text):
    """An answer as math-verify reads it, a sympy object; None if it is not mathematics as a whole."""
    return _read(_without_name(_clean(text)))


_IN_LATEX = {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "²": "^2", "³": "^3", "°": r"^\circ ", "π": r"\pi "}
_IN_LATEX |= {"∞": r"\infty "} | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
_WRAPPED = re.compile(
    r"\\(?:text|math)?(?:text|bf|rm|it|tt|box|boxed|fbox|mbox|normal|boldsymbol|underline)\s*\{([^{}]*)\}"
)


def _clean(text):
    """An answer without what only dresses it: dollar signs, Markdown, a full stop, a command around it."""
    text = text.replace("\\varnothing", "\\emptyset")
    text = re.sub(r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]", "", text.translate(str.maketrans(_IN_LATEX)))
    before = None
    while text != before:
        before, text = text, text.strip(" \t\n*`").removesuffix(".")
        if whole := _WRAPPED.fullmatch(text):
            text = whole[1]
        if letter := re.fullmatch(r"\(?([A-Za-z])[).]?", text):  # a choice: (B), B) or B.
            text = letter[1]
    return re.sub(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}", text)


def _words(text):
    """For a comparison as text: no case, no spaces but between digits; 52_{8} and 52_8, a.m. and AM are the same."""
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}|(?<!\d)\.|\.(?!\d)", r"\1", text)
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", re.sub(r"_\{(\w+)\}", r"_\1", text))
    return re.sub(r"\\[!,;:> ]|\s", "", text).casefold()


_EQUALS = re.compile(r"(?<![<>!:\\])=|\\in(?![a-z])")
_NAME = re.compile(
    r"(^|,|;|\bor\b|\band\b)\s*"
    r"(?P<name>[^\d=<>+*/^,;-]*[A-Za-z][^\d=<>+*/^,;-]*?|[A-Za-z]\([^()=]*\)|[A-Za-z]_\{?\w+\}?"
    r"|\([a-z](?:\s*,\s*[a-z])+\))\s*(?:=|\\in(?![a-z]))"
)


def _without_name(text):
    """`x = 5` without its name; also `x = 1 or x = 2`, and f(x), a_1 or a word for the name."""
    names = {match["name"].strip() for match in _NAME.finditer(text)}
    return _NAME.sub(r"\1 ", text).strip() if len(names) == 1 else text


_WHOLE = r"(?:[1-9]\d{0,2}(?:(?:,|\{,\}|,?\\[!,]\s*|[ ])\d{3})+|\d+)"
_NO_UNITS = (  # functions, and words that make another number of one
    "and|or|to|than|not|sin|cos|tan|cot|sec|csc|log|exp|sqrt|arc|mod|pi|theta|alpha|beta|gamma|infinity|hundred|thousand|"
    "million|billion|trillion|dozen|half|halves|thirds?|fourths?|quarters?|fifths?|squared|cubed|factorial|choose|over|"
    "divided|times|plus|minus|negative|below|root"
)
_SHORT = r"(?:[kcmn]?m|[mk]?[gl]|m?L|mi|in|ft|lbs?|oz|hr|s)"  # units that could be symbols, if no space stood before
_NUMBER = re.compile(
    rf"""
    (?! \( [^)]* , ) \(? (?P<sign>[-+]?) \s*
    (?: (?: (?P<mixed>{_WHOLE}) \s+ )? (?P<upper>{_WHOLE}) \s*/\s* (?P<lower>{_WHOLE})    # 1/2 or 6 1/2
      | (?P<number>{_WHOLE}? (?:\.\d+)?) (?: [eE] (?P<exponent>[-+]?\d+) )? )              # 1,400 or 2.5 or 2e3
    \s* (?P<percent>\\?%|percent\b)? \)?
    \s* (?: \( [^\d()]* \)                                                                 # (pears)
      | (?! (?:{_NO_UNITS}) \b )
        (?: (?<=\s) (?: [A-Za-z]{{3,}} | an? \s+ [A-Za-z]{{3,}} | {_SHORT} ) | / \s* [A-Za-z]+ | \^\\circ \s* [CF] )
        (?![A-Za-z]) [A-Za-z\s.'/-]* (?:\^\{{?[23]\}}?)? )?
    """,
    re.VERBOSE,
)
# What math-verify reads in part or as something else: times, dates and ratios, numbers side by side, two decimal
# points, numbers in another base, repeating decimals, what is not equal, an operator without its right side.
_MISREAD = re.compile(
    r"\d\s*:\s*\d|\d-\d+-\d|(?<![_^\d.])\d[\d.]*\s+\d|\d\.\d+\.\d|\d_|\\overline|\\dot|\\n(?:eq?|ot)(?![a-z])|[-+*/^=]$"
)
_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|exp|max|min|gcd|lcm|mod|det|lim|and"


@functools.lru_cache(4096)  # a row's own answer is read for each completion of its group
def _read(text):
    number = _NUMBER.fullmatch(text)
    if number and (number["upper"] or number["number"]):
        if number["number"] and number["number"].isdecimal() and not number["exponent"] and not number["percent"]:
            return sympy.Integer(number["sign"] + number["number"])
        text = _number_in_latex(number)
    elif _MISREAD.search(text) or _is_prose(text):
        return None
    parts = _EQUALS.split(text)
    if len(parts) > 1 and not re.search("[,;]", text):  # 5+9=14 says 14, but 8=9 says nothing
        values = [_parse(part) for part in parts]
        if all(getattr(value, "is_number", False) for value in values):
            return values[-1] if all(verify([values[-1]], [v], timeout_seconds=None) for v in values) else None
    return _parse(text)


def _number_in_latex(number):
    digits = {name: re.sub(r"[^\d.]", "", number[name] or "") for name in ("mixed", "upper", "lower", "number")}
    text = rf"\frac{{{digits['upper']}}}{{{digits['lower']}}}" if digits["upper"] else digits["number"]
    text = digits["mixed"] + text
    text += rf" \times 10^{{{number['exponent']}}}" if number["exponent"] else ""
    return number["sign"] + text + (r"\%" if number["percent"] else "")


def _is_prose(text):
    """Whether an answer has words that are no unit and no function, or nothing that mathematics is made of."""
    symbols = re.sub(r"\\(?:begin|end)\s*\{\w+\}", "", text)
    symbols = re.sub(r"\\(?:text\w*|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?", "", symbols).strip() or symbols
    symbols = re.sub(rf"\\[A-Za-z]+|(?<![A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z])", r"\\", symbols)
    return bool(re.search("[A-Za-z]{3}", symbols)) or not re.search(r"[\d+*/^=<>\\|!,-]", symbols)


def _parse(text):
    parsed = parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed else None


def _is_equation(value):
    return isinstance(value, sympy.Eq)


def _scale(value):
    """A power of ten that makes a number large enough for math-verify, which compares six decimals; 0 if it is none."""
    if not getattr(value, "is_number", False) or not value.is_finite or not value.is_real:
        return 0
    size = abs(value.evalf(3))
    return 10 ** -sympy.floor(sympy.log(size, 10)) if 0 < size < 1e-3 else 1
