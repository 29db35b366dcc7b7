"""Finds the rules by name, tests them and whether they can read the answers, and sums their weighted scores."""

import contextlib

import torch

from configs import HERE, InputError
from engine.processes import from_all, own, size
from engine.rollouts import on_last_token
from scoring.rule_processes import TAKES, checked, parameters_of, rule_of, score_by_rule

RULES = HERE / "rewards.py"
MOST_FAILURES = 0.5  # share of a batch's scores that may fail
MOST_UNREADABLE = 0.1  # share of the data's rows whose own answer a rule may call wrong
LARGEST_WEIGHT = 1e6  # times the largest score it fits in float32
FORMS = ("#### {}", "\\boxed{{{}}}", "Answer: {}", "<answer>{}</answer>", "{}")  # the forms in which answers are tried
OF_ANSWERS = ("exact_match", "math")  # shipped rules that compare with row["answer"]


# ---- Names and weights


def parse_rewards(text, name="REWARDS"):
    """Turns `"reward_model 1.0, exact_match 0.5"` into {"reward_model": 1.0, "exact_match": 0.5}.

    A missing weight is 1. name: the constant that holds the text. Raises InputError if the text cannot be used.
    """
    weights = {}
    for part in text.split(","):
        words = part.split()
        try:
            reward, weight = words if len(words) == 2 else (*words, 1.0)
            weight = float(weight)
        except ValueError:
            raise InputError(f'{name} = {text!r}: cannot read {part!r}; write "name weight, name weight"') from None
        if not abs(weight) <= LARGEST_WEIGHT:  # or it is NaN
            most = f"not a finite number up to {LARGEST_WEIGHT:g}"
            raise InputError(f"{name} = {text!r}: the weight of {reward} is {most}; give one such as 0.5")
        if reward != "reward_model":
            rule, short = find_reward(reward, name), reward.removesuffix("_reward")
            reward = short if rule_of(rules_module(), short) is rule else reward  # math_reward is the rule math
        if reward in weights:
            raise InputError(f"{name} = {text!r}: {reward} is there twice; leave out one")
        weights[reward] = weight
    if not any(weights.values()):
        raise InputError(f"{name} = {text!r}: all weights are zero, which teaches nothing; give one such as 1.0")
    return weights


def find_reward(reward, name):
    """Returns the rule of that name in rewards.py. Raises InputError if there is none.

    name: the constant that asks for the rule, for the message.
    """
    rules = rules_module()
    if rule := rule_of(rules, reward):
        return rule
    found = getattr(rules, reward, None) or getattr(rules, f"{reward}_reward", None)
    if callable(found):
        has = ", ".join(parameters_of(found) or ["nothing that can be seen"])
        raise InputError(f"{name}: {reward!r} of rewards.py takes ({has}); a rule must take (prompt, completion, row)")
    have = sorted(key.removesuffix("_reward") for key, value in vars(rules).items() if parameters_of(value) == TAKES)
    raise InputError(
        f"{name}: rewards.py has no rule {reward!r}, it has {', '.join(have)}; name one of them, or add yours"
    )


def rules_module():
    """Returns the module rewards.py. Raises InputError if it cannot be imported."""
    try:
        import rewards
    except SyntaxError as error:
        raise InputError(f"{error.filename}, line {error.lineno}: {error.msg}; mend it there") from None
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise InputError(f"{RULES} cannot be imported: {type(error).__name__}: {error}; mend it there") from None
    if type(getattr(rewards, "SECONDS", None)) not in (int, float) or rewards.SECONDS <= 0:
        raise InputError(f"SECONDS of {RULES} must be a positive number: how long a rule may take; mend it there")
    return rewards


# ---- Checks before the first step


def check_scoring(c, reward_names, reward_model, train_rows, eval_rows):
    """Tries each reward on prompts and their answers. Returns the held-out rows that EVAL_REWARD concerns.

    Raises InputError if a reward cannot score them. c: the script's constants, from configs.snapshot.
    """
    if reward_model is not None and c.USE_SEQUENCE_LEVEL_REWARD:
        reward_model.check(train_rows[0])
    if c.SELFTEST:  # its table shows the failures
        return eval_rows
    check_rules({*reward_names, c.EVAL_REWARD} - {"reward_model"}, train_rows)
    for name in sorted({*OF_ANSWERS} & {*reward_names}):
        check_answers(name, "REWARDS", train_rows, "PROMPTS")
    eval_rows = check_answers(c.EVAL_REWARD, "EVAL_REWARD", eval_rows, "the held-out ones")
    if not eval_rows:
        raise InputError(f"EVAL_REWARD = {c.EVAL_REWARD!r} returned None for each held-out prompt; give another")
    rule, answer = Rewards({c.EVAL_REWARD: 1.0}), train_rows[0]["answer"]
    with contextlib.suppress(InputError):  # raised if too many fail; check_rules has judged that
        rule(train_rows[:1] * 3, [answer, f"#### {answer}", ""])
    check_right(rule.scored[c.EVAL_REWARD], c.EVAL_REWARD)
    return eval_rows


