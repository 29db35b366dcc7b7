"""Compares the answer that a text marks with the right one: as mathematics if both are, or else as words.

math-verify reads the mathematics. It was made to look for mathematics in a text, so it would take 7 out of "6 or 7" and
3 out of "3\\sqrt{2}". Here it gets one whole answer at a time, and only if it would read all of that answer.
"""

import functools
import re

import sympy
from math_verify import parse, verify

from inputs.answer_marks import marked_answers, marks

_MOST_WORDS = 5  # a longer answer in words is an explanation, which no completion repeats


# ---- Whether a completion is right


def is_right(gold, completion):
    """Returns whether the answer that a completion marks is the row's. gold: the row's answer, marked or bare.

    If there are several marks, the last one counts. But Markdown headings use `####`, too. So if gold is mathematics,
    the last mark that is mathematics counts. Otherwise the last mark that cannot be a heading counts.
    """
    gold = (marked_answers(gold) or [gold])[-1]
    if read(gold) is not None:
        answers = [answer for answer in marked_answers(completion) if read(answer) is not None]
    elif len(gold.split()) > _MOST_WORDS:
        return False
    else:
        answers = [answer for answer, may_be_heading in marks(completion) if not may_be_heading]
    return bool(answers) and same_answer(gold, answers[-1])


# ---- Whether two answers are the same


def same_answer(gold, answer):
    """Returns whether an answer equals the right one: as mathematics if both are, or else as words."""
    gold, answer = _clean(gold), _clean(answer)
    if _words(gold) == _words(answer):
        return True
    gold_names, answer_names = _names(gold), _names(answer)
    if gold_names or answer_names:  # `x = 3, y = 2` and `(3, 2)` are the same answer, but `(2, 3)` is not
        if gold_names and answer_names and gold_names.keys() != answer_names.keys():
            return False
        gold, answer = _in_order(gold, gold_names), _in_order(answer, answer_names)
    elif bool(_EQUALS.search(gold)) != bool(_EQUALS.search(answer)):  # `x = 5` and `5` are the same answer
        gold, answer = _without_name(gold), _without_name(answer)
    gold, answer = _read(gold), _read(answer)
    if gold is None or answer is None or _is_equation(gold) != _is_equation(answer):
        return False
    if isinstance(gold, sympy.Rational) and isinstance(answer, sympy.Rational):
        return gold == answer
    scale = _scale(gold) if _scale(answer) else 1
    options = {"timeout_seconds": None, "allow_set_relation_comp": True}  # the time limit of all rules ends it
    return verify(gold * scale, answer * scale, **options) if scale > 1 else verify([gold], [answer], **options)


def read(text):
    """Returns an answer as math-verify reads it, a sympy object. Returns None if a part of it is no mathematics."""
    return _read(_without_name(_clean(text)))


_IN_LATEX = {
    "−": "-",
    "–": "-",
    "—": "-",
    "~": " ",
    "½": r" 1/2",
    "¼": " 1/4",
    "¾": " 3/4",
    "×": r"\times ",
    "÷": "/",
    "²": "^2",
    "³": "^3",
    "°": r"^\circ ",
    "π": r"\pi ",
}
_IN_LATEX |= {"∞": r"\infty "} | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms
_WRAPPED = re.compile(
    r"\\(?:text|math)?(?:text|bf|rm|it|tt|box|boxed|fbox|mbox|normal|boldsymbol|underline)\s*\{([^{}]*)\}"
)


def _clean(text):
    """Returns an answer without decoration: dollar signs, Markdown, a full stop, or a LaTeX command around it."""
    text = re.sub(r"\\q?quad(?![A-Za-z])", " ", text.replace("\\varnothing", "\\emptyset"))
    text = re.sub(r"\\([dtc]?frac)\s*(\d)\s*(\d)(?!\d)", r"\\\1{\2}{\3}", text)
    text = re.sub(r"\\?[$€£¥₹¢]|(?<!\\)\\[()\[\]]", "", text.translate(str.maketrans(_IN_LATEX)))
    before = None
    while text != before:
        before, text = text, text.strip(" \t\n*`").removesuffix(".").rstrip("\\")
        if whole := _WRAPPED.fullmatch(text):
            text = whole[1]
        if letter := re.fullmatch(r"\(?([A-Za-z])[).]?", text):  # a choice such as (B), B) or B.
            text = letter[1]
    return re.sub(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z]))", r"\\sqrt{\1\2}", text)


