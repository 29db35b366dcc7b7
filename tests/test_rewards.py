"""Rule rewards: the scores of the shipped ones, and that no rule, whatever it does, takes a run with it."""

import datetime
import functools
import importlib
import json
import os
import re
import signal
import sys
import time

import pytest
from conftest import scores_while_training

import configs
import gspo
import rewards
from scoring import rule_processes, rules

RULES = """
import os, sys, time

def rule(prompt, completion, row):
    if completion == "raise":
        raise ValueError("no")
    if completion == "exit":
        raise SystemExit("bye")
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(100)
    if completion == "count":
        return 9 ** 9 ** 9 ** 9
    if completion == "die":
        os._exit(3)
    if completion == "eat":
        return len(bytearray(64 << 30))
    if completion == "print":
        print("not an answer")
        return True
    if completion == "bent":
        sys.stdout.close()
        return 0.25
    return {"nan": float("nan"), "infinite": float("inf"), "list": [1], "text": "good"}.get(completion, row["worth"])
"""
FAILING = {
    "raise": "raised ValueError: no",
    "exit": "raised SystemExit: bye",
    "hang": "took longer than 1 s",
    "sleep": "took longer than 1 s",
    "count": "took longer than 1 s",
    "die": "ended its process",
    "eat": "raised MemoryError",
    "nan": "returned nan",
    "infinite": "returned inf",
    "list": "returned [1]",
    "text": "returned 'good'",
}