def check_rules(names, rows, file=RULES):
    """Raises InputError if a rule has no score for any of some completions that hold the first row's answer.

    Such a rule is not finished, and a person should know it before a step has sampled anything. If a rule does not
    concern the first row, it is tried on other rows.
    """
    answer = rows[0]["answer"]
    texts = [form.format(answer) for form in FORMS] + [""]
    for name in sorted(names):
        scores = score_by_rule(file, name, rows[:1] * len(texts), texts)
        if all(score is None for score, _ in scores):
            some = rows[:: max(1, len(rows) // 100)]
            scores = score_by_rule(file, name, some, [row["answer"] for row in some])
            if all(score is None for score, _ in scores):
                tried = f"returned None for each of {len(some)} prompts with their answers"
                raise InputError(f"{name}, a rule of {file}, {tried}; mend it, perhaps it lacks a return")
        if all(problem for _, problem in scores):
            raise InputError(f"{name}, a rule of {file}, {scores[0][1]}, for the first prompt and its answer; mend it")


def check_answers(rule, name, rows, source, file=RULES):
    """Scores each row's own answer, in several forms, and returns the rows that the rule concerns.

    A rule that says what is right must give 1 to a row's own answer. This function prints how often it does not, with
    an example. It raises InputError if that is more than MOST_UNREADABLE of the rows. A user's own rule may expect
    another form, so there is no message if such a rule gives 1 to no answer at all. name: the constant that names the
    rule, for the message. source: the origin of the rows, for the message.
    """
    concerned, wrong = rows, rows
    for form in FORMS:
        scores = score_by_rule(file, rule, wrong, [form.format(row["answer"]) for row in wrong])
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


def check_right(scores, name):
    """Raises InputError unless all scores of EVAL_REWARD lie in [0, 1], so that their mean is an accuracy.

    name: the rule that EVAL_REWARD names.
    """
    if outside := [score for score in scores if not 0 <= score <= 1]:
        raise InputError(
            f"EVAL_REWARD = {name!r} gave {outside[0]:g}, which is no accuracy; give --eval-reward a rule that returns "
            "1 for what is right and 0 for what is not, such as exact_match"
        )


# ---- The weighted sum


class Rewards:
    """The weighted sum of some rewards, computed safely.

    weights: {name: weight}. reward_model: a model of scoring/reward_models.py, if "reward_model" is among the names.
    file: the file that holds the rules. log: a function that takes a list of failures; it is set once a run has a
    folder. keep: whether scores are kept for the next report.
    """

    def __init__(self, weights, reward_model=None, file=RULES, keep=True):
        self.weights, self.reward_model, self.file, self.keep = weights, reward_model, str(file), keep
        self.log, self.scored = None, {name: [] for name in weights}
        self.failures = []

    def __call__(self, rows, texts, rollouts=None):
        """Returns one number per completion. rollouts: needed by a reward model that scores tokens.

        Raises InputError if more than MOST_FAILURES of the scores fail.
        """
        total, failed, count = [0.0] * len(texts), [], 0

        def fail(i, name, problem):
            failed.append({"reward": name, "prompt": rows[i]["prompt"], "completion": texts[i], "problem": problem})

        part = rollouts if rollouts is None or size() == 1 else rollouts.select(torch.tensor(own(range(len(texts)))))
        for name, weight in self.weights.items():
            scores = self.scores(name, own(rows), own(texts), part)
            scores = sum(from_all(scores, "scoring"), [])
            for i, (score, problem) in enumerate(scores):
                if score is not None:
                    total[i] += weight * score
                    count += 1
                if problem:
                    fail(i, name, problem)
            self.scored[name] += [score for score, _ in scores if score is not None and self.keep]
        self.failures += failed if self.keep else []
        if self.log is not None and failed:
            self.log(failed)
        if len(failed) > MOST_FAILURES * count:
            first = failed[0]
            raise InputError(
                f"{len(failed)} of {count} scores failed: {first['reward']} {first['problem']} for "
                f"{first['completion'][:60]!r}; mend it in rewards.py, see reward_failures.jsonl"
            )
        return total

    def scores(self, name, rows, texts, rollouts):
        """Returns (score, problem) of each completion, by one of the rewards. Either may be None."""
        if name != "reward_model":
            return score_by_rule(self.file, name, rows, texts)
        return [checked(score) for score in self.reward_model(rows, texts, rollouts)]

    def of(self, rollouts):
        """Returns the weighted sums, (B,). If the reward model scores tokens, (B, T), with the others on the last."""
        totals = torch.tensor(self(rollouts.prompts, rollouts.texts, rollouts))
        token_scores = getattr(self.reward_model, "token_scores", None)  # (rows of this process, T)
        if token_scores is None:
            return totals
        of_tokens = self.weights["reward_model"] * torch.cat(from_all(token_scores, "scoring"))  # (B, T)
        return of_tokens + on_last_token(totals - of_tokens.sum(1), rollouts)

    def report(self):
        """Returns metrics since the last report.

        They are each reward's mean, the share of scores that failed, and the metrics of the reward model.
        """
        scores = sum(len(values) for values in self.scored.values())
        means = {name: sum(values) / len(values) for name, values in self.scored.items() if values}
        metrics = {f"reward_{name.removeprefix('reward_')}": mean for name, mean in means.items()}
        metrics["reward_failures"] = len(self.failures) / max(1, scores)
        self.failures, self.scored = [], {name: [] for name in self.weights}
        return metrics | (self.reward_model.report() if self.reward_model else {})