def _words(text):
    """Returns an answer for the comparison as text.

    It has no spaces except between numbers, no dots except decimal points, no upper case in words, and no braces around
    a base.
    """
    text = re.sub(r"\\(?:text|mbox|mathrm)\s*\{([^{}]*)\}|(?<!\d)\.|\.(?!\d)", r"\1", text)
    text = re.sub(r"[^\W\d_]{2,}|^[A-J]$", lambda word: word[0].casefold(), text)  # x and X are two symbols
    text = re.sub(r"(?<=\d),\s+(?=\d)", ";", text)  # two numbers; 1,000 is one number
    text = re.sub(r"(?<=\d)\s+(?=\d)", "_", re.sub(r"_\{(\w+)\}", r"_\1", text))
    return re.sub(r"\\[!,;:> ]|\s", "", text)


_EQUALS = re.compile(r"(?<![<>!:\\])=|\\in(?![a-z])")
_NAME = re.compile(
    r"(^|,|;|\bor\b|\band\b)\s*"
    r"(?P<name>[^\d=<>+*/^,;-]*[A-Za-z][^\d=<>+*/^,;-]*?|[A-Za-z]\([^()=]*\)|[A-Za-z]_\{?\w+\}?"
    r"|\([a-z](?:\s*,\s*[a-z])+\))\s*(?:=|\\in(?![a-z]))"
)


def _without_name(text):
    """Returns `x = 5` without its name. The name may also be f(x), a_1 or a word, as in `x = 1 or x = 2`."""
    names = {match["name"].strip() for match in _NAME.finditer(text)}
    return _NAME.sub(r"\1 ", text).strip() if len(names) == 1 else text


_NAMED = re.compile(r"\s*([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*([^=]+?)\s*")


def _names(text):
    """Returns {"x": "3", "y": "2"} for `x = 3, y = 2`. Returns {} for any other text, and for a single name."""
    parts = [_NAMED.fullmatch(part) for part in re.split(r",|;|\\text\s*\{\s*and\s*\}|\band\b", text)]
    names = {part[1]: part[2] for part in parts if part}
    return names if len(names) == len(parts) > 1 else {}


def _in_order(text, names):
    """Returns a tuple as text: the named values, sorted by name, or the items of a list."""
    values = ", ".join(names[name] for name in sorted(names)) if names else re.sub(r"\band\b|;", ",", text)
    return values if values.startswith(("(", "\\left")) else f"({values})"


_WHOLE = r"(?:[1-9]\d{0,2}(?:(?:,|\{,\}|,?\\[!,]\s*|[ ])\d{3})+|\d+)"
_NO_UNITS = (  # words that change a number, names of functions and symbols, and words of a sentence
    "and|or|to|than|not|hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|fourths?|quarters?|fifths?|"
    "squared|cubed|factorial|choose|over|divided|times|plus|minus|negative|below|root|zero|one|two|three|four|five|six|"
    "seven|eight|nine|ten|eleven|twelve|\\w+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|"
    "sin|cos|tan|cot|sec|csc|log|exp|sqrt|arc|mod|infinity|[abcnxyz]{3}|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|"
    "pi|rho|sigma|tau|phi|chi|psi|omega|is|are|was|were|but|if|because|since|so|actually|maybe|perhaps|wrong|false|true"
)
_SHORT = r"(?:[kcmn]?m|[mk]?[gl]|m?L|mi|in|ft|lbs?|oz|hr|s)"  # units that could be symbols without a space before them
_NUMBER = re.compile(
    rf"""
    (?! \( [^)]* , ) \(? (?P<sign>[-+]?) \s*
    (?: (?: (?P<mixed>{_WHOLE}) \s+ )? (?P<upper>{_WHOLE}) \s*/\s* (?P<lower>{_WHOLE})    # 1/2 or 6 1/2
      | (?P<number>{_WHOLE}? (?:\.\d+)?) (?: [eE] (?P<exponent>[-+]?\d+) )? )              # 1,400 or 2.5 or 2e3
    \s* (?P<percent>\\?%|percent\b)? \)?
    \s* (?: \( [^\d()]* \)                                                                 # (pears)
      | (?! (?i: .* \b (?:{_NO_UNITS}) \b ) )
        (?: (?<=\s) (?: (?:(?:an?|of|per|in) \s+)? [A-Za-z]{{3,}} | {_SHORT} ) | / \s* [A-Za-z]+ | \^\\circ \s* [CF] )
        (?![A-Za-z]) [A-Za-z\s.'/-]* (?:\^\{{?[23]\}}?)? )?
    """,
    re.VERBOSE,
)
# Texts that math-verify reads in part or as something else: times, dates and ratios, numbers side by side, two decimal
# points, numbers in another base, an operator without its right side, and one bar without the other.
_MISREAD = re.compile(r"\d\s*:\s*\d|\d-\d+-\d|(?<![_^\d.])\d[\d.]*\s+\d|\d\.\d+\.\d|\d_|[-+*/^=]$|^[^|]*\|[^|]*$")
# The commands that math-verify understands. It skips others: it reads `3 \to 4` as 4.
_COMMANDS = (
    "[dtc]?frac|over|sqrt|[dt]?binom|left|right|begin|end|text[a-z]*|mbox|math(?:rm|bf|bb|cal|it)|displaystyle|cdot|times|div|"
    "pm|mp|infty|cup|setminus|emptyset|leq?|geq?|lt|gt|in|circ|[lr](?:floor|ceil|vert|brace|brack)|[lr]?vert|mid|mod|"
    "(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|max|min|gcd|(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|"
    "iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)"
)
_SYMBOLS = re.compile(
    rf"(?:\\(?:{_COMMANDS})(?![A-Za-z])|\\[,;:!{{}}%\\ ]|[\w\s+*/^=<>()\[\]{{}}|,.;:!&%-])*", re.ASCII
)
_FUNCTIONS = r"sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|exp|max|min|gcd|lcm|mod|det|lim|and"
_IN_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|mathrm)\s*\{([^{}]*)\}(?:\^\{?\d\}?)?")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\s*\{(\d+)\}")