@pytest.fixture
def rules_file(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path / "rules.py"


def row(worth=0.5):
    return {"prompt": "p", "answer": "a", "worth": worth, "prompt_ids": [1]}


def test_whatever_a_rule_does_the_others_are_scored_and_the_failures_are_named(rules_file, tmp_path):
    texts = [text for failing in FAILING for text in (failing, "fine")] + ["print", "bent"] + ["fine"] * 30
    scorer = rules.Rewards({"rule": 2.0}, file=rules_file)
    logged = []
    scorer.log = logged.extend
    expected = [0.0 if text in FAILING else {"print": 2.0, "bent": 0.5}.get(text, 1.0) for text in texts]
    assert scorer([row()] * len(texts), texts) == expected
    assert {failure["completion"] for failure in logged} == set(FAILING)
    for failure in logged:
        assert failure["reward"] == "rule" and failure["problem"].startswith(FAILING[failure["completion"]])
    metrics = scorer.report()
    assert metrics["reward_failures"] == len(FAILING) / len(texts)
    assert metrics["reward_rule"] == pytest.approx(sum(expected) / 2 / len(texts))
    assert scorer([row()], ["fine"]) == [1.0] and scorer.report() == {"reward_rule": 0.5, "reward_failures": 0.0}


def test_above_the_stated_share_of_failures_it_stops(rules_file):
    scorer = rules.Rewards({"rule": 1.0}, file=rules_file)
    assert scorer([row()] * 4, ["list", "list", "fine", "fine"]) == [0.0, 0.0, 0.5, 0.5]
    with pytest.raises(configs.InputError, match="3 of 4 scores failed: rule returned .1., .* 'list'"):
        scorer([row()] * 4, ["list", "list", "list", "fine"])


def test_a_server_that_has_died_is_started_again(rules_file):
    scorer = rules.Rewards({"rule": 1.0}, file=rules_file)
    scorer([row()], ["fine"])
    os.kill(rule_processes._server_of(str(rules_file)).process.pid, signal.SIGKILL)
    assert scorer([row(0.75)], ["fine"]) == [0.75]


def test_after_timeouts_at_the_end_of_a_request_the_next_is_answered(rules_file, monkeypatch):
    """Processes that took too long are replaced while the server waits for its next request."""
    monkeypatch.setattr(rule_processes, "START", 5.0)
    scorer = rules.Rewards({"rule": 1.0}, file=rules_file)
    server = rule_processes._server_of(str(rules_file))
    scorer([row()], ["fine"])
    first = server.process
    for _ in range(3):
        assert scorer([row()] * 6, ["fine"] * 4 + ["hang"] * 2) == [0.5] * 4 + [0.0] * 2
        time.sleep(0.4)  # as a step's other phases do
    assert server.process is first


def test_a_server_that_does_not_answer_is_ended_and_asked_again_and_then_named(rules_file, monkeypatch):
    scorer = rules.Rewards({"rule": 1.0}, file=rules_file)
    scorer([row()], ["fine"])
    first = rule_processes._server_of(str(rules_file)).process
    os.kill(first.pid, signal.SIGSTOP)  # it neither reads nor writes nor ends
    monkeypatch.setattr(rule_processes, "START", 0.2)
    monkeypatch.setattr(rewards, "SECONDS", 0.0)
    with pytest.raises(configs.InputError, match="rule, a rule of .*rules.py, gave no answer in 0 s; make it faster"):
        scorer([row()] * 20_000, ["fine"] * 20_000)  # more than a pipe holds: it is not even read
    assert first.returncode == -signal.SIGKILL
    monkeypatch.undo()
    assert scorer([row(0.75)], ["fine"]) == [0.75]


def test_rules_that_do_not_load_are_one_line(tmp_path):
    (tmp_path / "bad.py").write_text("def rule(:")
    with pytest.raises(configs.InputError, match="do not load"):
        rules.Rewards({"rule": 1.0}, file=tmp_path / "bad.py")([row()], ["fine"])


# ---- Rules as people add them


KINDS = """
import datetime, functools, mmap, os
from fractions import Fraction

RESERVED = mmap.mmap(-1, 5 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # addresses, no memory

def _holds(prompt, completion, row, word):
    return float(word in completion)

class Judge:
    def __call__(self, prompt, completion, row):
        return Fraction(1, 4)

holds = functools.partial(_holds, word="#")
judge = Judge()
brief = lambda prompt, completion, row: 0.0 if len(completion) > 9 else 1.0

def some(prompt, completion, row):
    return None if row["task"] == "other" else 2.0

def none(prompt, completion, row):
    some(prompt, completion, row)

def dated(prompt, completion, row):
    return row["due"].year

def here(prompt, completion, row):
    return os.path.exists(completion)

def small(prompt, completion, row):
    return len(["x" * 50 + str(i) for i in range(20000)])  # 2 MB
"""


@pytest.fixture
def kinds(tmp_path):
    (tmp_path / "rules.py").write_text(KINDS)
    return tmp_path / "rules.py"


def test_a_rule_may_be_a_partial_an_object_or_a_lambda_and_its_memory_counts_after_loading(kinds):
    scorer = rules.Rewards(dict.fromkeys(("holds", "judge", "brief", "small"), 1.0), file=kinds)
    assert scorer([row()] * 2, ["#", "longer than that"]) == [2.25 + 20000, 0.25 + 20000] and not scorer.failures


def test_a_rule_gets_the_row_as_it_was_read_and_the_folder_that_the_run_was_started_in(kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer = rules.Rewards({"dated": 1.0, "here": 1.0}, file=kinds)
    assert scorer([row() | {"due": datetime.date(2026, 1, 2)}] * 2, ["rules.py", "no"]) == [2027, 2026]


def test_none_leaves_a_row_out_of_the_rules_mean_and_of_its_weight(kinds):
    scorer = rules.Rewards({"some": 3.0, "brief": 1.0}, file=kinds)
    tasks = [row() | {"task": task} for task in ("this", "other", "this")]
    assert scorer(tasks, ["a", "a", "longer than that"]) == [7.0, 1.0, 6.0]
    assert scorer.report() == {"reward_some": 2.0, "reward_brief": 2 / 3, "reward_failures": 0.0}
    scorer = rules.Rewards({"some": 1.0}, file=kinds)
    assert scorer(tasks, ["a"] * 3) == [2.0, 0.0, 2.0]
    assert scorer([tasks[1]] * 3, ["a"] * 3) == [0.0, 0.0, 0.0] and not scorer.failures
    scorer = rules.Rewards({"some": 1.0, "not_there": 1.0}, file=kinds)
    with pytest.raises(configs.InputError, match="2 of 3 scores failed"):  # scores of None do not count
        scorer([tasks[0], tasks[1]], ["a", "a"])


def test_a_rule_that_returns_none_for_every_prompt_is_refused_and_one_for_some_is_not(kinds):
    rows = [row() | {"task": task} for task in ("other", "this")]
    rules.check_rules({"some"}, rows, kinds)
    with pytest.raises(configs.InputError, match="none, a rule of .* returned None for each of 2 prompts.* a return"):
        rules.check_rules({"none"}, rows, kinds)


def test_imported_rules_are_found(monkeypatch):
    monkeypatch.setattr(rewards, "imported", functools.partial(lambda prompt, completion, row: 1.0), raising=False)
    assert rules.find_reward("imported", "REWARDS") is rewards.imported


@pytest.mark.parametrize("name", ["math", "format", "length"])
def test_a_rule_may_have_the_name_of_a_module_or_a_builtin(tmp_path, name):
    """`import math` at the top, and a rule that uses it and the builtin format."""
    text = (configs.HERE / "rewards.py").read_text()
    own = "def mine(prompt, completion, row):\n    return math.sqrt(float(format(4, 'd')))\n"
    (tmp_path / "rules.py").write_text(text.replace("from scoring", "import math\n\nfrom scoring", 1) + "\n\n" + own)
    scorer = rules.Rewards({name: 1.0, "mine": 1.0}, file=tmp_path / "rules.py")
    assert scorer([row() | {"answer": "7"}], ["#### 7"]) == [2.0 + {"math": 1, "format": 1, "length": -0.006}[name]]


def test_the_file_of_rules_is_loaded_once(tmp_path):
    """What loading it reserves is taken off a rule's memory once."""
    own = "def twice(prompt, completion, row):\n    import sys\n    return float('rewards' in sys.modules)\n"
    (tmp_path / "rules.py").write_text((configs.HERE / "rewards.py").read_text() + "\n\n" + own)
    assert rules.Rewards({"twice": 1.0}, file=tmp_path / "rules.py")([row()] * 2, ["a", "b"]) == [0.0, 0.0]


def test_a_rule_of_ones_own_may_replace_one_that_is_there(monkeypatch):
    def math(prompt, completion, row):
        return 0.5

    assert rules.find_reward("math", "REWARDS") is rewards.math_reward
    monkeypatch.setattr(rewards, "math", math, raising=False)
    assert rules.find_reward("math", "REWARDS") is math


def test_answers_that_a_rule_cannot_read_are_counted_and_above_the_stated_share_stop_the_run(capsys):
    solution = "Ann had three pens, and then she bought four more of them in the shop, so that she has seven pens now"
    rows = [row() | {"answer": answer} for answer in ["\\frac{1}{2}", "#### 7", "C"] * 10 + [solution] * 3]
    assert rules.check_answers("math", "REWARDS", rows, "PROMPTS") == rows
    out = capsys.readouterr().out
    assert "the rule math gives 0 to the own answer of 3 of 33 prompts of PROMPTS, such as 'Ann had three" in out
    with pytest.raises(configs.InputError, match="own answer of 3 of 6 prompts .* mark the answers with ####"):
        rules.check_answers("math", "REWARDS", rows[-6:], "PROMPTS")
    with pytest.raises(
        configs.InputError, match="exact_match gives 0 to the own answer of 1 of 1 .* --eval-reward math"
    ):
        rules.check_answers("exact_match", "EVAL_REWARD", [row() | {"answer": "3+4=7 #### 7"}], "PROMPTS")


def test_only_answers_that_a_rule_concerns_are_tried_and_in_forms_that_it_knows(kinds, capsys):
    rows = [row() | {"answer": "7", "task": task} for task in ("this", "other")]
    assert rules.check_answers("some", "EVAL_REWARD", rows, "PROMPTS", kinds) == rows[:1]
    rules.check_answers("judge", "EVAL_REWARD", rows, "PROMPTS", kinds)  # a quarter for each: it wants another form
    assert capsys.readouterr().out == ""


def test_a_rule_with_other_parameters_is_told_which_it_must_take(monkeypatch):
    def typed(question, text, row):
        return 1.0

    def scaled(prompt, completion, row, scale=2.0):
        return 1.0

    for function, takes in ((typed, "question, text, row"), (scaled, "prompt, completion, row, scale")):
        function.__module__ = "rewards"
        monkeypatch.setattr(rewards, function.__name__, function, raising=False)
        with pytest.raises(configs.InputError) as error:
            rules.find_reward(function.__name__, "REWARDS")
        assert f"takes ({takes}); a rule must take (prompt, completion, row)" in str(error.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [("row['worth']", "raised KeyError: 'worth'"), ("'good'", "returned 'good'"), ("nothing", "raised NameError")],
)
def test_a_rule_that_scores_nothing_is_refused_before_there_is_a_folder(
    small, tmp_path, monkeypatch, capsys, body, words
):
    text = f"from rewards import exact_match\n\ndef length(prompt, completion, row):\n    return {body}\n"
    (tmp_path / "rules.py").write_text(text)
    monkeypatch.setattr(rules, "check_rules", functools.partial(rules.check_rules, file=tmp_path / "rules.py"))
    for flags in (["--rewards", "exact_match, length"], ["--rewards", "exact_match", "--eval-reward", "length"]):
        with pytest.raises(SystemExit) as exit_:
            gspo.main(flags)
        err = capsys.readouterr().err
        assert exit_.value.code == 2 and f"length, a rule of {tmp_path}/rules.py, {words}" in err and "mend it" in err
        assert not (tmp_path / "outputs").exists()


def test_a_rule_that_scores_some_completions_is_not_refused(tmp_path):
    (tmp_path / "rules.py").write_text(
        "def rule(prompt, completion, row):\n    return len(completion.split('####')[1])"
    )
    rules.check_rules({"rule"}, [row()], tmp_path / "rules.py")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def rule(prompt, completion, row)\n    return 1.0\n", "rewards.py, line 1: expected ':'; mend it there"),
        ("SECONDS = '1'\n", "must be a positive number: how long a rule may take; mend it there"),
        ("raise SystemExit(3)\n", "cannot be imported: SystemExit: 3; mend it there"),
        ("import not_there\n", "cannot be imported: ModuleNotFoundError: No module named 'not_there'; mend it there"),
    ],
)
def test_a_broken_file_of_rules_is_one_line_of_a_run_and_an_exception_of_a_trainer(
    small, tmp_path, monkeypatch, capsys, text, says
):
    """An import raises nothing, because a SystemExit would end a notebook's kernel."""
    (tmp_path / "rewards.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards")
    with pytest.raises(configs.InputError, match=re.escape(says)):
        small.GSPOTrainer()
    with pytest.raises(SystemExit) as exit_:
        gspo.main(["--rewards", "exact_match"])
    assert exit_.value.code == 2 and says in capsys.readouterr().err
    importlib.reload(gspo)


