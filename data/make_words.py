"""Word problems of one step for a small chat model: they ask for a sum or a difference of two numbers.

    python data/make_words.py            # a second; writes data/words/{train,test}.jsonl

A row is a chat: an empty system message, a solved example, and a problem. The example shows the form of an answer,
because a model of 135 M parameters follows an example where it does not follow a description. All rows have the same
example. The system message is empty because SmolLM2's chat template would otherwise add one of 20 tokens.

Numbers are chosen so that the model is sometimes right. It never gets a difference right that needs borrowing, such as
21 − 4. What is never sampled is never rewarded, so such problems are left out.

Train and test share no sum: if 5 + 9 is in one of them, then 9 + 5, 14 − 5 and 14 − 9 are not in the other.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"test": 256, "train": 1024}
LARGEST = 29  # of the terms of a sum; the smallest is 2, because one of a thing would need another grammar
HELD_OUT = 0.15  # share of the sums that only the test has
NAMES = "Ann Ben Carla Dan Emma Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul".split()
THINGS = "apples balls books cards coins cups eggs flags keys marbles pens plums shells stamps stones toys".split()
MORE = "gets {b} more", "finds {b} more", "buys {b} more", "takes {b} more"
FEWER = "loses {b}", "sells {b}", "gives {b} to {other}", "drops {b} of them"
STORY = "{name} has {a} {things} and {event}. How many {things} does {name} have now?"
EXAMPLE = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Sam has 14 nuts and gets 5 more. How many nuts does Sam have now?"},
    {"role": "assistant", "content": "14 + 5 = 19\n#### 19"},
]


def sums(rng):
    """Returns the sums of the test and of the train problems, {name: [(a, b)]}, without that of the example."""
    every = [(a, b) for a in range(2, LARGEST + 1) for b in range(2, a + 1) if (a, b) != (14, 5)]
    rng.shuffle(every)
    held_out = round(HELD_OUT * len(every))
    return {"test": every[:held_out], "train": every[held_out:]}


def row_of(rng, a, b):
    """Returns a row whose problem is a + b, or one of its two differences if that needs no borrowing."""
    name, other = rng.sample(NAMES, 2)
    a, b = rng.sample((a, b), 2)
    if rng.random() < 0.5 and (a + b) % 10 >= b % 10:
        start, events, answer = a + b, FEWER, a
    else:
        start, events, answer = a, MORE, a + b
    event = rng.choice(events).format(b=b, other=other)
    story = STORY.format(name=name, a=start, things=rng.choice(THINGS), event=event)
    return {"prompt": [*EXAMPLE, {"role": "user", "content": story}], "answer": str(answer)}


def make_words(folder, seed):
    """Writes train.jsonl and test.jsonl, in which no problem comes twice."""
    rng = random.Random(seed)
    for name, some in sums(rng).items():
        lines = {}
        while len(lines) < SIZES[name]:
            lines[json.dumps(row_of(rng, *rng.choice(some))) + "\n"] = None
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    (HERE / "words").mkdir(exist_ok=True)
    make_words(HERE / "words", seed=0)
