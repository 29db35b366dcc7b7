"""Rule rewards: the file to edit for a task of your own.

A reward is a function of (prompt, completion, row) that returns a number; row is the prompt's line of the data file, so
`row["answer"]` is its answer. Its name is what the constant REWARDS says: `"exact_match"`, or with weights
`"reward_model 1.0, exact_match 0.5"`. `reward_model` stands for the model of the constant REWARD_MODEL.
"""

import math

from configs import InputError


def exact_match(prompt, completion, row):
    """1.0 if the text after the last `#` is the row's answer, else 0.0."""
    _, marker, answer = completion.rpartition("#")
    return float(bool(marker) and answer.strip() == str(row["answer"]).strip())


def parse_rewards(text, name="REWARDS"):
    """`"reward_model 1.0, exact_match 0.5"` -> {"reward_model": 1.0, "exact_match": 0.5}; a weight left out is 1."""
    weights = {}
    for part in text.split(","):
        words = part.split()
        try:
            reward, weight = words if len(words) == 2 else (*words, 1.0)
            weights[reward] = float(weight)
        except ValueError:
            raise InputError(f'{name} = {text!r}: cannot read {part!r}; write "name weight, name weight"') from None
        if not math.isfinite(weights[reward]):
            raise InputError(f"{name} = {text!r}: the weight of {reward} is not a finite number")
        if reward != "reward_model":
            find_reward(reward, name)
    return weights


def find_reward(reward, name):
    """The function of that name in this file."""
    known = [key for key, value in globals().items() if callable(value) and value.__module__ == __name__]
    known = sorted(set(known) - {"parse_rewards", "find_reward"})
    if reward not in known:
        raise InputError(f"{name}: there is no reward {reward!r}; rewards.py has {', '.join(known)}")
    return globals()[reward]