def test_a_reward_model_that_returns_nan_is_a_failure_like_any_other():
    class Model:
        report = dict

        def __call__(self, *_):
            return [0.5, float("nan"), -0.5]

    scorer = rules.Rewards({"reward_model": 1.0}, Model())
    assert scorer([row()] * 3, ["a", "b", "c"]) == [0.5, 0.0, -0.5]
    assert scorer.failures[0]["problem"].startswith("returned nan")
    assert scorer.report()["reward_model"] == 0.0


def test_only_completions_for_which_a_reward_model_returns_nan_get_zero(small):
    trainer = small.GSPOTrainer()
    rollouts = trainer.generate_responses_with_group_sampling(1)
    healthy = trainer.compute_rewards(rollouts)
    seven = trainer.tokenizer.convert_tokens_to_ids("7")
    trainer.rewards.reward_model.model.get_input_embeddings().weight[seven] = float("nan")
    rewards = trainer.compute_rewards(rollouts)
    broken = [
        7 in map(int, filter(str.isdigit, row["prompt"] + text))
        for row, text in zip(rollouts.prompts, rollouts.texts, strict=True)
    ]
    assert 0 < sum(broken) < len(broken)
    expected = [0.0 if bad else float(reward) for bad, reward in zip(broken, healthy, strict=True)]
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(trainer.rewards.failures) == sum(broken)


