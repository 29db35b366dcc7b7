"""Word problems of one step for a small chat model: they ask for a sum or a difference of two numbers.

    python data/make_words.py            # a second; writes data/words/{train,test}.jsonl

A row is a chat: an empty system message, two solved examples, and a problem. The examples show the form of an answer,
because a model of 135 M parameters follows an example where it does not follow a description. All rows have the same
ones. The system message is empty because SmolLM2's chat template would otherwise add one of 20 tokens.

Numbers are small, so that the model is sometimes right, because what is never sampled is never rewarded. It gets few
differences right that need borrowing, such as 21 − 4, or whose second number has two digits. Of those that need
borrowing it learns less than half in as many steps (docs/log.md).

Train and test share no sum: if 5 + 9 is in one of them, then 9 + 5, 14 − 5 and 14 − 9 are not in the other.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"test": 256, "train": 1024}
LARGEST = 12  # of the terms of a sum; the smallest is 2, because one of a thing would need another grammar
LARGEST_TAKEN = 9  # of what is taken away
HELD_OUT = 0.25  # share of the sums that only the test has
DIFFERENCES = 1 / 4  # share of the problems
NAMES = "Ann Ben Carla Dan Emma Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul".split()
THINGS = "apples balls books cards coins cups eggs flags keys marbles pens plums shells stamps stones toys".split()
MORE = (
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in a box. {name} puts {b} more into it. How many {things} are in the box now?",
    "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
    "{name} finds {a} {things} in the morning and {b} in the evening. How many {things} does {name} find?",
)
FEWER = (
    "{name} has {a} {things} and loses {b} of them. How many {things} does {name} have left?",
    "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?",
    "There are {a} {things} in a box. {name} takes {b} out. How many {things} are left in the box?",
    "{name} had {a} {things} and sold {b}. How many {things} does {name} still have?",
)
EXAMPLES = [
    {"role": "system", "content": ""},
    {"role": "user", "content": MORE[0].format(name="Sam", a=14, things="nuts", b=5)},
    {"role": "assistant", "content": "14 + 5 = 19\n#### 19"},
    {"role": "user", "content": FEWER[0].format(name="Eva", a=17, things="pins", b=4)},
    {"role": "assistant", "content": "17 - 4 = 13\n#### 13"},
]


def sums(rng):
    """Returns the sums of the test and of the train problems, {name: [(a, b)]}.

    None is that of an example, because the examples have a term above LARGEST.
    """
    pairs = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, a + 1)]
    rng.shuffle(pairs)
    held_out = round(HELD_OUT * len(pairs))
    return {"test": pairs[:held_out], "train": pairs[held_out:]}


def can_be_taken(a, b):
    """Returns whether b may be taken from a + b: b has one digit, and nothing is borrowed."""
    return b <= LARGEST_TAKEN and (a + b) % 10 >= b % 10


def row_of(rng, sums_of_split):
    """Returns a row whose problem is one of the sums (a, b), or a difference: a + b, of which b are taken away."""
    pairs = [pair for a, b in sums_of_split for pair in ((a, b), (b, a))]
    more = rng.random() >= DIFFERENCES
    a, b = rng.choice([(a, b) for a, b in pairs if more or can_be_taken(a, b)])
    name, other = rng.sample(NAMES, 2)
    numbers = {"a": a if more else a + b, "b": b}
    text = rng.choice(MORE if more else FEWER).format(name=name, other=other, things=rng.choice(THINGS), **numbers)
    return {"prompt": [*EXAMPLES, {"role": "user", "content": text}], "answer": str(a + b if more else a)}


def make_words(folder, seed):
    """Writes train.jsonl and test.jsonl, in which no problem comes twice."""
    rng = random.Random(seed)
    for name, sums_of_split in sums(rng).items():
        lines = {}
        while len(lines) < SIZES[name]:
            lines[json.dumps(row_of(rng, sums_of_split)) + "\n"] = None
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    (HERE / "words").mkdir(exist_ok=True)
    make_words(HERE / "words", seed=0)