@functools.lru_cache(4096)  # a row's answer is read for each completion of its group
def _read(text):
    number = _NUMBER.fullmatch(text)
    if number and (number["upper"] or number["number"]):
        if number["number"] and number["number"].isdecimal() and not number["exponent"] and not number["percent"]:
            return sympy.Integer(number["sign"] + number["number"])
        text = _number_in_latex(number)
    elif repeating := _REPEATING.fullmatch(text):
        sign, whole, fixed, again = repeating.groups()
        repeated = int(whole + fixed + again) - int(whole + fixed or 0)
        return sympy.Rational(repeated, (10 ** len(again) - 1) * 10 ** len(fixed)) * (-1 if sign else 1)
    elif _is_prose(text) or not _SYMBOLS.fullmatch(symbols := _IN_TEXT.sub(_in_between, text)):
        return None
    elif _MISREAD.search(re.sub(r"\\[,;:! ]", " ", symbols)):
        return None
    elif "\\\\" in text and "\\begin" not in text or r"\mid" in text and r"\{" not in text:
        return None
    parts = _EQUALS.split(text)
    if len(parts) > 1 and not re.search("[,;]", text):  # 5+9=14 means 14; 8=9 means nothing
        values = [_parse(part) for part in parts]
        if all(getattr(value, "is_number", False) for value in values):
            return values[-1] if all(verify([values[-1]], [v], timeout_seconds=None) for v in values) else None
    return _parse(text)


def _in_between(text):
    """Returns what replaces a \\text{...} within mathematics: a comma for `and` or `or`, a space for a unit."""
    return " , " if text[1].strip() in ("and", "or") else " "


def _number_in_latex(number):
    digits = {name: re.sub(r"[^\d.]", "", number[name] or "") for name in ("mixed", "upper", "lower", "number")}
    text = rf"\frac{{{digits['upper']}}}{{{digits['lower']}}}" if digits["upper"] else digits["number"]
    text = digits["mixed"] + text
    text += rf" \times 10^{{{number['exponent']}}}" if number["exponent"] else ""
    return number["sign"] + text + (r"\%" if number["percent"] else "")


def _is_prose(text):
    """Returns whether an answer has words that are no unit and no function, or has nothing mathematical."""
    words = [word.strip() for word in _IN_TEXT.findall(text)]
    if any(re.search(rf"(?i)\b(?:{_NO_UNITS})\b", word) for word in words if word not in ("and", "or")):
        return True
    symbols = re.sub(r"\\(?:begin|end)\s*\{\w+\}", "", text)
    symbols = _IN_TEXT.sub("", symbols).strip() or symbols
    symbols = re.sub(rf"\\[A-Za-z]+|(?<![A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z])", r"\\", symbols)
    return bool(re.search("[A-Za-z]{3}", symbols)) or not re.search(r"[\d+*/^=<>\\|!,-]", symbols)


def _parse(text):
    parsed = parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None)
    return parsed[0] if parsed else None


def _is_equation(value):
    return isinstance(value, sympy.Eq)


def _scale(value):
    """Returns a power of ten that makes a small number large enough for math-verify, which compares six decimals.

    Returns 1 if the number needs none, and 0 if the value is no finite real number.
    """
    if not getattr(value, "is_number", False) or not value.is_finite or not value.is_real:
        return 0
    size = abs(value.evalf(3))
    return 10 ** -sympy.floor(sympy.log(size, 10)) if 0 < size < 1e-3 else 1