def test_a_run_whose_rewards_fail_stops_with_a_checkpoint_and_its_failures(small, monkeypatch, capsys):
    steps = []

    def score(name, texts):
        if name == "format":
            steps.append(len(steps) + 1)
        if name == "format" and steps[-1] == 2:
            return [(0.0, "raised KeyError: 'answer'")] * len(texts)
        return [(float(i % 2), None) for i in range(len(texts))]

    scores_while_training(monkeypatch, score)
    with pytest.raises(SystemExit) as exit_:
        gspo.main(["--rewards", "format"])
    err = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    assert "step 2: 16 of 16 scores failed: format raised KeyError" in err and "checkpoints/step-1" in err
    (folder,) = (configs.HERE / small.OUTPUT_DIR).iterdir()
    assert (folder / "checkpoints/step-1/model.safetensors").is_file()
    failures = [json.loads(line) for line in (folder / "reward_failures.jsonl").read_text().splitlines()]
    assert len(failures) == 16 and {(failure["step"], failure["of"]) for failure in failures} == {(2, "rollout")}
    assert len((folder / "reward_failures.jsonl").read_text().splitlines()) == 16


def test_an_evaluation_that_fails_leaves_the_model_of_its_step(small, monkeypatch, capsys):
    evaluations = []

    def fail_after_training(name, texts):
        evaluations.append(name)
        return [(0.0, None if len(evaluations) <= 2 else "returned None")] * len(texts)

    scores_while_training(monkeypatch, fail_after_training)  # two before: sampled and greedy
    with pytest.raises(SystemExit):
        gspo.main([])
    err = capsys.readouterr().err.splitlines()[-1]
    assert "step 2: 12 of 12 scores failed" in err and "the state after step 2 is in" in err
    (folder,) = (configs.HERE / small.OUTPUT_DIR).iterdir()
    assert (folder / "checkpoints/step-2/model.safetensors").is_file()
    failures = [json.loads(line) for line in (folder / "reward_failures.jsonl").read_text().splitlines()]
    assert {(failure["step"], failure["of"]) for failure in failures} == {(2, "evaluation")}


# ---- The shipped rules


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("so 3+4=7\n#### 7", "It is 7.\n#### 7", 1),
        ("#### 7", "#### 8", 0),
        ("#### 7", "7", 0),  # not marked
        ("#### 1,234", "#### $1234.00", 1),
        ("#### 7", "first #### 6 then #### 7", 1),
        ("#### 7", "#### 7 apples\nand so on", 1),
        ("\\frac{1}{2}", "thus \\boxed{0.5}", 1),
        ("\\boxed{x+1}", "\\boxed{1+x}", 1),
        ("1/2", "\\boxed{\\frac{1}{2}} or \\boxed{\\frac{1}{3}}", 0),
        ("#### 7", "", 0),
        ("#### 7", "####", 0),
        ("#### 7", "\\boxed{7", 0),
        ("#### -3", "#### -3", 1),
    ],
)
def test_math(answer, completion, right):
    assert (
        rewards.math_reward("p", completion, {"answer": answer}) == right
    )  # without a time limit, because the machine may be busy


def test_an_answer_that_would_take_forever_to_compare_is_a_failure():
    scorer = rules.Rewards({"math": 1.0})
    rows = [{"prompt": "p", "answer": "#### 3"}] * 4
    assert scorer(rows, ["\\boxed{9^{9^{9^9}}}", "#### 3", "#### 4", "\\boxed{3}"]) == [0.0, 1.0, 0.0, 1.0]
    assert [failure["problem"] for failure in scorer.failures] == [
        "took longer than 1 s; make it faster, or raise SECONDS in rewards.py"
    ]


def test_format_and_length():
    scorer = rules.Rewards({"format": 1.0, "length": 10.0})
    rows = [{"prompt": "p", "answer": "3"}] * 3
    assert scorer(rows, ["#### 3", "\\boxed{3}", "3" * 100]) == pytest.approx([1 - 0.06, 1 - 0.09, -1])
    assert set(scorer.report()) == {"reward_format", "reward_length", "reward_failures"}
